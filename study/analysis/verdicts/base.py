"""What is a verdict, and which runs does it compare?"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from study.analysis.display import grid
from study.analysis.statistics import Paired, holm, paired
from study.analysis.tables.read import Tables
from study.analysis.words import p_text

REPRODUCED, CONTRADICTED = "reproduced", "not reproduced"
UNTESTABLE = "not testable at this budget"
_SEEDS = ["data_seed", "init_seed", "noise_seed"]
CONVERGED = 10_000_000
"""Networks that have seen fewer images are far from converged: the published trainings of these
systems saw 64 million (U-ViT on CIFAR-10) to 200 million (EDM, STF)."""


@dataclass(frozen=True)
class Verdict:
    """What a study says about a published claim: one word and its reason in numbers."""

    word: str  # "reproduced" | "not reproduced" | "not testable at this budget"
    reason: str
    evidence: Paired | None = None

    def __str__(self) -> str:
        return f"**{self.word.capitalize()}**: {self.reason}"


def verdict(differences: Sequence[float], claim: str, *, positive: bool) -> Verdict:
    """Judge the claim that the paired ``differences`` are positive (or negative).

    Reproduced: the 95 % interval of the mean difference lies on the claimed side of zero. Not
    reproduced: it lies on the other. Not testable at this budget: it holds zero, or there are
    fewer than two pairs.
    """
    result = paired(differences)
    if result.n < 2 or math.isnan(result.p):
        seen = "" if result.n == 0 else f", seen {result.mean:+.3g}"
        reason = f"{claim}: {result.note} (n = {result.n}{seen})."
        return Verdict(UNTESTABLE, reason, result)
    numbers = (
        f"mean difference {result.mean:+.3g} [{result.low:+.3g}, {result.high:+.3g}], "
        f"n = {result.n} pairs, p = {result.p:.2g}"
    )
    if result.low > 0 if positive else result.high < 0:
        return Verdict(REPRODUCED, f"{claim}: {numbers}.", result)
    if result.high < 0 if positive else result.low > 0:
        reason = f"{claim}: the difference has the other sign; {numbers}."
        return Verdict(CONTRADICTED, reason, result)
    reason = (
        f"{claim}: the interval holds zero; {numbers}; a true difference below "
        f"{result.detectable:.3g} would mostly have gone unseen."
    )
    return Verdict(UNTESTABLE, reason, result)


def not_testable(claim: str, why: str) -> Verdict:
    """The verdict of a study that lacks what a claim is about."""
    return Verdict(UNTESTABLE, f"{claim}: {why}.")


def without_probe(claim: str, probe: str) -> list[Verdict]:
    return [not_testable(claim, f"this study does not make the probe {probe}")]


def jointly(
    answers: Iterable[tuple[Mapping[str, str], Verdict]],
) -> Iterator[tuple[dict[str, str], Verdict]]:
    """Verdicts on one claim, say of several backbones, after Holm's correction over their tests.

    A verdict whose corrected p is not below 5 % becomes "not testable at this budget".
    """
    answers = list(answers)
    tests = [math.nan if found.evidence is None else found.evidence.p for _, found in answers]
    for (about, found), p in zip(answers, holm(tests), strict=True):
        word = UNTESTABLE if p >= 0.05 else found.word
        yield {**about, "p (Holm)": p_text(p)}, replace(found, word=word)


def verdicts(rows: Iterable[tuple[Mapping[str, str], Verdict]], factor: bool = False) -> Any:
    """Verdicts as a table: what each row is about, the word, and the numbers behind it.

    With ``factor`` the judged differences are logarithms of ratios and are shown as factors.
    """
    lines = []
    for about, found in rows:
        seen, form = found.evidence, (np.exp if factor else float)
        show_ends = seen is not None and not math.isnan(seen.low)
        lines.append(
            {
                **about,
                "verdict": found.word,
                "factor" if factor else "mean difference": ""
                if seen is None or seen.n == 0
                else f"{form(seen.mean):.3g}",
                "95 % interval": f"[{form(seen.low):.3g}, {form(seen.high):.3g}]"
                if show_ends
                else "",
                "pairs": 0 if seen is None else seen.n,
                "p": "" if seen is None or math.isnan(seen.p) else f"{seen.p:.2g}",
                "remark": "" if seen is None else seen.note,
            }
        )
    return grid(pd.DataFrame(lines), index=False)


def metric_values(tables: Tables, metric: str | None = None) -> pd.Series:
    """Value of a metric (the leading one by default) by run; runs without one are absent.

    However a run was measured: :func:`pairs` holds apart what was measured in unlike ways.
    """
    ways = tables.ways(metric or tables.leading_metric())
    rows = tables.metrics[tables.metrics["metric"].isin(ways)]
    return rows.set_index("run")["value"].dropna()


def final_levels(
    tables: Tables, quantity: str, where: str = "", column: str = "level"
) -> pd.Series:
    """Smoothed level of a logged quantity at the end of training by run, or its ``oscillation``.

    Runs that diverged are absent: they have no end of training.
    """
    rows = tables.oscillation
    rows = rows[(rows["quantity"] == quantity) & (rows["where"] == where)]
    done = set(tables.runs.loc[tables.runs["status"] == "done", "run"])
    return rows[rows["run"].isin(done)].set_index("run")[column].dropna()


def pairs(
    tables: Tables, values: Mapping[str, float], column: str, first: str, second: str
) -> pd.DataFrame:
    """Pairs of runs that differ in ``column`` (``first`` against ``second``) and in nothing else.

    ``values`` maps runs to numbers. Each row holds what the pair shares, both numbers, their
    ``difference`` (first minus second) and ``log_ratio`` (of first to second).
    """
    shared = [name for name in ("line", "skip_scaling", "target", "formulation") if name != column]
    shared += ["precision", *_SEEDS]
    runs = tables.runs.assign(value=tables.runs["run"].map(values)).dropna(subset=["value"])
    if column == "line":  # else both arms have one sampler and precision
        shared.append("way")
        rows = tables.metrics[tables.metrics["metric"].isin(tables.ways(tables.leading_metric()))]
        ways = rows[rows["identity"] != ""].set_index("run")["identity"]
        runs = runs.assign(way=runs["run"].map(ways).fillna(""))
    sides = [
        runs.loc[runs[column] == side, [*shared, "value"]].rename(columns={"value": side})
        for side in (first, second)
    ]
    both = sides[0].merge(sides[1], on=shared).sort_values(shared, ignore_index=True)
    a, b = both[first].to_numpy(dtype=float), both[second].to_numpy(dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(np.where((a > 0) & (b > 0), a / b, np.nan))
    return both.assign(difference=a - b, log_ratio=ratio)


def averaged(both: pd.DataFrame, column: str, lines: list[str] | None = None) -> pd.Series:
    """Mean of a column of :func:`pairs` over the backbones, in every seed that all of them have.

    Runs that share a seed are not independent, so that a seed is one number. Empty where only one
    backbone has pairs. ``lines``: the backbones that are meant; one that lost all of its pairs
    leaves no mean, for without it the mean would look better.
    """
    table = both.pivot_table(index=_SEEDS, columns="line", values=column)
    table = table if lines is None else table.reindex(columns=lines)
    return table.dropna().mean(axis=1) if table.shape[1] > 1 else pd.Series(dtype=float)


def without_option(line: str, option: str) -> str:
    """The line of the same backbone without one option: "uvit(skip=False)" gives "uvit"."""
    found = re.search(r"\(([^)]*)\)", line)
    if not found:
        return line
    kept = ", ".join(part for part in found[1].split(", ") if part != option)
    return line.replace(found[0], f"({kept})" if kept else "")


def unconditional(tables: Tables) -> Tables:
    """The tables of the arms that are told no class, on which targets can be compared."""
    return tables.only(conditional="false")
