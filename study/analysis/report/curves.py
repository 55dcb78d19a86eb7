"""Where on an axis is each backbone best, and does the order of its arms hold over training?"""

import pandas as pd

from study.analysis import style
from study.analysis.figures.base import thousands
from study.analysis.figures.curves import MOST
from study.analysis.report.study import Study
from study.analysis.tables.axes import OVER, Setting, settings
from study.analysis.words import interval, short

TITLES = {
    "training": "Over training",
    "guidance": "Over guidance",
    "nfe": "Over network evaluations",
    "kappa": "Over the constant of scaling",
    "reference": "Over the reference batch",
    "macs": "Over compute",
}
"""By axis; its figure is ``quality_over_<axis>``."""


def blocks(study: Study) -> dict[str, dict[str, object]]:
    """By figure: the title of its block on the page, and a sentence for each setting in it."""
    answer = {}
    for name, title in TITLES.items():
        found = settings(study.tables.curves, OVER[name])[:MOST]
        say = _over_training if name == "training" else _best_place
        sentences = [say(setting, name, len(found) > 1) for setting in found]
        answer[f"quality_over_{name}"] = {"title": title, "sentences": sentences}
    return answer


def _about(setting: Setting, several: bool) -> str:
    side = "lower" if setting.lower else "higher"
    where = f"{setting.label}, " if several or setting.label != setting.protocol else ""
    return f"By mean {style.metric_label(setting.metric)} ({where}{side} is better)"


def _over_training(setting: Setting, name: str, several: bool) -> str:
    """The best arm of each backbone at its first and last snapshot, and what became of the rest."""
    parts = []
    for line in style.order_lines(setting.rows["line"]):
        rows = setting.rows[(setting.rows["line"] == line) & (setting.rows["n"] > 0)]
        ends = [rows["x"].min(), rows["x"].max()]
        first, last = (_order(rows[rows["x"] == x], setting.lower) for x in ends)
        early, late = (_moment(x, setting.axis.column) for x in ends)
        if first[0] != last[0]:
            text = f"{first[0]} {early}, {last[0]} {late}"
        else:
            text = f"{first[0]} {early} and {late}"
            both = [[arm for arm in one if arm in first and arm in last] for one in (first, last)]
            if len(both[0]) > 2:
                text += (
                    ", the others in another order"
                    if both[0] != both[1]
                    else ", all in the same order"
                )
        parts.append(f"on {style.line_label(line)} {text}")
    return f"{_about(setting, several)}, the best arm is {'; '.join(parts)}."


def _moment(x: float, column: str) -> str:
    """A place in training in words."""
    number = f"{int(x):,}".replace(",", "\N{NO-BREAK SPACE}")
    return f"at step {number}" if column == "step" else f"after {number} images"


def _order(rows: pd.DataFrame, lower: bool) -> list[str]:
    """The arms of one backbone in words, best first."""
    ordered = rows.sort_values(["mean", "arm"], ascending=[lower, True])
    return [_arm(row) for row in ordered.itertuples()]


def _arm(row: object) -> str:
    return f"{style.scaling_label(row.skip_scaling)} with {style.target_label(row.target)}"


def _best_place(setting: Setting, name: str, several: bool) -> str:
    """The best mean of each backbone, and where on the axis it lies."""
    parts = []
    for line in style.order_lines(setting.rows["line"]):
        rows = setting.rows[(setting.rows["line"] == line) & (setting.rows["n"] > 0)]
        row = next(rows.sort_values("mean", ascending=setting.lower).itertuples())
        mean = f"{short(row.mean)} {interval(row.ci_low, row.ci_high, row.mean)}".strip()
        where = f"{_arm(row)}, n = {row.n}"
        parts.append(f"{style.line_label(line)} {mean} at {thousands(row.x)} ({where})")
    return f"{_about(setting, several)}, best over {OVER[name].label}: {'; '.join(parts)}."
