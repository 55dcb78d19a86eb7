"""Stability as numbers: one per run and measure, and every arm beside the arms it is judged by.

A scaled arm is compared with the unscaled arm of the same backbone and target (the effect of the
scaling), a stable-target arm with the DSM arm of the same backbone and scaling (the effect of the
target), always over runs that share all seeds.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import statistics
from study.files import canonical_json

Row = Mapping[str, Any]
Found = dict[str, tuple[float | None, str]]
"""By run: the value of a measure, or None, and a remark."""


@dataclass(frozen=True)
class Measure:
    """A number of a run that says how stable it is.

    ``better`` is the side on which the more stable runs lie. ``label`` names the measure in
    pictures and sentences, ``words`` define it. ``test`` judges two arms: a paired t-test of log
    ratios ("t"), a sign test over pairs where only a grid of values can occur ("sign"), or Fisher's
    exact test of counts of runs ("fisher"). ``across_targets``: arms with unlike targets can be
    compared.
    """

    name: str
    better: str
    label: str
    words: str
    test: str = "t"
    across_targets: bool = True

    @property
    def ratio(self) -> bool:
        """Whether it is a positive number, compared by ratios, and not a count of runs."""
        return self.test != "fisher"


_WINDOW = "over the last quarter of training, 500 steps at most"
_BLOCK = "the output of the decoder block that takes the outermost long skip"
_WOBBLE = f"standard deviation about a straight line through the curve {_WINDOW}, over its level"
_GAIN = (
    "length of the change over the length of a small perturbation of the input, at the smallest "
    "size tried, geometric mean over noise levels"
)
MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "feature_norm",
            "lower",
            "feature norm",
            f"L2 norm of {_BLOCK}, mean over samples and {_WINDOW}; smaller counts as more "
            "stable because ScaleLong argues so",
        ),
        Measure(
            "oscillation_feature_norm",
            "lower",
            "oscillation of the feature norm",
            f"the same norm's {_WOBBLE}",
        ),
        Measure(
            "oscillation_loss",
            "lower",
            "oscillation of the loss",
            f"its {_WOBBLE}; losses against unlike targets are not compared, because the plain "
            "target's own variance raises their level",
            across_targets=False,
        ),
        Measure(
            "oscillation_grad_norm",
            "lower",
            "oscillation of the gradient norm",
            f"its {_WOBBLE}",
        ),
        Measure(
            "robustness_gain",
            "lower",
            "sensitivity of the noise prediction",
            f"in the noise that a trained network predicts: {_GAIN}",
        ),
        Measure(
            "network_gain",
            "lower",
            "sensitivity of the raw network",
            f"in the raw output of the trained network, at its own input: {_GAIN}",
        ),
        Measure(
            "largest_learning_rate",
            "higher",
            "largest learning rate that trains",
            "the end of the first stretch of rates that trained in short trainings, smaller ones "
            "that learned too slowly left aside; a run that trained at no rate counts as half the "
            "smallest; only whole steps between the rates tried can be seen, so pairs are counted "
            "(sign test) and there is no interval",
            test="sign",
        ),
        Measure(
            "diverged",
            "lower",
            "runs that diverged",
            "runs whose training diverged, of those that ended",
            test="fisher",
        ),
    )
}
# Measures that are read off the end of a training curve: quantity, where, column.
_CURVES = {
    "feature_norm": ("decoder_norm_after", "1", "level"),
    "oscillation_feature_norm": ("decoder_norm_after", "1", "oscillation"),
    "oscillation_loss": ("loss", "", "oscillation"),
    "oscillation_grad_norm": ("grad_norm", "", "oscillation"),
}
_GAINS = {"robustness_gain": "noise", "network_gain": "network"}
BLIND = (
    "no verdict: these arms are told the class, and the published stable target, which averages "
    "over all classes, is biased for them"
)
"""Why a stable-target arm that is class-conditional is not judged against a DSM arm."""
_DIVERGED = "training diverged"
_EVERY_RATE = "trained up to the largest rate tried: the limit may be higher"
_NO_RATE = "trained at no rate tried"
_SPLITS = "several networks trained one after another: their training has no common end"
ALL = "all"
"""Stands for a backbone where a number is a mean over all of them."""
# Oscillations are comparable where steps between logged points agree up to a lost point.
_SPACING = 0.05


# --- one number per run and measure ---------------------------------------------------------------


def measure_rows(
    runs: Sequence[Row],
    oscillation: Iterable[Row],
    probes: Mapping[str, pd.DataFrame],
    imported: Collection[str] = (),
    split: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Rows of ``measures.csv``: every run has a row for every measure that the study has.

    ``runs`` are rows of ``runs.csv``, ``oscillation`` those of ``oscillation.csv``; ``imported``
    names runs whose weights were not trained here, ``split`` those of several networks, whose
    curves end with the last network only. A run that diverged has no end of training and no
    trained network; its row says so and has no value. Rows of oscillations have a further key
    ``spacing``: the steps between two logged points.
    """
    oscillation = list(oscillation)
    found = _curve_values(runs, oscillation, split)
    apart = {(row["run"], row["quantity"], row["where"]): spacing(row) for row in oscillation}
    found |= {name: _gains(probes, space) for name, space in _GAINS.items()}
    found["largest_learning_rate"] = _largest_rates(probes)
    found["diverged"] = {
        row["run"]: (None, "imported, not trained here")
        if row["run"] in imported
        else (float(row["status"] == "diverged"), "")
        for row in runs
        if row["status"] in ("done", "diverged")
    }
    answer = []
    for measure in MEASURES.values():
        values = found[measure.name]
        quantity, where, column = _CURVES.get(measure.name, ("", "", ""))
        if all(value is None for value, _ in values.values()):
            continue
        for row in runs:
            value, note = values.get(row["run"], (None, ""))
            if value is None and row["status"] == "diverged":
                note = note or f"{_DIVERGED} at step {row['step']}"
            elif value is None and row["status"] == "done":
                note = note or "not measured"
            answer.append(
                {
                    **row,
                    "measure": measure.name,
                    "value": value,
                    "better": measure.better,
                    "note": note,
                    "spacing": apart.get((row["run"], quantity, where))
                    if column == "oscillation"
                    else None,
                }
            )
    return answer


