"""Figures about stability: robustness, and the learning rates that still train."""

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from study.analysis import style
from study.analysis.figures import (
    _arms,
    _empty,
    _legend,
    _line,
    _line_grid,
    _made_of,
    drawn,
    text_figure,
)
from study.analysis.tables.measures import largest_rate
from study.analysis.tables.read import Tables

SPACES = {
    "noise": "predicted noise\ngain ‖Δf‖ / ‖δ‖",
    "network": "raw network\ngain ‖Δf‖ / ‖δ‖",
    "ratio": "raw network: gain /\ngain without scaling",
}
RED = "#c1121f"


def largest_rates(frame: pd.DataFrame) -> pd.Series:
    """:func:`study.analysis.tables.measures.largest_rate` by run; nan where no rate trained.

    ``frame`` holds rows of the stability frontier: ``run``, ``lr``, ``outcome``.
    """
    runs = [] if frame.empty else frame.groupby("run", sort=True)
    rates = {run: largest_rate(rows)[0] for run, rows in runs}
    return pd.Series(rates, name="largest_lr", dtype=float).rename_axis("run")


def _probed(frame: pd.DataFrame) -> str:
    """How many runs and seeds stand behind a probe's rows."""
    runs = frame.drop_duplicates("run")
    per_arm = runs.groupby("arm")["run"].count()
    low, high = per_arm.min(), per_arm.max()
    count = f"{low}" if low == high else f"{low}–{high}"
    seeds = sorted(set(runs["seed"].astype(str)), key=lambda seed: (len(seed), seed))
    plural = "s" if high > 1 else ""
    return f"Probed: {len(runs)} runs, n = {count} seed{plural} per arm (seeds {', '.join(seeds)})."


# --- robustness ----------------------------------------------------------------------------------


def _measured_gains(tables: Tables) -> pd.DataFrame:
    frame = tables.probe("robustness")
    return frame if frame.empty else frame[np.isfinite(frame["gain"].astype(float))]


