"""How much of a small perturbation do trained networks pass on?"""

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.analysis import style
from study.analysis.figures.base import (
    arm_legend,
    arms_of,
    drawn,
    empty_panel,
    line_grid,
    line_style,
    made_of,
    probed_words,
    text_figure,
)
from study.analysis.tables.read import Tables

SPACES = {
    "noise": "predicted noise\ngain ‖Δf‖ / ‖δ‖",
    "network": "raw network\ngain ‖Δf‖ / ‖δ‖",
    "ratio": "raw network: gain /\ngain without scaling",
}
_GAIN = (
    "Gain: length of the change of the output over the length of a small random perturbation of "
    "the input, mean over {samples} noisy images that are the same for all runs; lower is more "
    "robust. First row: the predicted noise as a function of the variance-preserving input; second "
    "row: the raw network at its own input. Lines: mean over seeds; bands: their range (n > 1)."
)


@drawn("stability", probe="robustness")
def robustness(tables: Tables) -> Figure:
    """How much trained networks pass on of a small perturbation, against the noise level."""
    frame = _measured_gains(tables)
    if frame.empty:
        return text_figure(
            "Robustness", "No run has been probed, or none finished.", made_of(tables)
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


@drawn("stability", probe="robustness")
def robustness_by_size(tables: Tables) -> Figure:
    """How much trained networks pass on of a perturbation, against its size."""
    frame = _measured_gains(tables)
    if frame.empty:
        return text_figure(
            "Robustness by size", "No run has been probed, or none finished.", made_of(tables)
        )
    sigmas = sorted(set(frame["sigma"]))
    middle = sigmas[len(sigmas) // 2]
    frame = frame[frame["sigma"] == middle]
    more = (
        f"{_gain_words(frame)} Noise level σ = {middle:g}. A level line is a network that is "
        "linear over perturbations of these sizes."
    )
    return _gain_grid(tables, frame, "relative", "size ‖δ‖ / ‖x‖", more)


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


def _gain_words(frame: pd.DataFrame) -> str:
    counts = sorted({int(count) for count in frame["samples"]})
    return _GAIN.format(samples=" or ".join(map(str, counts)))


def _gain_grid(tables: Tables, frame: pd.DataFrame, x: str, label: str, more: str) -> Figure:
    """Rows: the two spaces, and what there is of ratios; columns: backbones."""
    spaces = [space for space in SPACES if (frame["space"] == space).any()]
    lines = style.order_lines(frame["line"])
    # One scale for a row of panels, so that backbones can be compared.
    fig, cells, first = line_grid(spaces, lines, 0.85, 1.4, sharex=True, sharey="row")
    style.footer(fig, made_of(tables, more=f"{more} {probed_words(frame)}"))
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    lowest: dict[str, Any] = {}
    for (space, line), axes in cells.items():
        panel = frame[(frame["space"] == space) & (frame["line"] == line)]
        if panel.empty:
            empty_panel(axes)
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
    arm_legend(fig, tables)
    return fig


def _gain_curves(axes: Any, panel: pd.DataFrame, x: str, colours: dict[str, str]) -> None:
    """Per arm the mean over its seeds, with their range where there are several."""
    for scaling, target, arm in arms_of(panel):
        over = arm.groupby(x)["gain"]
        mean, runs = over.mean(), arm["run"].nunique()
        colour = colours[scaling]
        if runs > 1:
            axes.fill_between(mean.index, over.min(), over.max(), color=colour, alpha=0.18, lw=0)
        axes.plot(
            mean.index,
            mean.to_numpy(),
            color=colour,
            ls=line_style(target),
            marker=".",
            ms=3,
            lw=1.1,
        )


def _plain(value: float, _position: int = 0) -> str:
    return f"{value:g}"


def _few_plain(axis: Any) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2 and 5 over little, else at the decades."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high / low < 50 else (1, 3) if high / low < 1000 else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(_plain))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
