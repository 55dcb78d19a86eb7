"""Which rows of ``curves.csv`` lie along one axis, all else being equal?"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd

from study.analysis.names import MetricName, leading

CELL = ("weights", "sampler", "sampler_steps", "nfe", "guidance_kind", "guidance_scale", "labels")


@dataclass(frozen=True)
class Axis:
    """A number that quality can be drawn over: a ``column`` of ``curves.csv``.

    Columns of a cell in ``free`` follow from it; all others are held. ``arms``: it is a property of
    arms, not of how they are measured. ``same`` gives a ``series`` to rows that are one line.
    """

    column: str
    label: str
    free: tuple[str, ...] = ()
    arms: bool = False
    same: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows


def _constants(rows: pd.DataFrame) -> pd.DataFrame:
    """Constant scalings that differ in kappa alone are one series, and so is no scaling."""
    series = rows["skip_scaling"].str.replace(r"\([\d.e+-]+", "(", regex=True)
    kinds = sorted(set(series) - {"none"})
    unscaled = rows["skip_scaling"] == "none"
    parts = [rows[~unscaled].assign(series=series[~unscaled])]
    parts += [rows[unscaled].assign(series=kind) for kind in kinds]
    return pd.concat(parts) if kinds else rows.assign(series=series)


def _references(rows: pd.DataFrame) -> pd.DataFrame:
    """Sizes of the reference are one line: whatever names the size is taken off."""
    pattern = r"(?: / |, )?target\.reference=\d+"
    return rows.assign(line=rows["line"].str.replace(pattern, "", regex=True))


OVER = {
    "training": Axis("step", "training step"),
    "guidance": Axis("guidance_scale", "guidance scale", ("guidance_kind", "nfe")),
    "nfe": Axis("nfe", "network evaluations per image", ("sampler_steps",)),
    "kappa": Axis("kappa", "κ of constant scaling (none: 1)", ("nfe",), True, _constants),
    "reference": Axis(
        "reference_batch", "images in the reference batch", ("nfe",), True, _references
    ),
    "macs": Axis("macs", "multiply-adds per image", ("nfe",), True),
}


@dataclass(frozen=True)
class Setting:
    """Rows that differ along an axis, each with its place ``x`` and its ``series``.

    ``label`` names the protocol, and what tells the setting from others of that protocol.
    """

    axis: Axis
    protocol: str
    label: str
    metric: str
    rows: pd.DataFrame

    @property
    def lower(self) -> bool:
        return bool((self.rows["better"] == "lower").all())


def settings(curves: pd.DataFrame, axis: Axis) -> list[Setting]:
    """The settings of a study that have at least two values on an axis, by protocol.

    On the leading metric of each protocol. Training is followed over its snapshots, by images seen
    where arms see unlike many in a step; everything else is looked at after the last of them. Axes
    of arms have one setting, the leading one.
    """
    rows = curves[curves["best"] == ""]
    if axis.column != "step":
        rows = rows[rows["last"] == "true"]
    elif (rows["images_seen"] / rows["step"]).dropna().round(6).nunique() > 1:
        axis = replace(axis, column="images_seen", label="images seen in training")
    found = []
    for protocol, own in rows.groupby("protocol"):
        metric, own = _leading(own)
        own = _placed(own, axis).assign(series=own["skip_scaling"])
        own = axis.same(own[own["x"].notna()])
        held = [name for name in CELL if name not in (axis.column, *axis.free)]
        groups = [_moving(part, axis) for _, part in own.groupby(held, dropna=False)]
        groups = [part for part in groups if len(part)]
        unlike = [name for name in held if len({str(part[name].iloc[0]) for part in groups}) > 1]
        for part in groups:
            words = [f"{name.replace('_', ' ')} {part[name].iloc[0]}" for name in unlike]
            label = ", ".join([str(protocol), *words])
            found.append(Setting(axis, str(protocol), label, metric, part.sort_values("x")))
    if axis.arms and found:
        order = leading([setting.metric for setting in found], {})
        found = sorted(found, key=lambda one: (order.index(one.metric), one.label))[:1]
    return found


def _leading(rows: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The leading metric of a protocol's rows, and each line's rows in its first way of that."""
    counts = rows.groupby("metric")["n"].sum()
    ordered = leading(rows["metric"], counts)
    plain = {name: replace(MetricName.parse(name), way="") for name in ordered}
    ways = [name for name in ordered if plain[name] == plain[ordered[0]]]
    place = rows["metric"].map({name: number for number, name in enumerate(ways)})
    best = place.groupby(rows["line"]).transform("min")
    return ordered[0], rows[place.notna() & (place == best)]


def _placed(rows: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """The rows with their place ``x`` on the axis; no guidance is where it changes nothing."""
    x = rows[axis.column].astype(float)
    if axis.column == "guidance_scale" and x.notna().any():
        x = x.fillna(0.0 if set(rows["guidance_kind"]) <= {"uvit", ""} else 1.0)
    return rows.assign(x=x)


def _moving(rows: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """The rows of those lines that have a series with two values.

    Costs are compared across lines: the rows of all that have a number, or none.
    """
    known = rows[rows["n"] > 0]
    if axis.column == "macs":
        return rows[rows["line"].isin(known["line"])] if known["x"].nunique() > 1 else rows[:0]
    counts = known.groupby(["line", "target", "series"])["x"].nunique()
    return rows[rows["line"].isin(counts[counts > 1].reset_index()["line"])]