def _beside_unscaled(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the space "ratio": gains of the raw network over those of the unscaled twin.

    A twin has the same backbone, target and seed; runs without one have no rows.
    """
    keys = ["line", "target", "seed", "sigma", "relative"]
    raw = frame[frame["space"] == "network"]
    twins = raw[raw["skip_scaling"] == "none"].groupby(keys)["gain"].mean().rename("twin")
    pairs = raw[raw["skip_scaling"] != "none"].join(twins, on=keys, how="inner")
    return pairs.assign(space="ratio", gain=pairs["gain"] / pairs["twin"]).drop(columns="twin")


def _gain_curves(axes: Any, panel: pd.DataFrame, x: str, colours: dict[str, str]) -> None:
    """Per arm the mean over its seeds, with their range where there are several."""
    for scaling, target, arm in _arms(panel):
        over = arm.groupby(x)["gain"]
        mean, runs = over.mean(), arm["run"].nunique()
        colour = colours[scaling]
        if runs > 1:
            axes.fill_between(mean.index, over.min(), over.max(), color=colour, alpha=0.18, lw=0)
        axes.plot(
            mean.index, mean.to_numpy(), color=colour, ls=_line(target), marker=".", ms=3, lw=1.1
        )


def _gain_grid(tables: Tables, frame: pd.DataFrame, x: str, label: str, more: str) -> Figure:
    """Rows: the two spaces, and what there is of ratios; columns: backbones."""
    spaces = [space for space in SPACES if (frame["space"] == space).any()]
    lines = style.order_lines(frame["line"])
    # One scale for a row of panels, so that backbones can be compared.
    fig, cells, first = _line_grid(spaces, lines, 0.85, 1.4, sharex=True, sharey="row")
    style.footer(fig, _made_of(tables, more=f"{more} {_probed(frame)}"))
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    lowest: dict[str, Any] = {}
    for (space, line), axes in cells.items():
        panel = frame[(frame["space"] == space) & (frame["line"] == line)]
        if panel.empty:
            _empty(axes)
            continue
        _gain_curves(axes, panel, x, colours)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_plain))
        if space == "ratio":
            axes.axhline(1, color=colours.get("none", "#888"), lw=0.7, zorder=1)
        else:
            axes.set_yscale("log")
        lowest[line] = axes
    for (space, _), axes in cells.items():
        if space == "ratio":
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        else:
            _few_plain(axes.yaxis)
    for space, column in first.items():
        for axes in column:
            axes.set_ylabel(SPACES[space])
    for axes in lowest.values():
        axes.set_xlabel(label)
        axes.tick_params(labelbottom=True)
    _legend(fig, tables)
    return fig


def _plain(value: float, _position: int = 0) -> str:
    return f"{value:g}"


def _few_plain(axis: Any) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2 and 5 over little, else at the decades."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high / low < 50 else (1, 3) if high / low < 1000 else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(_plain))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


_GAIN = (
    "Gain: length of the change of the output over the length of a small random perturbation of "
    "the input, mean over {samples} noisy images that are the same for all runs; lower is more "
    "robust. First row: the predicted noise as a function of the variance-preserving input; second "
    "row: the raw network at its own input. Lines: mean over seeds; bands: their range (n > 1)."
)


def _gain_words(frame: pd.DataFrame) -> str:
    counts = sorted({int(count) for count in frame["samples"]})
    return _GAIN.format(samples=" or ".join(map(str, counts)))


@drawn(probe="robustness")
def robustness(tables: Tables) -> Figure:
    """How much trained networks pass on of a small perturbation, against the noise level."""
    frame = _measured_gains(tables)
    if frame.empty:
        return text_figure(
            "Robustness", "No run has been probed, or none finished.", _made_of(tables)
        )
    smallest = frame["relative"].min()
    frame = frame[frame["relative"] == smallest]
    ratios = _beside_unscaled(frame)
    more = (
        f"{_gain_words(frame)} Size of the perturbation: {smallest:g} of the input's norm. At much "
        "noise the gain of the predicted noise tends to 1 whatever the network does."
    )
    if not ratios.empty:
        frame = pd.concat([frame, ratios])
        more += (
            " Third row: gain of the raw network over that of the unscaled run of the same "
            "backbone, target and seed; it is not a test."
        )
    return _gain_grid(tables, frame, "sigma", "noise level σ", more)


@drawn(probe="robustness")
def robustness_by_size(tables: Tables) -> Figure:
    """How much trained networks pass on of a perturbation, against its size."""
    frame = _measured_gains(tables)
    if frame.empty:
        return text_figure(
            "Robustness by size", "No run has been probed, or none finished.", _made_of(tables)
        )
    sigmas = sorted(set(frame["sigma"]))
    middle = sigmas[len(sigmas) // 2]
    frame = frame[frame["sigma"] == middle]
    more = (
        f"{_gain_words(frame)} Noise level σ = {middle:g}. A level line is a network that is "
        "linear over perturbations of these sizes."
    )
    return _gain_grid(tables, frame, "relative", "size ‖δ‖ / ‖x‖", more)


# --- stability frontier --------------------------------------------------------------------------


def _rate_text(rate: float) -> str:
    return f"{rate:g}" if rate >= 1e-3 else f"{rate:.0e}".replace("e-0", "e-")


@drawn(probe="stability_frontier")
def stability_frontier(tables: Tables) -> Figure:
    """The largest learning rate that still trains, and the share of seeds that diverge at each."""
    frame = tables.probe("stability_frontier")
    if frame.empty:
        return text_figure(
            "Stability frontier",
            "No arm has been probed at rising learning rates.",
            _made_of(tables),
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
        _made_of(
            tables,
            more=f"Trainings of {' or '.join(map(str, steps))} steps with the arm's own settings "
            "at each rate, from the smallest on, up to the first that diverged. Left: the end of "
            "the first stretch of rates that trained (their losses fell below a set share of the "
            "first; smaller rates that learned too slowly are left aside); points: seeds (arrow: "
            "trained up to the largest rate tried, cross: at none, entered as half the smallest), "
            "bar: their geometric mean. Right: seeds that diverged of "
            "those tried, s: some ended without having learned; hatched: not tried, for a smaller "
            f"rate diverged. Rates are {_grid_words(rates)}: smaller differences cannot be seen. "
            + _probed(frame),
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


def _grid_words(rates: list[float]) -> str:
    if len(rates) < 2:
        return "a single one"
    factors = [b / a for a, b in zip(rates, rates[1:], strict=False)]
    low, high = min(factors), max(factors)
    apart = f"{low:.2g}" if high / low < 1.01 else f"{low:.2g} to {high:.2g}"
    return f"a factor of {apart} apart"


def _arm_keys(rows: pd.DataFrame) -> list[tuple[str, str]]:
    return [(scaling, target) for scaling, target, _ in _arms(rows)]


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
