"""Does the order of the arms hold over training, guidance, sampling, scale and compute?"""

import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.analysis import style
from study.analysis.figures.base import (
    arm_legend,
    drawn,
    empty_panel,
    line_grid,
    line_style,
    made_of,
    panel_grid,
    plain_log_axis,
    text_figure,
    thousands,
)
from study.analysis.tables.axes import OVER, Setting, settings, without_dataset
from study.analysis.tables.read import Tables
from study.analysis.words import count, enumerate_words

MOST = 4
"""Settings in one figure; those of further ones stand in the table."""

BAND = "Mean over training seeds; band: 95 % bootstrap interval of the mean (n > 1)."
LOST = (
    "A cross: the last mean before runs of the arm diverged; what follows is the mean of those "
    "that are left."
)


def has(axis: str) -> Callable[[Tables], bool]:
    """Whether a study has several values on an axis."""
    return lambda tables: bool(settings(tables.curves, OVER[axis]))


@drawn("curves", where=has("training"))
def quality_over_training(tables: Tables) -> Figure:
    """Quality over training, arm by arm, at every snapshot that a protocol measures."""
    return _lines(tables, "training", "Quality over training", f"{BAND} {LOST}")


@drawn("curves", where=has("guidance"))
def quality_over_guidance(tables: Tables) -> Figure:
    """Quality over the scale of classifier-free guidance, after the last snapshot."""
    return _lines(
        tables,
        "guidance",
        "Quality over guidance",
        f"{BAND} No guidance is drawn where it acts "
        "as its scale would: at 0 for U-ViT's kind and at 1 for the others.",
    )


@drawn("curves", where=has("nfe"))
def quality_over_nfe(tables: Tables) -> Figure:
    """Quality over the network evaluations that an image takes, after the last snapshot."""
    return _lines(tables, "nfe", "Quality over network evaluations", BAND)


@drawn("curves", where=has("kappa"))
def quality_over_kappa(tables: Tables) -> Figure:
    """Quality over the constant that scales long skips, after the last snapshot."""
    more = f"{BAND} No scaling stands at κ = 1, which it is."
    return _lines(tables, "kappa", "Quality over the constant of scaling", more)


@drawn("curves", where=has("reference"))
def quality_over_reference(tables: Tables) -> Figure:
    """Quality over the size of the stable target's reference batch, after the last snapshot."""
    more = f"{BAND} Level lines: the plain target (DSM), which has no reference batch."
    return _lines(tables, "reference", "Quality over the reference batch", more)


@drawn("curves", where=has("macs"))
def quality_over_macs(tables: Tables) -> Figure:
    """Quality against the multiply-adds of a network evaluation, with the frontier."""
    found = settings(tables.curves, OVER["macs"])[:MOST]
    title = "Quality over compute"
    if not found:
        return text_figure(title, _too_few("macs"), made_of(tables))
    fig = style.figure(height=3.1)
    style.footer(
        fig,
        made_of(
            tables,
            more=f"{_measured(found)} Mean over training seeds, bars: "
            "95 % bootstrap interval of the mean (n > 1). The grey step is the best mean up to "
            "that cost.",
        ),
    )
    rows = pd.concat([setting.rows[setting.rows["n"] > 0] for setting in found])
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    runs = without_dataset(tables.runs)
    families = runs.drop_duplicates("line").set_index("line")["family"].to_dict()
    marks = style.markers(families, families)
    for axes, setting in zip(panel_grid(fig, len(found), len(found)), found, strict=True):
        _draw_costs(axes, setting, colours, marks)
        axes.set_title(textwrap.fill(setting.label, 32) if _labelled(setting, found) else "")
    handles = [
        Line2D([], [], color=colours[one], lw=2, label=style.scaling_label(one))
        for one in style.order_scalings(rows["skip_scaling"])
    ]
    look = {"ls": "", "color": "#555", "ms": 4.5}
    handles += [
        Line2D([], [], marker=marks[line], label=style.line_label(line), **look)
        for line in style.order_lines(rows["line"])
    ]
    if (rows["target"] != "dsm").any():
        handles.append(Line2D([], [], marker="o", mfc="white", label="hollow: STF", **look))
    fig.legend(handles=handles, loc="outside right upper")
    return fig


