"""What a study's probes say about the papers' claims on mechanisms, for the notebooks.

Each function takes the tables of a study and gives a table for people or verdicts with the numbers
behind them; a study without the probe gets the verdict "not testable at this budget".
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from study.analysis import figures, style
from study.analysis.claims import grid, not_testable, say, show
from study.analysis.statistics import Verdict, holm, verdict
from study.analysis.tables import Tables

LINEAR_STEPS, LINEAR_BETAS = 1000, (1e-4, 0.02)
"""The linear schedule on which Patch Diffusion counts timesteps."""


def picture(tables: Tables, name: str) -> Any:
    """A figure of a probe, or the sentence that this study does not have the probe."""
    needed = figures.NEEDS.get(name)
    if needed is not None and needed not in tables.probes:
        return say(f"*This study does not make the probe `{needed}`; `digits-stability` does.*")
    return show(figures.FIGURES[name](tables))


def _absent(claim: str, probe: str) -> list[Verdict]:
    return [not_testable(claim, f"this study does not make the probe {probe}")]


# --- ScaleLong's theorems ------------------------------------------------------------------------

LAWS = {"forward": "feature norm", "gradient": "gradient norm", "sensitivity": "sensitivity"}


def recursion(tables: Tables) -> pd.DataFrame:
    """Predicted and measured squares on the clean recursion, by law, depth and scaling.

    ``p`` is that of a two-sided t-test of the mean over draws against the prediction, ``p_holm``
    corrected over all rows. Sensitivities are compared as squares, of which the mean is predicted.
    """
    frame = tables.probe("scaling_laws")
    if frame.empty:
        return frame
    frame = frame[(frame["network"] == "recursion") & frame["quantity"].isin(LAWS)]
    rows = []
    for (quantity, depth, scaling), group in frame.groupby(["quantity", "depth", "skip_scaling"]):
        power = 2 if quantity == "sensitivity" else 1
        values = group["value"].to_numpy(dtype=float) ** power
        predicted = float(group["predicted"].iloc[0]) ** power
        error = values.std(ddof=1) / np.sqrt(len(values))
        t = (values.mean() - predicted) / error
        rows.append(
            {
                "law": LAWS[quantity],
                "long skips": depth,
                "skip_scaling": scaling,
                "draws": len(values),
                "predicted": predicted,
                "measured": values.mean(),
                "standard error": error,
                "p": 2 * float(stats.t.sf(abs(t), len(values) - 1)),
            }
        )
    answer = pd.DataFrame(rows)
    answer["p_holm"] = holm(answer["p"].tolist())
    place = {scaling: i for i, scaling in enumerate(style.order_scalings(answer["skip_scaling"]))}
    order = answer["skip_scaling"].map(place)
    answer = answer.assign(_order=order).sort_values(["law", "long skips", "_order"])
    return answer.drop(columns="_order").reset_index(drop=True)


def laws(tables: Tables) -> list[Verdict]:
    """Whether the clean recursion follows the theorems' lines, and their bound holds."""
    claim = "On the clean recursion, squared norms, gradients and sensitivity follow 1 + Σκ²"
    found = recursion(tables)
    if found.empty:
        return _absent(claim, "scaling_laws")
    away = found[found["p_holm"] < 0.05]
    ratio = found["measured"] / found["predicted"]
    numbers = (
        f"{len(found) - len(away)} of {len(found)} means over {found['draws'].min()} draws lie "
        f"within their sampling error (Holm, 5 %); measured / predicted from {ratio.min():.2f} to "
        f"{ratio.max():.2f}"
    )
    word = "not reproduced" if len(away) else "reproduced"
    answers = [Verdict(word, f"{claim}: {numbers}.")]
    frame = tables.probe("scaling_laws")
    frame = frame[frame["network"] == "recursion"]
    keys = ["depth", "skip_scaling", "seed"]
    wide = frame[frame["quantity"].isin(["bound", "sensitivity"])].pivot_table(
        index=keys, columns="quantity", values="value"
    )
    slack = wide["bound"] / wide["sensitivity"]
    word = "reproduced" if (slack >= 1).all() else "not reproduced"
    answers.append(
        Verdict(
            word,
            f"The change of the output stays below the robustness bound: bound / measured is at "
            f"least {slack.min():.3g} over {len(slack)} draws (median {slack.median():.3g}, so the "
            "bound is loose).",
        )
    )
    return answers


