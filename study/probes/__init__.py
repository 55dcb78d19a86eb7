"""Probes: measurements of a network or of targets that are not sample quality.

A probe is one file with ``measure(subject, options) -> Measured``, a line here, and its options in
``study.probes.options``, which also say what it looks at. Nothing here imports torch.
"""

PROBES: dict[str, str] = {
    "dynamics": "study.probes.dynamics",
    "robustness": "study.probes.robustness",
    "representation": "study.probes.representation",
    "stability_frontier": "study.probes.stability_frontier",
    "cost": "study.probes.cost",
    "target_variance": "study.probes.target_variance",
    "optimal_denoiser": "study.probes.optimal_denoiser",
    "scaling_laws": "study.probes.scaling_laws",
}
"""Module of every probe by its kind."""

MEASURED = (
    *("value", "gain", "variance", "squared_bias", "ratio", "share", "share_of_original"),
    *("standard_error", "bias_standard_error", "ratio_standard_error"),
    *("first_loss", "final_loss"),
)
"""Columns that hold what was measured; all others say what a row is about, and may be infinite."""