def _draw_costs(axes: Any, setting: Setting, colours: dict, marks: dict) -> None:
    """A mark for each arm over its cost, and the best mean up to every cost."""
    rows = setting.rows[setting.rows["n"] > 0]
    rows = rows.sort_values(["x", "mean"], ascending=[True, setting.lower])
    best = rows["mean"].cummin() if setting.lower else rows["mean"].cummax()
    axes.step(rows["x"], best, where="post", color="#bdbdbd", lw=1, zorder=0)
    for row in rows.itertuples():
        colour = colours[row.skip_scaling]
        if pd.notna(row.ci_low):
            axes.plot([row.x] * 2, [row.ci_low, row.ci_high], color=colour, lw=0.7, alpha=0.6)
        fill = colour if row.target == "dsm" else "white"
        axes.plot([row.x], [row.mean], marker=marks[row.line], color=colour, mfc=fill, ms=4.5)
    _scale(axes, rows, "macs")
    axes.set_xlabel(OVER["macs"].label)
    axes.set_ylabel(_metric_label(setting))


def _labelled(setting: Setting, shown: list[Setting]) -> bool:
    """Whether a picture has to say which setting this is."""
    return len(shown) > 1 or setting.label != setting.protocol


def _lines(tables: Tables, name: str, title: str, more: str) -> Figure:
    """A panel for each setting and backbone, a line with its band for each arm."""
    found = settings(tables.curves, OVER[name])
    if not found:
        return text_figure(title, _too_few(name), made_of(tables))
    shown = found[:MOST]
    if len(found) > MOST:
        more += f" {count(len(found) - MOST, 'more setting')} in tables/curves.csv."
    if any(tables.reference_points(setting.metric) for setting in shown):
        more += " Dotted, where it is near: a Gaussian fitted to the pixels."
    every = pd.concat([setting.rows for setting in shown])
    levels = [_levels(tables, one) if name == "reference" else one.rows[:0] for one in shown]
    lines = style.order_lines(every["line"])
    fig, cells, first = line_grid(
        list(range(len(shown))), lines, 0.9, 1.8 if len(lines) > 1 else 2.5, 3
    )
    style.footer(fig, made_of(tables, more=f"{_measured(shown)} {more}{_unseen(every)}"))
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    crosses = False
    for number, setting in enumerate(shown):
        for line in lines:
            axes, rows = cells[number, line], setting.rows[setting.rows["line"] == line]
            if rows.empty:
                empty_panel(axes)
                continue
            _draw_levels(axes, levels[number][levels[number]["line"] == line], colours)
            for (_, target), own in rows.groupby(["series", "target"]):
                _draw_line(axes, own, target, colours, name)
                crosses |= name == "training" and _draw_cross(axes, own)
            _scale(axes, rows, name)
            _draw_gaussian(axes, tables.reference_points(setting.metric).get("gaussian"))
            axes.set_xlabel(setting.axis.label)
            axes.tick_params(labelbottom=True)
        for axes in first[number]:
            label = textwrap.fill(setting.label, 24) + "\n" if _labelled(setting, shown) else ""
            axes.set_ylabel(label + _metric_label(setting))
    arms = tables.only(arm=[*every["arm"], *pd.concat(levels)["arm"]])
    arm_legend(fig, arms, diverged=crosses)
    return fig


def _draw_gaussian(axes: Any, value: float | None) -> None:
    """Where a Gaussian fitted to the pixels stands, if that is near the lines."""
    low, high = axes.get_ylim()
    room = 0.3 * (high - low)
    if value is None or not low - room <= value <= high + room:
        return
    axes.axhline(value, color="#777", lw=0.9, ls=(0, (1, 1.5)), zorder=0)
    axes.annotate(
        "Gaussian",
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        fontsize=5.5,
        color="#555",
    )


