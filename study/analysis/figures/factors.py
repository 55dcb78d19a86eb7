"""How much more stable is an arm than the unscaled one?"""

import math
import textwrap
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.analysis import statistics, style
from study.analysis.figures.base import drawn, headline, line_grid, made_of, text_figure
from study.analysis.names import ALL
from study.analysis.tables.measures import MEASURES, Measure
from study.analysis.tables.read import Tables
from study.analysis.tables.stability import overall


@drawn("stability")
def stability(tables: Tables) -> Figure:
    """Stability of every scaled arm as a factor of the unscaled arm of its backbone and target."""
    rows = tables.stability
    rows = rows[(rows["against"] == "none") & rows["factor"].notna()]
    if rows.empty:
        return text_figure(
            "Stability against the unscaled arm",
            "No scaled arm shares a finished seed with its unscaled arm.",
            made_of(tables),
        )
    measures = [measure for measure in MEASURES.values() if (rows["measure"] == measure.name).any()]
    scalings = style.order_scalings(rows["skip_scaling"])
    targets = style.order_targets(rows["target"])
    apart = 0.26 * (np.arange(len(targets)) - (len(targets) - 1) / 2)
    places = {
        (scaling, target): i + apart[j]
        for i, scaling in enumerate(scalings)
        for j, target in enumerate(targets)
    }
    mean = overall(tables.stability_pairs)
    mean = mean[(mean["against"] == "none") & mean["factor"].notna()]
    lines = [ALL] * (not mean.empty) + style.order_lines(rows["line"])
    both = rows if mean.empty else pd.concat([mean, rows])
    tested = bool(both["p_value"].notna().any())
    height = 0.44 + (0.085 + 0.035 * len(targets)) * len(scalings)
    fig, cells, first = line_grid(measures, lines, 1.0, height, most=6)
    style.footer(fig, made_of(tables, more=_small_print(rows, mean, measures, tested)))
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    for measure in measures:
        here = both[both["measure"] == measure.name]
        for line in lines:
            axes = cells[measure, line]
            _draw_factors(axes, here[here["line"] == line], places, colours)
            _factor_axis(axes, *_factor_range(here))
            axes.set_yticks(range(len(scalings)), [])
            axes.set_ylim(len(scalings) - 0.5, -0.5)
            axes.grid(False, axis="y")
    for measure, column in first.items():
        words = textwrap.wrap(measure.label, 17)
        side = "left" if measure.better == "lower" else "right"
        for axes in column:
            axes.set_yticks(range(len(scalings)), [style.scaling_label(s) for s in scalings])
            text = "\n".join([*words, f"({side}: more stable)"])
            # Lying, for a standing label is longer than a row of few scalings is high.
            axes.set_ylabel(text, fontsize=5.8, rotation=0, ha="right", va="center")
    _mark_legend(fig, targets, tested)
    headline(fig, "Factor against no scaling, same backbone and target")
    return fig


def _small_print(
    rows: pd.DataFrame, mean: pd.DataFrame, measures: list[Measure], tested: bool
) -> str:
    both = pd.concat([mean, rows]) if len(mean) else rows
    parts = [
        "Pairs of runs with equal seeds per arm: "
        f"{', '.join(map(str, sorted(set(rows['n_pairs']))))}."
    ]
    if (both["factor_low"] < both["factor_high"]).any():
        parts.append(
            "Bars: Student 95 % interval of the mean log ratio, as factors; they may leave the "
            "panel."
        )
    if len(mean):
        parts.append(
            "All backbones: geometric mean of the backbones' factors in each seed that is whole on "
            "all of them."
        )
    parts.append(
        "Filled: Holm-corrected p < 0.05 over the tests of that measure and panel."
        if tested
        else "No test is possible (too few pairs, or none that differ in their factor): factors "
        "are shown, not claimed."
    )
    return " ".join([*parts, *(f"{m.label.capitalize()}: {m.words}." for m in measures)])


MARKS = {"dsm": ("o", 3.8)}
"""Marker and its size, by target."""


def _draw_factors(axes: Any, rows: pd.DataFrame, places: dict, colours: dict[str, str]) -> None:
    """A mark for each arm, filled where it is sure, with its interval."""
    axes.axvline(1, color="#888", lw=0.8, zorder=1)
    for row in rows.itertuples():
        place, colour = places[row.skip_scaling, row.target], colours[row.skip_scaling]
        if pd.notna(row.factor_low):
            axes.plot([row.factor_low, row.factor_high], [place] * 2, color=colour, lw=1.2)
        sure = pd.notna(row.p_holm) and row.p_holm < 1 - statistics.LEVEL
        marker, size = MARKS.get(row.target, ("D", 3.2))
        fill = colour if sure else "white"
        axes.plot([row.factor], [place], marker=marker, color=colour, ms=size, mfc=fill, mew=1)


def _factor_axis(axes: Any, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(_factor_ticks(low, high)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _mark_legend(fig: Figure, targets: list[str], tested: bool) -> None:
    look = {"ls": "", "color": "#555"}
    handles = []
    for target in targets if len(targets) > 1 else []:
        marker, size = MARKS.get(target, ("D", 3.2))
        label = style.target_label(target)
        handles.append(Line2D([], [], marker=marker, ms=size, mfc="white", label=label, **look))
    if tested:
        handles.append(Line2D([], [], marker="o", ms=3.8, label="Holm p < 0.05", **look))
    if handles:
        fig.legend(handles=handles, loc="outside upper right", ncols=len(handles))


def _factor_range(rows: pd.DataFrame) -> tuple[float, float]:
    """Ends of a logarithmic axis: all factors and 1, and their intervals up to a factor of 2."""
    factors = np.append(rows["factor"].to_numpy(dtype=float), 1.0)
    low, high = factors.min(), factors.max()
    ends = rows[["factor_low", "factor_high"]].dropna().to_numpy(dtype=float)
    if len(ends):
        low = min(low, max(ends[:, 0].min(), low / 2))
        high = max(high, min(ends[:, 1].max(), high * 2))
    room = max((high / low) ** 0.08, 1.02)
    return low / room, high * room


def _factor_ticks(low: float, high: float) -> list[float]:
    """Two to five plain numbers for a logarithmic axis, well apart and the roundest first."""
    decades = [float(f"1e{exponent}") for exponent in range(-12, 13)]
    rows = [
        decades,
        [step * decade for decade in decades for step in (1, 3)],
        [step * decade for decade in decades for step in (1, 2, 5)],
        [2.0**power for power in range(-4, 5)],
        [0.5, 0.7, 1.0, 1.4, 2.0],
        *([1 + step * k for k in range(-9, 10)] for step in (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)),
    ]
    span = math.log(high / low)
    for enough in (3, 2):
        for ticks in rows:
            inside = [tick for tick in ticks if low <= tick <= high]
            gaps = np.diff(np.log(inside)) if len(inside) > 1 else np.zeros(1)
            if enough <= len(inside) <= 5 and gaps.min() > 0.16 * span:
                return inside
    return [1.0]
