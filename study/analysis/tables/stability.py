"""Is an arm more stable than those it is judged by?

Rows of ``stability.csv`` and ``stability_pairs.csv``. A scaled arm is compared with the unscaled
arm of the same backbone and target (the effect of the scaling), a stable-target arm with the DSM
arm of the same backbone and scaling (the effect of the target), always over runs that share all
seeds.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import statistics
from study.analysis.names import ALL
from study.analysis.tables.families import correct
from study.analysis.tables.measures import (
    DIVERGED,
    EVERY_RATE,
    MEASURES,
    NO_RATE,
    SPACING,
    Measure,
    Row,
)
from study.files import canonical_json

BLIND = (
    "no verdict: these arms are told the class, and the published stable target, which averages "
    "over all classes, is biased for them"
)
"""Why a stable-target arm that is class-conditional is not judged against a DSM arm."""


_WORDS = ("more stable", "less stable")


def stability_rows(
    measures: Sequence[Row], specs: Mapping[str, Row], seeds: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows of ``stability.csv``: every arm and measure, against each arm it is judged by.

    ``specs`` holds a resolved spec per arm, ``seeds`` a text per run that is equal where all
    seeds are. ``against`` is "none" for the unscaled arm that equals the arm in all else, "dsm"
    for the DSM arm that does, and empty for an arm that has neither. Holm's correction spans one
    question: the tests of one measure on one backbone against one of the two.
    """
    answer = []
    for measure, rows, others, unscaled in _contests(measures, specs):
        level = {**rows[0], "note": "", "verdict": "", **_level(rows, measure)}
        for against, theirs in others.items():
            result = _compare(rows, theirs, seeds, measure)
            if blind(specs[rows[0]["arm"]], specs[theirs[0]["arm"]]):
                result |= unjudged(result["note"])
            baseline = theirs[0]["arm"]
            answer.append({**level, "against": against, "baseline": baseline, **result})
        if not others:
            note = "" if unscaled else "no unscaled arm to compare with"
            answer.append({**level, "against": "", "baseline": "", "note": note})
    compared = [row for row in answer if row["against"]]
    correct(compared, "measure", "line", "against", words=_WORDS)
    return answer


