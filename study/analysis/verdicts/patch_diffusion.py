"""Do optimal predictions lack the detail that large patches would blur?"""

import numpy as np
import pandas as pd

from study.analysis.tables.read import Tables
from study.analysis.verdicts.base import (
    CONTRADICTED,
    REPRODUCED,
    Verdict,
    not_testable,
    without_probe,
)

LINEAR_STEPS, LINEAR_BETAS = 1000, (1e-4, 0.02)
"""The linear schedule on which Patch Diffusion counts timesteps."""


def lost_detail(tables: Tables) -> pd.DataFrame:
    """Share of the energy above a patch's Nyquist limit that optimal predictions keep.

    Rows: SNR; columns: patch size; 1 = as much as the images themselves hold. A patch whose band
    has all of the images' energy is left out: it is as large as the image, and no detail is above
    its limit in particular.
    """
    frame = tables.probe("optimal_denoiser")
    if frame.empty:
        return frame
    rows = frame[(frame["quantity"] == "energy_above") & frame["value"].notna()]
    rows = rows[rows["share_of_original"] < 1 - 1e-6]
    return rows.pivot(index="snr", columns="patch", values="value")


def blur(tables: Tables) -> list[Verdict]:
    """Whether the optimal prediction lacks fine detail for most timesteps of a linear schedule."""
    claim = "The optimal prediction is blurry for most timesteps"
    frame = tables.probe("optimal_denoiser")
    if frame.empty:
        return without_probe(claim, "optimal_denoiser")
    kept = lost_detail(tables)
    if kept.empty:
        return [not_testable(claim, "no patch is smaller than the images, or they have no detail")]
    beta = np.linspace(*LINEAR_BETAS, LINEAR_STEPS)
    alpha = np.cumprod(1 - beta)
    snr = alpha / (1 - alpha)
    own = frame[frame["quantity"] == "own_weight"].groupby("snr")["value"].mean()
    answers = []
    for patch in kept.columns:
        curve = kept[patch].dropna()
        known = np.log(curve.index.to_numpy(dtype=float))
        steps = np.interp(np.log(snr), known, curve.to_numpy())
        blurry = float((steps < 0.5).mean())
        split = float(np.interp(np.log(0.25), known, curve.to_numpy()))
        recalled = float(np.interp(np.log(0.25), np.log(own.index.to_numpy(dtype=float)), own))
        reason = (
            f"{claim} (P = {patch:g}): on {blurry:.0%} of the {LINEAR_STEPS} steps of the linear "
            "schedule it keeps less than half of the images' energy above the limit of the patch; "
            f"at SNR 0.25, where the authors split, it keeps {split:.0%}, with {recalled:.2g} of "
            "the posterior's weight on the noised image itself (a small data set is recalled "
            "sooner than a large one)."
        )
        answers.append(Verdict(REPRODUCED if blurry > 0.5 else CONTRADICTED, reason))
    return answers