def spacing(row: Row) -> float:
    """Steps between two points of a logged curve, from a row of ``oscillation.csv``.

    A logged loss is the mean since the point before: the wider the steps, the less it oscillates.
    """
    return (row["window_last_step"] - row["window_first_step"]) / (row["points"] - 1)


def spacings(rows: Iterable[Row]) -> list[float]:
    """The step spacings of curves that differ by more than a lost point, in rising order."""
    answer: list[float] = []
    for value in sorted(spacing(row) for row in rows):
        if not answer or not math.isclose(value, answer[-1], rel_tol=_SPACING):
            answer.append(value)
    return answer


def _curve_values(
    runs: Sequence[Row], oscillation: Iterable[Row], split: Collection[str]
) -> dict[str, Found]:
    ended = {row["run"] for row in runs if row["status"] == "done"}
    curves = {
        (row["run"], row["quantity"], row["where"]): row
        for row in oscillation
        if row["run"] in ended
    }
    answer: dict[str, Found] = {name: {} for name in _CURVES}
    for name, (quantity, where, column) in _CURVES.items():
        for run in sorted(ended):
            row = curves.get((run, quantity, where))
            if run in split:
                answer[name][run] = (None, _SPLITS)
            elif row is not None:
                answer[name][run] = _positive(row[column])
    return answer


def _positive(value: Any) -> tuple[float | None, str]:
    """The value if a ratio can be made of it."""
    if value is None or pd.isna(value):
        return None, ""
    if not (math.isfinite(value) and value > 0):
        return None, f"{value:g} is no positive number"
    return float(value), ""


def _gains(probes: Mapping[str, pd.DataFrame], space: str) -> Found:
    """Geometric mean over noise levels of the gain at the smallest perturbation, by run."""
    frame = probes.get("robustness", pd.DataFrame())
    if frame.empty:
        return {}
    answer: Found = {}
    for run, rows in frame[frame["space"] == space].groupby("run"):
        gains = rows.loc[rows["relative"] == rows["relative"].min(), "gain"].to_numpy(dtype=float)
        if np.isfinite(gains).all() and (gains > 0).all():
            answer[run] = (statistics.geometric_mean(gains), "")
        else:
            answer[run] = (None, "a gain is not a positive number")
    return answer


def _largest_rates(probes: Mapping[str, pd.DataFrame]) -> Found:
    frame = probes.get("stability_frontier", pd.DataFrame())
    if frame.empty:
        return {}
    answer: Found = {}
    for run, rows in frame.groupby("run"):
        rate, note = largest_rate(rows)
        # To leave such a run out would favour its arm: its rate is known to be the lowest of all.
        answer[run] = (rows["lr"].min() / 2 if rate is None else rate, note)
    return answer


def largest_rate(rows: pd.DataFrame) -> tuple[float | None, str]:
    """The end of the first stretch of learning rates that trained, and a remark.

    ``rows`` has columns ``lr`` and ``outcome``. Rates that stalled below the first that trained
    were too small to learn in so few steps, and say nothing about a limit. None where none
    trained, or where a smaller rate than the first that did diverged.
    """
    outcomes = rows.groupby("lr")["outcome"].agg(set).sort_index()
    rates = [float(rate) for rate in outcomes.index]
    trained = [found == {"trained"} for found in outcomes]
    slow = next((i for i, found in enumerate(outcomes) if found != {"stalled"}), len(rates))
    if slow == len(rates) or not trained[slow]:
        return None, f"{_NO_RATE}, from {rates[0]:g} on"
    end = next((i for i in range(slow, len(rates)) if not trained[i]), len(rates)) - 1
    return rates[end], _EVERY_RATE if end == len(rates) - 1 else ""


# --- arms against arms ----------------------------------------------------------------------------


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
    _correct(answer, ("measure", "line", "against"))
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
    _correct(answer, ("measure", "against"))
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
        if len(apart) == 2 and not math.isclose(*apart, rel_tol=_SPACING):
            reasons.add("curves logged at unlike steps")
        yield one, other, "diverged" if "diverged" in reasons else min(reasons, default="")


def _why(row: Row) -> str:
    """Why a run has no value, in words that runs share."""
    if row["status"] == "diverged" and row["note"].startswith(_DIVERGED):
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
    for words, higher in ((_EVERY_RATE, 0), (_NO_RATE, 1)):
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


def _correct(rows: list[dict[str, Any]], question: Sequence[str]) -> None:
    """Add Holm's p, the number of tests behind it and the verdict to compared rows, in place.

    Rows that agree in the columns ``question`` are the tests of one family.
    """
    families: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["against"]:
            families[tuple(row[name] for name in question)].append(row)
    for family in families.values():
        adjusted = statistics.holm([row["p_value"] for row in family])
        tests = sum(math.isfinite(p) for p in adjusted)
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"], row["tests_in_family"] = p, tests
            row["verdict"] = _verdict(row.pop("_side"), p, row["better"])


def _verdict(side: float, p_holm: float, better: str) -> str:
    """``side`` is below zero where the arm's measure is lower than that of its twin."""
    if not math.isfinite(p_holm):
        return "no test"
    if p_holm >= 1 - statistics.LEVEL:
        return "no difference shown"
    return "more stable" if (side < 0) == (better == "lower") else "less stable"
