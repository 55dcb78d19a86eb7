"""Which rows of ``curves.csv`` lie along one axis, all else being equal?"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd

from study.analysis.names import MetricName, leading

HELD = (
    *("metric", "weights", "sampler", "sampler_steps", "nfe"),
    *("guidance_kind", "guidance_scale", "labels"),
)


@dataclass(frozen=True)
class Axis:
    """A number that quality can be drawn over: a ``column`` of ``curves.csv``.

    Columns of ``HELD`` in ``free`` follow from it; all others are held. ``arms``: it is a property
    of arms, not of how they are measured. ``same`` gives a ``series`` to rows that are one line.
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
    """Rows of one data set and metric that differ along an axis.

    Each has its place ``x`` and its ``series``; its ``line`` does not name the data set. ``label``
    names the protocol, and what tells the setting from others of that protocol: the data set
    wherever the study has several.
    """

    axis: Axis
    protocol: str
    label: str
    rows: pd.DataFrame

    @property
    def dataset(self) -> str:
        return self.rows["dataset"].iloc[0]

    @property
    def metric(self) -> str:
        return self.rows["metric"].iloc[0]

    @property
    def lower(self) -> bool:
        return bool((self.rows["better"] == "lower").all())


def settings(curves: pd.DataFrame, axis: Axis) -> list[Setting]:
    """The settings of a study that have at least two values on an axis, by protocol.

    On the leading metric of each protocol and data set; lines that were measured in another way are
    a setting of their own. Training is followed over its snapshots, by images seen where arms see
    unlike many in a step; everything else is looked at after the last of them. Axes of arms have
    the leading setting of each data set.
    """
    rows = without_dataset(curves[curves["best"] == ""])
    if axis.column != "step":
        rows = rows[rows["last"] == "true"]
    elif (rows["images_seen"] / rows["step"]).dropna().round(6).nunique() > 1:
        axis = replace(axis, column="images_seen", label="images seen in training")
    held = [name for name in HELD if name not in (axis.column, *axis.free)]
    found = []
    for (protocol, dataset), own in rows.groupby(["protocol", "dataset"]):
        groups = _along(own, axis, held)
        unlike = [name for name in held if len({str(part[name].iloc[0]) for part in groups}) > 1]
        about = [str(protocol)]
        about += [f"data set {dataset}"] if curves["dataset"].nunique() > 1 else []
        for part in groups:
            words = [_word(name, part[name].iloc[0]) for name in unlike]
            label = ", ".join([*about, *filter(None, words)])
            found.append(Setting(axis, str(protocol), label, part.sort_values("x")))
    return _first(found, held) if axis.arms else found


def without_dataset(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with lines that do not name the data set, where a study has several."""
    if rows["dataset"].nunique() < 2:
        return rows
    pairs = zip(rows["line"], rows["dataset"], strict=True)
    lines = [line.replace(f" / {name}, ", " / ").removesuffix(f" / {name}") for line, name in pairs]
    return rows.assign(line=lines)


def _along(rows: pd.DataFrame, axis: Axis, held: list[str]) -> list[pd.DataFrame]:
    """The rows of a protocol on a data set that lie along an axis, all else being equal."""
    rows = _placed(_leading(rows), axis).assign(series=rows["skip_scaling"])
    rows = axis.same(rows[rows["x"].notna()])
    groups = [_moving(part, axis) for _, part in rows.groupby(held, dropna=False)]
    return [part for part in groups if len(part)]


def _word(name: str, value: object) -> str:
    """What is held, in words; of metrics it is the way in which one was measured."""
    if name == "metric":
        way = MetricName.parse(str(value)).way
        return f"identity {way}" if way else ""
    return f"{name.replace('_', ' ')} {value}"


def _first(found: list[Setting], held: list[str]) -> list[Setting]:
    """Of each data set the leading setting, in every way in which its lines were measured."""
    order = leading([setting.metric for setting in found], {})
    cell = [name for name in held if name != "metric"]
    chosen: dict[str, tuple] = {}
    answer = []
    for one in sorted(found, key=lambda one: (order.index(one.metric), one.label)):
        key = one.protocol, *map(str, one.rows[cell].iloc[0])
        if chosen.setdefault(one.dataset, key) == key:
            answer.append(one)
    return sorted(answer, key=lambda one: one.dataset)


def _leading(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows on the leading metric, of each line in the first way in which it was measured."""
    counts = rows.groupby("metric")["n"].sum()
    ordered = leading(rows["metric"], counts)
    plain = {name: replace(MetricName.parse(name), way="") for name in ordered}
    ways = [name for name in ordered if plain[name] == plain[ordered[0]]]
    place = rows["metric"].map({name: number for number, name in enumerate(ways)})
    best = place.groupby(rows["line"]).transform("min")
    return rows[place.notna() & (place == best)]


def _placed(rows: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """The rows with their place ``x`` on the axis; no guidance is where it changes nothing."""
    x = rows[axis.column].astype(float)
    if axis.column == "guidance_scale" and x.notna().any():
        x = x.fillna(0.0 if set(rows["guidance_kind"]) <= {"uvit", ""} else 1.0)
    return rows.assign(x=x)


def _moving(rows: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """The rows of those lines that have a series with two values.

    Along a property of arms, of those series alone. Costs are compared across lines: the rows of
    all that have a number, or none.
    """
    known = rows[rows["n"] > 0]
    if axis.column == "macs":
        return rows[rows["line"].isin(known["line"])] if known["x"].nunique() > 1 else rows[:0]
    series = ["line", "target", "series"]
    counts = known.groupby(series)["x"].nunique()
    moving = counts[counts > 1].index
    if axis.arms:
        return rows[pd.MultiIndex.from_frame(rows[series]).isin(moving)]
    return rows[rows["line"].isin(moving.get_level_values("line"))]
