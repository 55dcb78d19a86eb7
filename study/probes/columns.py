"""Names of columns that probes write, and what is in them."""

MEASURED = (
    *("value", "gain", "variance", "squared_bias", "ratio", "share", "share_of_original"),
    *("standard_error", "bias_standard_error", "ratio_standard_error"),
    *("first_loss", "final_loss"),
)
"""Columns that hold what was measured; all others say what a row is about, and may be infinite."""