def ranks(tables: Tables) -> list[tuple[dict[str, str], Verdict]]:
    """Per backbone and law: does the measured order follow Σκ² (Spearman, over draws)?"""
    frame = tables.probe("scaling_laws")
    if frame.empty:
        return []
    frame = frame[(frame["network"] != "recursion") & frame["quantity"].isin(LAWS)]
    answers = []
    for network in style.order_lines(frame["network"]):
        for quantity, law in LAWS.items():
            rows = frame[(frame["network"] == network) & (frame["quantity"] == quantity)]
            correlations = [
                float(stats.spearmanr(draw["sum_squares"], draw["value"]).statistic)
                for _, draw in rows.groupby("seed")
            ]
            about = {"backbone": style.line_label(network), "law": law}
            text = f"{law} grows with Σκ² (rank correlation)"
            known = [value for value in correlations if np.isfinite(value)]
            if len(known) > 1 and len(set(known)) == 1:
                # Without spread there is nothing to test, but also no doubt about the sign.
                word = "reproduced" if known[0] > 0 else "not reproduced"
                reason = f"{text}: {known[0]:+.2f} in each of {len(known)} draws."
                about["rank correlation"] = f"{known[0]:+.2f}"
                answers.append((about, Verdict(word, reason)))
                continue
            about["rank correlation"] = f"{np.mean(known):+.2f}" if known else ""
            answers.append((about, verdict(known, text, positive=True)))
    return answers


def rank_table(tables: Tables) -> Any:
    """:func:`ranks` as a table."""
    rows = [{**about, "verdict": found.word} for about, found in ranks(tables)]
    if not rows:
        return say(*_absent("Norms at initialisation follow Σκ²", "scaling_laws"))
    return grid(pd.DataFrame(rows), index=False)


# --- Stable Target Field -------------------------------------------------------------------------


def variance_ratios(tables: Tables, distribution: str | None = None) -> pd.DataFrame:
    """V_STF / V_DSM by noise level (rows) and size of the reference batch (columns).

    The ratio is the same in every unit. Noise levels at which V_DSM itself is not told from zero
    (twice its standard error) are left out.
    """
    frame = tables.probe("target_variance")
    if frame.empty:
        return frame
    name = distribution or next(n for n in frame["distribution"] if n != "two modes")
    rows = frame[(frame["distribution"] == name) & (frame["unit"] == "x0")]
    plain = rows[rows["reference"] == 0]
    seen = plain.loc[plain["variance"] > 2 * plain["standard_error"], "sigma"]
    rows = rows[rows["sigma"].isin(set(seen)) & (rows["reference"] > 0)]
    return rows.pivot_table(index="sigma", columns="reference", values="ratio")


def target_bias(tables: Tables, name: str) -> float:
    """Largest squared bias of the stable target in its standard errors, with its sign."""
    frame = tables.probe("target_variance")
    rows = frame[
        (frame["distribution"] == name) & (frame["unit"] == "x0") & (frame["reference"] > 0)
    ]
    rows = rows[rows["bias_standard_error"] > 0]
    return float((rows["squared_bias"] / rows["bias_standard_error"]).max())


def target_variance(tables: Tables) -> list[Verdict]:
    """Whether the stable target varies less, and how fast its variance falls with n."""
    claim = "The stable target varies less than the clean image at every noise level"
    if tables.probe("target_variance").empty:
        return _absent(claim, "target_variance")
    answers = []
    for name in sorted(set(tables.probe("target_variance")["distribution"])):
        ratios = variance_ratios(tables, name)
        known = ratios.to_numpy()[np.isfinite(ratios.to_numpy())]
        word = "reproduced" if (known < 1).all() else "not reproduced"
        largest = ratios.columns.max()
        middle = ratios[largest].dropna()
        answers.append(
            Verdict(
                word,
                f"{claim} ({name}): V_STF / V_DSM from {known.min():.2g} to {known.max():.3g} over "
                f"{len(known)} pairs of noise level and n; at n = {largest} it is "
                f"{middle.iloc[0]:.2g} at σ = {middle.index[0]:.2g} and {middle.iloc[-1]:.2g} at "
                f"σ = {middle.index[-1]:.2g}.",
            )
        )
        bias = target_bias(tables, name)
        answers.append(
            Verdict(
                "reproduced" if bias < 4 else "not reproduced",
                f"Given the noisy image, the stable target is right on average ({name}): its "
                f"largest squared bias is {bias:.1f} standard errors above zero. (That the "
                "published theory has it asymptotically is weaker than what holds: as the mean of "
                "the source given x and the reference it has no bias at any n.)",
            )
        )
        high = ratios.iloc[-1].dropna()
        times = (high * high.index.to_numpy(dtype=float)).to_numpy()
        word = "reproduced" if ((times > 0.5) & (times < 2)).all() else "not reproduced"
        answers.append(
            Verdict(
                word,
                f"At much noise the variance falls as 1/n ({name}): n V_STF / V_DSM lies between "
                f"{times.min():.2f} and {times.max():.2f} at σ = {ratios.index[-1]:.3g}.",
            )
        )
    return answers


