"""Do norms, gradients and robustness at initialisation follow the factors of the long skips?"""

import math
import re
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from study.analysis import style
from study.analysis.display import grid, say
from study.analysis.statistics import holm, paired
from study.analysis.tables.read import Tables
from study.analysis.verdicts.base import (
    CONTRADICTED,
    REPRODUCED,
    UNTESTABLE,
    Verdict,
    not_testable,
    without_probe,
)
from study.analysis.words import enumerate_words, p_text

LAWS = {"forward": "feature norm", "gradient": "gradient norm", "sensitivity": "sensitivity"}


def recursion(tables: Tables) -> pd.DataFrame:
    """Predicted and measured squares on the clean recursion, by law, depth and scaling.

    ``p`` is that of a two-sided t-test of the mean over draws against the prediction, ``p_holm``
    corrected over all rows. Sensitivities are compared as squares, of which the mean is predicted.
    """
    frame = _laws_of(tables, clean=True)
    rows = []
    for (quantity, depth, scaling), group in frame.groupby(["quantity", "depth", "skip_scaling"]):
        power = 2 if quantity == "sensitivity" else 1
        values = group["value"].to_numpy(dtype=float) ** power
        predicted = float(group["predicted"].iloc[0]) ** power
        rows.append(
            {
                "law": LAWS[quantity],
                "long skips": depth,
                "skip_scaling": scaling,
                "draws": len(values),
                "predicted": predicted,
                "measured": values.mean(),
                "p": paired(values - predicted).p,
            }
        )
    answer = pd.DataFrame(rows)
    return answer.assign(p_holm=holm(answer["p"].tolist())) if rows else answer


def _laws_of(tables: Tables, clean: bool) -> pd.DataFrame:
    """Finite rows of the three laws on the clean recursion, or on the backbones."""
    frame = tables.probe("scaling_laws")
    if frame.empty:
        return pd.DataFrame(columns=["network", "depth", "quantity", "skip_scaling"])
    frame = frame[(frame["network"] == "recursion") == clean]
    return frame[frame["quantity"].isin(LAWS) & np.isfinite(frame["value"].astype(float))]


def orders(tables: Tables, clean: bool) -> pd.DataFrame:
    """How surely the three laws follow Σκ², by network and depth: one test each, Holm over all.

    ``rho`` is the mean over draws of Spearman's rank correlation of value and Σκ² over the
    scalings. The test is Page's for ordered alternatives, two-sided, in its normal approximation:
    were all orders of the k scalings equally likely in every draw, each correlation would have
    variance 1 / (k - 1). ``p`` is missing where no draw has a correlation.
    """
    frame = _laws_of(tables, clean)
    rows = []
    for (network, depth, quantity), group in frame.groupby(["network", "depth", "quantity"]):
        draws = [
            draw
            for _, draw in group.groupby("seed")
            if draw["value"].nunique() > 1 and draw["sum_squares"].nunique() > 1
        ]
        found = [stats.spearmanr(draw["sum_squares"], draw["value"]).statistic for draw in draws]
        spread = math.sqrt(sum(1 / (len(draw) - 1) for draw in draws))
        p = 2 * float(stats.norm.sf(abs(sum(found)) / spread)) if found else math.nan
        rho = float(np.mean(found)) if found else math.nan
        rows.append((network, depth, quantity, len(found), rho, p))
    answer = pd.DataFrame(rows, columns=["network", "depth", "quantity", "draws", "rho", "p"])
    return answer.assign(p_holm=holm(answer["p"].tolist()))


def laws(tables: Tables) -> list[Verdict | str]:
    """What the clean recursion says: the order of the scalings, our own line, and the bound."""
    claim = (
        "The factors of the long skips govern norms, gradients and robustness (ScaleLong, "
        "abstract; the form of its bounds is not among our sources), here on a clean recursion at "
        "initialisation"
    )
    tests = orders(tables, clean=True)
    if tests.empty:
        return [*without_probe(claim, "scaling_laws")]
    shown = tests["p_holm"] < 0.05
    if (shown & (tests["rho"] < 0)).any():
        word = CONTRADICTED
    else:
        word = REPRODUCED if shown.all() else UNTESTABLE
    answers: list[Verdict | str] = [
        Verdict(
            word,
            f"{claim}: they grow with Σκ² in {int((shown & (tests['rho'] > 0)).sum())} of "
            f"{len(tests)} tests (three measures, each depth; Holm, 5 %), fall in "
            f"{int((shown & (tests['rho'] < 0)).sum())}; mean rank correlation from "
            f"{tests['rho'].min():+.2f} to {tests['rho'].max():+.2f}.",
        )
    ]
    found = recursion(tables)
    away = int((found["p_holm"] < 0.05).sum())
    ratio = found["measured"] / found["predicted"]
    answers.append(
        "How much they grow is no claim of the paper that we could check; exact for this recursion "
        f"is 1 + Σκ². {away} of {len(found)} means over {found['draws'].min()} draws differ from "
        f"it (Holm, 5 %); measured / exact from {ratio.min():.2f} to {ratio.max():.2f}."
    )
    return answers + _bound(tables)


