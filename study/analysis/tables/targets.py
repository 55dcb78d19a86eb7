"""Which rows of the probe target_variance can be read, and in which order?"""

import pandas as pd


def distributions(rows: pd.DataFrame) -> list[str]:
    """The data set first, the toy last."""
    return sorted(set(rows["distribution"]), key=lambda name: (name == "two modes", name))


def noticed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of noise levels at which V_DSM is no mean of rare events: twice its standard error."""
    whole = rows[(rows["reference"] == 0) & (rows["unit"] == "x0")]
    sound = whole[whole["ratio"].notna() & (whole["variance"] > 2 * whole["standard_error"])]
    keys = sound[["distribution", "sigma"]]
    return rows.merge(keys, on=["distribution", "sigma"])