# --- Patch Diffusion -----------------------------------------------------------------------------


def lost_detail(tables: Tables) -> pd.DataFrame:
    """Share of the energy above a patch's Nyquist limit that optimal predictions keep.

    Rows: SNR; columns: patch size; 1 = as much as the images themselves hold. A patch as large as
    the image is left out: it holds every frequency but the mean.
    """
    frame = tables.probe("optimal_denoiser")
    if frame.empty:
        return frame
    side = frame.loc[frame["quantity"] == "image", "side"].max()
    rows = frame[frame["quantity"] == "energy_above"]
    rows = rows[~(rows["patch"] >= side)]
    return rows.pivot_table(index="snr", columns="patch", values="value")


def blur(tables: Tables) -> list[Verdict]:
    """Whether the optimal prediction lacks fine detail for most timesteps of a linear schedule."""
    claim = "The optimal prediction is blurry for most timesteps"
    kept = lost_detail(tables)
    if kept.empty:
        return _absent(claim, "optimal_denoiser")
    beta = np.linspace(*LINEAR_BETAS, LINEAR_STEPS)
    alpha = np.cumprod(1 - beta)
    snr = alpha / (1 - alpha)
    frame = tables.probe("optimal_denoiser")
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
        answers.append(Verdict("reproduced" if blurry > 0.5 else "not reproduced", reason))
    return answers


# --- U-ViT and U-DiT -----------------------------------------------------------------------------


def antidiagonal(tables: Tables) -> pd.DataFrame:
    """How much blocks resemble their mirror image, beyond what their distance explains, by run.

    ``contrast`` is the mean CKA of pairs (k, L - 1 - k) minus the mean of all pairs equally far
    apart; pairs closer than two blocks are left out.
    """
    frame = tables.probe("representation")
    if frame.empty:
        return frame
    frame = frame[frame["quantity"] == "cka"]
    rows = []
    words = ["run", "line", "backbone", "skip_scaling", "target", "seed"]
    for key, group in frame.groupby(words):
        wide = group.pivot_table(index="position", columns="other_position", values="value")
        matrix = wide.to_numpy(dtype=float)
        size = len(matrix)
        contrasts = []
        for k in range(size // 2):
            gap = size - 1 - 2 * k
            if gap >= 2:
                contrasts.append(matrix[k, size - 1 - k] - np.diagonal(matrix, gap).mean())
        # The outermost pair is the only one at its distance and has nothing to be compared with.
        contrasts = contrasts[1:]
        if contrasts:
            rows.append({**dict(zip(words, key, strict=True)), "contrast": np.mean(contrasts)})
    return pd.DataFrame(rows, columns=[*words, "contrast"])


def mirror_table(tables: Tables) -> Any:
    """:func:`antidiagonal` as a table."""
    found = antidiagonal(tables)
    if found.empty:
        return say("*No map, no contrast.*")
    return grid(found.drop(columns="run").round(3), index=False)


def low_frequencies(tables: Tables, share: float = 0.5) -> pd.DataFrame:
    """How far the amplitude of features falls from low to high frequencies, by run and block.

    ``drop`` is the mean log10 amplitude above ``share`` of the Nyquist frequency minus that below.
    """
    frame = tables.probe("representation")
    if frame.empty:
        return frame
    frame = frame[(frame["quantity"] == "spectrum") & (frame["frequency"] > 0)]
    words = ["run", "line", "skip_scaling", "target", "seed", "block", "position"]
    high = frame[frame["frequency"] > share].groupby(words)["value"].mean()
    low = frame[frame["frequency"] <= share].groupby(words)["value"].mean()
    return (high - low).dropna().rename("drop").reset_index()


def spectra_table(tables: Tables) -> Any:
    """:func:`low_frequencies` of the unscaled DSM arms: mean and range over blocks."""
    found = low_frequencies(tables)
    if len(found):
        found = found[(found["skip_scaling"] == "none") & (found["target"] == "dsm")]
    if found.empty:
        return say("*No spectra.*")
    rows = found.groupby("line")["drop"].agg(["mean", "min", "max"])
    return grid(rows.reindex(style.order_lines(rows.index)).rename(style.line_label).round(2))
