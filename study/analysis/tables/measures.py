"""How stable is every run? Rows of ``measures.csv``: a number per run and measure."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import statistics

Row = Mapping[str, Any]
Values = dict[str, tuple[float | None, str]]
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
DIVERGED = "training diverged"
EVERY_RATE = "trained up to the largest rate tried: the limit may be higher"
NO_RATE = "trained at no rate tried"
SPLITS = "several networks trained one after another: their training has no common end"
# Oscillations are comparable where steps between logged points agree up to a lost point.
SPACING = 0.05


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
                note = note or f"{DIVERGED} at step {row['step']}"
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
        if not answer or not math.isclose(value, answer[-1], rel_tol=SPACING):
            answer.append(value)
    return answer


def _curve_values(
    runs: Sequence[Row], oscillation: Iterable[Row], split: Collection[str]
) -> dict[str, Values]:
    ended = {row["run"] for row in runs if row["status"] == "done"}
    curves = {
        (row["run"], row["quantity"], row["where"]): row
        for row in oscillation
        if row["run"] in ended
    }
    answer: dict[str, Values] = {name: {} for name in _CURVES}
    for name, (quantity, where, column) in _CURVES.items():
        for run in sorted(ended):
            row = curves.get((run, quantity, where))
            if run in split:
                answer[name][run] = (None, SPLITS)
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


def _gains(probes: Mapping[str, pd.DataFrame], space: str) -> Values:
    """Geometric mean over noise levels of the gain at the smallest perturbation, by run."""
    frame = probes.get("robustness", pd.DataFrame())
    if frame.empty:
        return {}
    answer: Values = {}
    for run, rows in frame[frame["space"] == space].groupby("run"):
        gains = rows.loc[rows["relative"] == rows["relative"].min(), "gain"].to_numpy(dtype=float)
        if np.isfinite(gains).all() and (gains > 0).all():
            answer[run] = (statistics.geometric_mean(gains), "")
        else:
            answer[run] = (None, "a gain is not a positive number")
    return answer


def _largest_rates(probes: Mapping[str, pd.DataFrame]) -> Values:
    frame = probes.get("stability_frontier", pd.DataFrame())
    if frame.empty:
        return {}
    answer: Values = {}
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
        return None, f"{NO_RATE}, from {rates[0]:g} on"
    end = next((i for i in range(slow, len(rates)) if not trained[i]), len(rates)) - 1
    return rates[end], EVERY_RATE if end == len(rates) - 1 else ""