def _draw_line(axes: Any, rows: pd.DataFrame, target: str, colours: dict, name: str) -> None:
    """One arm, or with kappa the arms of one kind of constant scaling."""
    known = rows[rows["n"] > 0].drop_duplicates("x")
    if known.empty:
        return
    ordered = style.order_scalings(known["skip_scaling"])
    colour = colours[ordered[-1] if len(ordered) == 1 else ordered[1]]
    axes.plot(known["x"], known["mean"], color=colour, ls=line_style(target), lw=1.1)
    for scaling, own in known.groupby("skip_scaling"):
        axes.plot(own["x"], own["mean"], color=colours[scaling], ls="", marker=".", ms=4)
    sure = known[known["ci_low"].notna()]
    axes.fill_between(sure["x"], sure["ci_low"], sure["ci_high"], color=colour, alpha=0.13, lw=0)


def _draw_cross(axes: Any, rows: pd.DataFrame) -> bool:
    """A cross on every last mean before runs of an arm diverged; whether there is one."""
    lost = rows["n_diverged"].astype(int).diff().shift(-1).fillna(0) > 0
    last = rows[lost & (rows["n"] > 0)]
    look = {"color": "#c1121f", "ls": "", "marker": "X", "ms": 5, "mec": "white", "mew": 0.5}
    axes.plot(last["x"], last["mean"], zorder=5, **look)
    return len(last) > 0


def _levels(tables: Tables, setting: Setting) -> pd.DataFrame:
    """The plain target's rows, measured as the setting's."""
    rows = without_dataset(tables.curves)
    like = setting.rows.iloc[0]
    for column in ("protocol", "dataset", "metric"):
        rows = rows[rows[column] == like[column]]
    return rows[(rows["target"] == "dsm") & (rows["last"] == "true") & (rows["n"] > 0)]


def _draw_levels(axes: Any, rows: pd.DataFrame, colours: dict) -> None:
    for row in rows.itertuples():
        colour = colours[row.skip_scaling]
        axes.axhline(row.mean, color=colour, ls=line_style(row.target), lw=0.9)
        if pd.notna(row.ci_low):
            axes.axhspan(row.ci_low, row.ci_high, color=colour, alpha=0.08, lw=0)


def _scale(axes: Any, rows: pd.DataFrame, name: str) -> None:
    """Logarithmic axes where the numbers span a wide range; values of few settings as ticks."""
    known = rows[rows["n"] > 0]
    values = known["mean"].astype(float)
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        plain_log_axis(axes.yaxis)
    x = known["x"]
    wide = x.min() > 0 and x.max() > 8 * x.min()
    if wide:
        axes.set_xscale("log")
    ticks = sorted(set(x))
    if name != "macs" and len(ticks) <= 6:
        axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    elif not wide:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(thousands))


def _metric_label(setting: Setting) -> str:
    side = "lower" if setting.lower else "higher"
    return style.metric_label(setting.metric).replace(", ", "\n") + f"\n({side} is better)"


def _measured(shown: list[Setting]) -> str:
    """How the settings were measured, in short."""
    parts = []
    for setting in shown:
        rows = setting.rows
        nfe = sorted({int(number) for number in rows["nfe"].dropna()})
        ends = "–".join(map(str, dict.fromkeys([nfe[0], nfe[-1]]))) if nfe else "unknown"
        samplers, weights = (enumerate_words(sorted(set(rows[c]))) for c in ("sampler", "weights"))
        label = style.metric_label(setting.metric)
        parts.append(f"{setting.label}: {label}, {samplers} (NFE {ends}), {weights} weights")
    return f"Protocol {'; '.join(parts)}."


def _unseen(rows: pd.DataFrame) -> str:
    """What is not drawn: numbers that are missing, and arms that lost every run."""
    missing = int(rows["n_missing"].sum())
    lost = sorted(set(rows.loc[(rows["n"] == 0) & (rows["n_diverged"] > 0), "arm"]))
    never = [arm for arm in lost if not (rows.loc[rows["arm"] == arm, "n"] > 0).any()]
    text = f" {count(missing, 'number')} of runs missing." if missing else ""
    return text + (f" Diverged before the first number: {'; '.join(never)}." if never else "")


def _too_few(name: str) -> str:
    return f"This study measures at fewer than two values of: {OVER[name].label}."