def _bound(tables: Tables) -> list[Verdict | str]:
    """The robustness bound beside random directions, which are no test of it."""
    frame = tables.probe("scaling_laws")
    frame = frame[frame["quantity"].isin(["bound", "sensitivity"])]
    wide = frame[frame["network"] == "recursion"].pivot(
        index=["depth", "skip_scaling", "seed"], columns="quantity", values="value"
    )
    if not {"bound", "sensitivity"} <= set(wide.columns):
        return []
    slack = (wide["bound"] / wide["sensitivity"]).dropna()
    claim = (
        "The change of the output stays below Σ κᵢ M₀ⁱ + c₀ (as restated in arXiv 2411.02149; "
        "c₀ = M₀ᴺ ‖middle‖ is our choice)"
    )
    crossed = int((slack < 1).sum())
    if crossed:
        return [Verdict(CONTRADICTED, f"{claim}: exceeded in {crossed} of {len(slack)} draws.")]
    why = (
        f"it is not contradicted by random directions (bound / measured is at least "
        f"{slack.min():.3g} over {len(slack)} draws, median {slack.median():.3g}), but these can "
        "hardly reach a worst case"
    )
    return [not_testable(claim, why)]


ORDERED = 0.9
"""Mean rank correlation from which scalings are in order: five with two neighbours exchanged."""


def ranks(tables: Tables) -> list[tuple[dict[str, str], Verdict]]:
    """Per backbone and law: does the measured order follow Σκ²? Holm over all of them.

    A test says that there is some order; many draws with one and the same weak order pass it as
    well. Hence reproduced: shown, and a mean rank correlation of ``ORDERED``. Not reproduced: below
    that, and the order is shown to be the reverse, in all or for a pair of scalings
    (:func:`reversals`).
    """
    tests = orders(tables, clean=False)
    wrong = reversals(tables)
    answers = []
    for network in style.order_lines(tests["network"]):
        for _, row in tests[tests["network"] == network].iterrows():
            law, known = LAWS[row["quantity"]], not math.isnan(row["p"])
            out = wrong.get((network, row["quantity"]), [])
            about = {
                "backbone": style.line_label(network),
                "law": law,
                "rank correlation with Σκ²": f"{row['rho']:+.2f}" if known else "",
                "draws": str(row["draws"]),
                "p (Holm)": p_text(row["p_holm"]),
                "remark": f"the reverse of Σκ²: {enumerate_words(out)}" if out else "",
            }
            about["remark"] = about["remark"] if known else "no test"
            shown, high = row["p_holm"] < 0.05, row["rho"] >= ORDERED - 1e-9
            word = UNTESTABLE
            if shown and high:
                word = REPRODUCED
            elif out or (shown and row["rho"] < 0):
                word = CONTRADICTED
            elif shown:
                about["remark"] = "in part: some scalings are out of order"
            answers.append((about, Verdict(word, f"{law} grows with Σκ².")))
    return answers


def reversals(tables: Tables) -> dict[tuple[str, str], list[str]]:
    """Pairs of scalings whose order on a backbone is shown to be the reverse of Σκ²'s.

    By network and quantity, "1/√2 below CS 0.7" for a larger Σκ² of the former. Paired t-tests of
    log ratios over the draws, Holm's correction over all pairs of all networks and quantities.
    """
    frame = _laws_of(tables, clean=False)
    found = []
    for (network, quantity), group in frame.groupby(["network", "quantity"]):
        squares = group.groupby("skip_scaling")["sum_squares"].first().sort_values()
        wide = group.pivot_table(index="seed", columns="skip_scaling", values="value")
        wide = np.log(wide.where(wide > 0))
        for small, large in combinations(squares.index, 2):
            if squares[small] < squares[large]:
                result = paired((wide[large] - wide[small]).dropna())
                words = f"{style.scaling_label(large)} below {style.scaling_label(small)}"
                found.append(((network, quantity), words, result.mean < 0, result.p))
    answer: dict[tuple[str, str], list[str]] = {}
    for (key, words, below, _), p in zip(found, holm([row[-1] for row in found]), strict=True):
        if below and p < 0.05:
            answer.setdefault(key, []).append(words)
    return answer


def rank_summary(tables: Tables) -> list[str]:
    """:func:`ranks` in a sentence; nothing where there are no backbones."""
    found = ranks(tables)
    if not found:
        return []
    words = [one.word for _, one in found]
    failed = [about["remark"] for about, one in found if one.word == CONTRADICTED]
    wrong = Counter(
        pair
        for out in reversals(tables).values()
        for pair in out
        if any(pair in remark for remark in failed)
    )
    text = (
        f"On the study's own backbones at initialisation the order of Σκ² is reproduced in "
        f"{words.count(REPRODUCED)} of {len(words)} combinations of backbone and measure, not "
        f"reproduced in {words.count(CONTRADICTED)} and not testable in {words.count(UNTESTABLE)}."
    )
    if wrong:
        ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
        counts = [f"{pair} in {n}" for pair, n in ordered]
        text += f" Against it stand {enumerate_words(counts)}"
        if all(re.search(" below CS ", pair) for pair in wrong):
            text += (
                ": the outermost long skip, which constant scaling leaves as it is, weighs more "
                "there than its share of the sum"
            )
        text += "."
    return [text]


def rank_table(tables: Tables) -> Any:
    """:func:`ranks` as a table."""
    rows = [{**about, "verdict": found.word} for about, found in ranks(tables)]
    if not rows:
        return say(*without_probe("Norms at initialisation follow Σκ²", "scaling_laws"))
    return grid(pd.DataFrame(rows), index=False)
