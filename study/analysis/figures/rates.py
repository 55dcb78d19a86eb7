"""Up to which learning rate do arms still train?"""

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from study.analysis import style
from study.analysis.figures.base import arms_of, drawn, made_of, probed_words, text_figure
from study.analysis.tables.measures import largest_rate
from study.analysis.tables.read import Tables

RED = "#c1121f"


def largest_rates(frame: pd.DataFrame) -> pd.Series:
    """:func:`study.analysis.tables.measures.largest_rate` by run; nan where no rate trained.

    ``frame`` holds rows of the stability frontier: ``run``, ``lr``, ``outcome``.
    """
    runs = [] if frame.empty else frame.groupby("run", sort=True)
    rates = {run: largest_rate(rows)[0] for run, rows in runs}
    return pd.Series(rates, name="largest_lr", dtype=float).rename_axis("run")


@drawn("stability", probe="stability_frontier")
def stability_frontier(tables: Tables) -> Figure:
    """The largest learning rate that still trains, and the share of seeds that diverge at each."""
    frame = tables.probe("stability_frontier")
    if frame.empty:
        return text_figure(
            "Stability frontier",
            "No arm has been probed at rising learning rates.",
            made_of(tables),
        )
    lines = style.order_lines(frame["line"])
    rates = sorted(set(frame["lr"]))
    words = frame.drop_duplicates("run").set_index("run")
    best = words.join(largest_rates(frame))
    keys = {line: _arm_keys(frame[frame["line"] == line]) for line in lines}
    heights = [0.145 * len(keys[line]) + 0.24 for line in lines]
    fig = style.figure(height=sum(heights) + 1.25)
    steps = sorted({int(value) for value in frame["steps"]})
    style.footer(
        fig,
        made_of(
            tables,
            more=f"Trainings of {' or '.join(map(str, steps))} steps with the arm's own settings "
            "at each rate, from the smallest on, up to the first that diverged. Left: the end of "
            "the first stretch of rates that trained (their losses fell below a set share of the "
            "first; smaller rates that learned too slowly are left aside); points: seeds (arrow: "
            "trained up to the largest rate tried, cross: at none, entered as half the smallest), "
            "bar: their geometric mean. Right: seeds that diverged of "
            "those tried, s: some ended without having learned; hatched: not tried, for a smaller "
            f"rate diverged. Rates are {_grid_words(rates)}: smaller differences cannot be seen. "
            + probed_words(frame),
        ),
    )
    grid = fig.subplots(len(lines), 2, squeeze=False, width_ratios=(1, 1.35), height_ratios=heights)
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    for line, (left, right) in zip(lines, grid, strict=True):
        rows = frame[frame["line"] == line]
        _largest(left, best[best["line"] == line], keys[line], rates, colours)
        _shares(right, rows, keys[line], rates)
        left.set_title(style.line_label(line))
    for axes in grid[-1]:
        axes.set_xlabel("learning rate")
        axes.tick_params(labelbottom=True)
    _frontier_legend(fig)
    return fig


def _rate_text(rate: float) -> str:
    return f"{rate:g}" if rate >= 1e-3 else f"{rate:.0e}".replace("e-0", "e-")


def _grid_words(rates: list[float]) -> str:
    if len(rates) < 2:
        return "a single one"
    factors = [b / a for a, b in zip(rates, rates[1:], strict=False)]
    low, high = min(factors), max(factors)
    apart = f"{low:.2g}" if high / low < 1.01 else f"{low:.2g} to {high:.2g}"
    return f"a factor of {apart} apart"


def _arm_keys(rows: pd.DataFrame) -> list[tuple[str, str]]:
    return [(scaling, target) for scaling, target, _ in arms_of(rows)]


def _key_labels(keys: list[tuple[str, str]]) -> list[str]:
    several = len({target for _, target in keys}) > 1
    return [
        style.scaling_label(scaling) + (f", {style.target_label(target)}" if several else "")
        for scaling, target in keys
    ]


def _largest(
    axes: Any,
    best: pd.DataFrame,
    keys: list[tuple[str, str]],
    rates: list[float],
    colours: dict[str, str],
) -> None:
    """A bar per arm to the geometric mean, and a point per seed."""
    floor = rates[0] / 2
    for position, (scaling, target) in enumerate(keys):
        arm = best[(best["skip_scaling"] == scaling) & (best["target"] == target)]
        arm = arm.sort_values(["seed", "largest_lr"])
        values = arm["largest_lr"].to_numpy(dtype=float)
        colour = colours[scaling]
        mean = math.exp(np.log(np.where(np.isfinite(values), values, floor)).mean())
        if mean > floor:
            axes.barh(position, mean - floor, left=floor, height=0.62, color=colour, alpha=0.35)
        # Seeds side by side: their number alone places them, so that the figure is reproducible.
        offsets = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1)
        for value, offset in zip(values, offsets, strict=True):
            lost, top = not math.isfinite(value), value == rates[-1]
            axes.plot(
                [floor * 1.15 if lost else value],
                [position + offset],
                marker="x" if lost else ">" if top else "o",
                color=RED if lost else colour,
                ms=3.2,
                mew=0.8,
                mfc="white" if target != "dsm" and not lost else None,
                ls="",
            )
    axes.set_xscale("log")
    axes.set_xlim(floor, rates[-1] * 1.6)
    axes.set_xticks(rates, [_rate_text(rate) for rate in rates])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_yticks(range(len(keys)), _key_labels(keys))
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=6)
    axes.tick_params(axis="x", labelsize=5.8, labelbottom=False)


def _shares(axes: Any, rows: pd.DataFrame, keys: list[tuple[str, str]], rates: list[float]) -> None:
    """Diverged of tried at every rate, coloured by their share."""
    reds = matplotlib.colormaps["Reds"]
    for i, (scaling, target) in enumerate(keys):
        arm = rows[(rows["skip_scaling"] == scaling) & (rows["target"] == target)]
        for j, rate in enumerate(rates):
            outcomes = arm.loc[arm["lr"] == rate, "outcome"]
            box = {"xy": (j - 0.48, i - 0.46), "width": 0.96, "height": 0.92, "lw": 0}
            if outcomes.empty:
                axes.add_patch(Rectangle(**box, hatch="/////", fc="#f4f4f4", ec="#c4c4c4"))
                continue
            lost, tried = int(outcomes.eq("diverged").sum()), len(outcomes)
            share = lost / tried
            axes.add_patch(Rectangle(**box, fc=reds(0.04 + 0.8 * share)))
            stalled = " s" if outcomes.eq("stalled").any() else ""
            axes.text(
                j,
                i + 0.03,
                f"{lost}/{tried}{stalled}",
                ha="center",
                va="center",
                fontsize=5.6,
                color="white" if share > 0.6 else "#222",
            )
    axes.set_xlim(-0.5, len(rates) - 0.5)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_xticks(range(len(rates)), [_rate_text(rate) for rate in rates])
    axes.set_yticks([])
    axes.grid(False)
    axes.tick_params(axis="x", length=0, labelsize=5.8, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frontier_legend(fig: Figure) -> None:
    look = {"ls": "", "color": "#444", "ms": 4}
    handles: list[Any] = [
        Line2D([], [], marker="o", label="largest rate that trains (a seed)", **look),
        Line2D([], [], marker=">", label="trains up to the largest", **look),
        Line2D([], [], marker="x", label="trains at none", **{**look, "color": RED}),
        Patch(fc=matplotlib.colormaps["Reds"](0.84), label="diverged / tried"),
        Patch(hatch="/////", fc="#f4f4f4", ec="#c4c4c4", lw=0, label="not tried"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.6)