def pair_rows(
    measures: Sequence[Row], specs: Mapping[str, Row], seeds: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows of ``stability_pairs.csv``: every pair of runs behind the t-tests of ``stability.csv``.

    ``factor`` is the run's value over that of ``baseline_run``. A pair that cannot be compared has
    none, and a note that says why: it counts as lost, not as absent. Arms that are not judged
    (:func:`blind`) have no pairs.
    """
    answer = []
    for measure, rows, others, _ in _contests(measures, specs):
        if measure.test != "t":
            continue
        for against, theirs in others.items():
            if blind(specs[rows[0]["arm"]], specs[theirs[0]["arm"]]):
                continue
            for one, other, why in _pairs(rows, theirs, seeds):
                answer.append(
                    {
                        **one,
                        "against": against,
                        "baseline": other["arm"],
                        "baseline_run": other["run"],
                        "seeds": seeds[one["run"]],
                        "factor": None if why else one["value"] / other["value"],
                        "note": why,
                    }
                )
    return answer


def overall(pairs: pd.DataFrame) -> pd.DataFrame:
    """Every scaling and target over all backbones: is there an effect on average?

    ``pairs`` has the columns of ``stability_pairs.csv``; the answer those of ``stability.csv`` that
    speak of comparisons, ``line`` being :data:`ALL`, ``n_backbones``, and in ``setting`` what else
    tells arms apart (a formulation, a reference size). An arm that a single backbone has is left
    out. A seed gives one number, the geometric mean of its factors over the backbones that have
    the arm, and counts where none of them lost its pair: no backbone drops out of the mean in one
    seed and not in another, and runs that share their seed are not taken for independent ones.
    Holm's correction spans the arms of one measure and ``against``. Backbones are those of the
    study, not a sample of all.
    """
    answer: list[dict[str, Any]] = []
    words = ["measure", "against", "skip_scaling", "target", "formulation", "variant"]
    several = pairs["formulation"].nunique() > 1
    for key, group in pairs.groupby(words, sort=False, dropna=False):
        table = group.pivot(index="seeds", columns="baseline", values="factor").astype(float)
        if table.shape[1] < 2:
            continue
        whole = table.dropna()
        lost = len(table) - len(whole)
        result = _ratios(np.log(whole.to_numpy()).mean(axis=1).tolist())
        notes = [result["note"]] if result["note"] else []
        notes += [f"{lost} seed{'s' if lost > 1 else ''} left out: a pair was lost"] if lost else []
        answer.append(
            {
                **dict(zip(words, key, strict=True)),
                **result,
                "line": ALL,
                "setting": ", ".join([key[4]] * several + [key[5]] * bool(key[5])),
                "better": MEASURES[key[0]].better,
                "n_backbones": table.shape[1],
                "n_pairs": len(whole),
                "note": "; ".join(notes),
            }
        )
    correct(answer, "measure", "against", words=_WORDS)
    return pd.DataFrame(answer, columns=None if answer else _OVERALL)


_OVERALL = [
    *("measure", "against", "skip_scaling", "target", "formulation", "variant", "setting"),
    *("line", "better", "n_backbones", "n_pairs", "note"),
    *("factor", "factor_low", "factor_high", "p_value", "p_holm", "detectable_factor", "verdict"),
]


def _contests(
    measures: Sequence[Row], specs: Mapping[str, Row]
) -> Iterator[tuple[Measure, list[Row], dict[str, list[Row]], bool]]:
    """Every measure and arm: its rows, those of the arms it is judged by, is there an unscaled one.

    The latter are by "none" (the unscaled arm) and "dsm" (the DSM arm), where it is not the arm.
    """
    twins = {
        "none": {
            _rest(spec, "skip_scaling"): arm
            for arm, spec in sorted(specs.items())
            if spec["skip_scaling"].get("method") == "none"
        },
        "dsm": {
            _rest(spec, "target"): arm
            for arm, spec in sorted(specs.items())
            if spec["target"].get("kind") == "dsm"
        },
    }
    part = {"none": "skip_scaling", "dsm": "target"}
    by_arm: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in measures:
        by_arm[row["measure"], row["arm"]].append(row)
    place = list(MEASURES)
    for name, arm in sorted(by_arm, key=lambda key: (place.index(key[0]), key[1])):
        measure = MEASURES[name]
        own = {
            against: arms.get(_rest(specs[arm], part[against])) for against, arms in twins.items()
        }
        others = {
            against: by_arm[name, twin]
            for against, twin in own.items()
            if twin not in (None, arm) and (against == "none" or measure.across_targets)
        }
        yield measure, by_arm[name, arm], others, own["none"] is not None


def blind(spec: Row, other: Row) -> bool:
    """Whether two arms differ in the target and are class-conditional: see :data:`BLIND`."""
    unlike = spec["target"].get("kind") != other["target"].get("kind")
    return unlike and any(one.get("training", {}).get("conditional") for one in (spec, other))


def unjudged(note: str) -> dict[str, Any]:
    """What takes the place of a test that would say something else than it seems to."""
    return {
        "test": "",
        "p_value": math.nan,
        "detectable_factor": math.nan,
        "note": "; ".join(filter(None, [BLIND, note])),
    }


def _rest(spec: Row, part: str) -> str:
    """What two arms share that differ in ``part`` alone."""
    return canonical_json({k: v for k, v in spec.items() if k not in ("seeds", part)})


def _level(rows: Sequence[Row], measure: Measure) -> dict[str, Any]:
    values = [row["value"] for row in rows if row["value"] is not None]
    if measure.ratio:
        mean = statistics.geometric_mean(values)
    else:
        mean = float(np.mean(values)) if values else math.nan
    low = high = math.nan
    if measure.test == "t":
        low, high = statistics.geometric_interval(values)
    return {
        "n": len(values),
        "mean": mean,
        "mean_low": low,
        "mean_high": high,
        "n_runs": len(rows),
        "n_diverged": sum(row["status"] == "diverged" for row in rows),
        "n_missing": sum(row["status"] in ("missing", "running") for row in rows),
    }


def _compare(
    rows: Sequence[Row], others: Sequence[Row], seeds: Mapping[str, str], measure: Measure
) -> dict[str, Any]:
    if not measure.ratio:
        return _compare_counts(rows, others)
    whole, lost = [], Counter()
    for one, other, why in _pairs(rows, others, seeds):
        if why:
            lost[why] += 1
        else:
            whole.append((one, other))
    logs = [math.log(a["value"] / b["value"]) for a, b in whole]
    result = (_signs if measure.test == "sign" else _ratios)(logs)
    notes = [result["note"]] if result["note"] and (whole or not lost) else []
    notes += [f"{n} pair{'s' if n > 1 else ''} left out: {why}" for why, n in sorted(lost.items())]
    notes += _censored(whole)
    return {
        **result,
        "n_pairs": len(whole),
        "n_diverged_pairs": lost["diverged"],
        "note": "; ".join(notes),
    }


def _pairs(
    rows: Sequence[Row], others: Sequence[Row], seeds: Mapping[str, str]
) -> Iterator[tuple[Row, Row, str]]:
    """Runs of two arms with equal seeds, and why they cannot be compared; empty where they can."""
    theirs = {seeds[row["run"]]: row for row in others}
    for one in rows:
        other = theirs.get(seeds[one["run"]])
        if other is None:
            continue
        reasons = {_why(row) for row in (one, other) if row["value"] is None}
        apart = [row["spacing"] for row in (one, other) if row.get("spacing")]
        if len(apart) == 2 and not math.isclose(*apart, rel_tol=SPACING):
            reasons.add("curves logged at unlike steps")
        yield one, other, "diverged" if "diverged" in reasons else min(reasons, default="")


def _why(row: Row) -> str:
    """Why a run has no value, in words that runs share."""
    if row["status"] == "diverged" and row["note"].startswith(DIVERGED):
        return "diverged"
    return row["note"] or row["status"]


def _ratios(logs: Sequence[float]) -> dict[str, Any]:
    """Geometric mean of the ratios with its interval, and a t-test of their logarithms."""
    result = statistics.paired_factor(logs)
    return {
        "test": "paired t-test of log ratios" if math.isfinite(result.p) else "",
        "factor": result.mean,
        "factor_low": result.low,
        "factor_high": result.high,
        "p_value": result.p,
        "detectable_factor": result.detectable,
        "note": result.note,
        "_side": math.log(result.mean) if logs else math.nan,
    }


def _signs(logs: Sequence[float]) -> dict[str, Any]:
    """Geometric mean of the ratios, as a description, and a sign test of which side is larger.

    Values of a grid make a t-test certain of differences that are one step wide. Fewer pairs than
    could ever show something are not tested.
    """
    larger, smaller = sum(log > 0 for log in logs), sum(log < 0 for log in logs)
    least = statistics.least_pairs()
    p = statistics.sign_test(larger, smaller) if larger + smaller >= least else math.nan
    note = f"larger in {larger}, smaller in {smaller}, equal in {len(logs) - larger - smaller}"
    if math.isnan(p):
        note += f": no sign test is possible, p < 0.05 needs {least} unequal pairs that agree"
    return {
        "test": "sign test" if math.isfinite(p) else "",
        "factor": statistics.geometric_mean(np.exp(logs)),
        "factor_low": None,
        "factor_high": None,
        "p_value": p,
        "detectable_factor": None,
        "note": note if logs else statistics.paired(logs).note,
        "_side": float(larger - smaller),
    }


def _censored(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """What the ends of the rates tried hide, on either side of the pairs."""
    notes, sides = [], set()
    for words, higher in ((EVERY_RATE, 0), (NO_RATE, 1)):
        counts = [sum(pair[i]["note"].startswith(words) for pair in pairs) for i in (0, 1)]
        # The side whose true rate is further out than the one that was entered.
        sides |= {("lower", "upper")[i ^ higher] for i in (0, 1) if counts[i]}
        if any(counts):
            notes.append(
                f"{words.partition(':')[0]}: {counts[0]} of {len(pairs)} runs of this arm and "
                f"{counts[1]} of {len(pairs)} of the other"
            )
    if notes:
        bound = {"lower": "a lower bound", "upper": "an upper bound"}
        notes[-1] += f", so the factor is {bound[sides.pop()] if len(sides) == 1 else 'no bound'}"
    return notes


def _compare_counts(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, Any]:
    """Diverged runs of two arms; seeds are not paired here, as counts of ended runs are."""
    ours, theirs = ([r["value"] for r in side if r["value"] is not None] for side in (rows, others))
    first, runs, second, more = int(sum(ours)), len(ours), int(sum(theirs)), len(theirs)
    p, notes = math.nan, [f"{first} of {runs} against {second} of {more}"]
    if min(runs, more) < 2:
        notes.append("fewer than two runs: no test is possible")
    elif first + second in (0, runs + more):
        notes.append("all runs of both arms ended alike: nothing to test")
    else:
        p = statistics.fisher(first, runs, second, more)
    least = statistics.least_count(runs, more) if min(runs, more) > 1 else None
    if min(runs, more) > 1:
        notes.append(
            f"{least} of {runs} against none would be seen"
            if least
            else "so few runs could show no difference"
        )
    return {
        "n_pairs": None,
        "n_diverged_pairs": None,
        "test": "Fisher's exact test" if math.isfinite(p) else "",
        "factor": None,
        "factor_low": None,
        "factor_high": None,
        "p_value": p,
        "detectable_factor": None,
        "note": "; ".join(notes),
        "_side": first / runs - second / more if runs and more else math.nan,
    }
