"""What do the long skips carry, what scales them, and what does the decoder make of it?"""

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from study.analysis import statistics, style
from study.analysis.figures.base import (
    arm_legend,
    arms_of,
    curves_of,
    draw_lost_runs,
    drawn,
    empty_panel,
    line_grid,
    made_of,
    mean_over_seeds,
    not_logged,
    plain_log_axis,
    probe_rows,
    steps_axis,
    text_figure,
)
from study.analysis.tables.read import Tables


@drawn("skips")
def feature_norms(tables: Tables, quantity: str = "decoder_norm_after") -> Figure:
    """Norm of the last decoder block's output over training, with its oscillation."""
    title = "Decoder feature norm"
    frame = curves_of(tables, quantity, "1")
    if frame.empty:
        return not_logged(tables, title, quantity)
    lines = style.order_lines(frame["line"])
    targets = style.order_targets(frame["target"])
    fig, cells, first = line_grid(targets, lines, 0.75, 1.45, sharex=True)
    what = (
        "mean over samples of the L2 norm"
        if quantity == "decoder_norm_after"
        else "L2 norm over the whole batch"
    )
    style.footer(
        fig,
        made_of(
            tables,
            more=f"Output of the decoder block that takes the outermost long skip, {what}. Pale: "
            "range of the raw values of the first seed that finished, in each stretch of steps; "
            "dark: smoothed, mean over the seeds that finished; diverged runs by themselves "
            "(thin).",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    lowest: dict[str, Any] = {}
    for (target, line), axes in cells.items():
        panel = frame[(frame["line"] == line) & (frame["target"] == target)]
        if panel.empty:
            empty_panel(axes)
            continue
        for scaling, _, arm in arms_of(panel[panel["status"] != "diverged"]):
            raw = arm[arm["run"] == arm.sort_values(["seed", "run"])["run"].iloc[0]]
            axes.fill_between(
                raw["step"],
                raw["minimum"],
                raw["maximum"],
                color=colours[scaling],
                alpha=0.22,
                lw=0,
            )
            steps, mean = mean_over_seeds(arm)
            known = np.isfinite(mean)
            axes.plot(
                steps[known], statistics.smooth(mean[known], 3), color=colours[scaling], lw=1.2
            )
        draw_lost_runs(axes, panel, colours)
        lowest[line] = axes
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.set_ylim(bottom=0)
    for target, column in first.items():
        for axes in column:
            axes.set_ylabel(f"{style.target_label(target)}\nfeature norm")
    for axes in lowest.values():
        steps_axis(axes)
    arm_legend(fig, tables, targets=False, diverged=True)
    return fig


@drawn("skips")
def skip_norms(tables: Tables) -> Figure:
    """Norm of every long skip at the end of training, before and after its factor."""
    title = "Norms of the long skips"
    before = _final(curves_of(tables, "skip_norm"))
    after = _final(curves_of(tables, "skip_norm_scaled"))
    if before.empty:
        return not_logged(tables, title, "skip_norm")
    lines = style.order_lines(before["line"])
    targets = style.order_targets(before["target"])
    fig, cells, first = line_grid(targets, lines, 0.75, 1.45)
    style.footer(
        fig,
        made_of(
            tables,
            more="Mean over samples of the L2 norm of each long skip over the last tenth of "
            "training, mean over seeds, diverged runs left out. Thin dotted: before the factor; "
            "solid: after it, as it enters the decoder. Index 1 is the outermost long skip.",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    lowest: dict[str, Any] = {}
    for (target, line), axes in cells.items():
        if before[(before["line"] == line) & (before["target"] == target)].empty:
            empty_panel(axes)
            continue
        for data, look in (
            (before, {"ls": ":", "lw": 0.9}),
            (after, {"ls": "-", "lw": 1.2, "marker": ".", "ms": 4}),
        ):
            panel = data[(data["line"] == line) & (data["target"] == target)]
            for scaling, _, arm in arms_of(panel):
                mean = arm.groupby("index")["value"].mean()
                axes.plot(mean.index, mean.to_numpy(), color=colours[scaling], **look)
        lowest[line] = axes
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.set_ylim(bottom=0)
    for target, column in first.items():
        for axes in column:
            axes.set_ylabel(f"{style.target_label(target)}\nnorm of the long skip")
    for axes in lowest.values():
        axes.set_xlabel("long skip")
    arm_legend(fig, tables, targets=False)
    return fig


def _final(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over the last tenth of training per run and skip; ``index`` is the skip's number."""
    frame = frame[frame["status"] != "diverged"]
    if frame.empty:
        return frame.assign(index=[])
    late = frame[frame["step"] >= 0.9 * frame.groupby("run")["step"].transform("max")]
    keys = ["run", "line", "skip_scaling", "target", "where"]
    mean = late.groupby(keys)["value"].mean().reset_index()
    return mean.assign(index=mean["where"].astype(int))


@drawn("skips")
def skip_factors(tables: Tables) -> Figure:
    """The factor that each long skip really has: constants as set, gates as learned."""
    title = "Factors on the long skips"
    rows = tables.runs[tables.runs["status"] != "missing"]
    constant = rows[(rows["skip_factors"] != "") & ~rows["skip_factors"].str.contains("learned")]
    learned = _final(curves_of(tables, "gate_mean"))
    if constant.empty and learned.empty:
        return not_logged(tables, title, "skip factors")
    lines = style.order_lines([*constant["line"], *learned["line"]])
    fig, cells, first = line_grid(["factor"], lines, 0.65, 1.5, sharey=True)
    style.footer(
        fig,
        made_of(
            tables,
            more="Constant factors as recorded by the runs; learned ones (dashed) are the mean "
            "gate over the last tenth of training, over seeds and targets. Index 1 is the "
            "outermost long skip; backbones differ in their number of long skips, so one κ is not "
            "one treatment.",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    for (_, line), axes in cells.items():
        for scaling, group in constant[constant["line"] == line].groupby("skip_scaling"):
            factors = [float(part) for part in group["skip_factors"].iloc[0].split()]
            axes.plot(
                range(1, len(factors) + 1),
                factors,
                color=colours[scaling],
                marker=".",
                ms=4,
            )
        for scaling, group in learned[learned["line"] == line].groupby("skip_scaling"):
            mean = group.groupby("index")["value"].mean()
            axes.plot(
                mean.index,
                mean.to_numpy(),
                color=colours[scaling],
                marker=".",
                ms=4,
                ls=(0, (3, 1.2)),
            )
        axes.set_xlabel("long skip")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        axes.set_ylim(0, 1.05)
    for axes in first["factor"]:
        axes.set_ylabel("factor")
    arm_legend(fig, tables, targets=False)
    return fig


@drawn("skips")
def gates(tables: Tables) -> Figure:
    """Learned gates over training, by long skip."""
    title = "Learned gates"
    frame = curves_of(tables, "gate_mean")
    if frame.empty:
        return text_figure(
            title, "No arm of this selection has a learned scaling.", made_of(tables)
        )
    frame = frame.assign(index=frame["where"].astype(int))
    kinds = [(s, t) for s, t, _ in arms_of(frame)]
    lines = style.order_lines(frame["line"])
    fig, cells, first = line_grid(kinds, lines, 0.6, 1.0, sharex=True)
    style.footer(
        fig,
        made_of(
            tables,
            more="Mean gate of each long skip (0 shuts it, 1 leaves it whole), mean over seeds; "
            "index 1 is the outermost. White is 0.5, about where the gates start.",
        ),
    )
    norm, picture = Normalize(0, 1), None
    lowest: dict[str, Any] = {}
    for (kind, line), axes in cells.items():
        scaling, target = kind
        cell = frame[
            (frame["line"] == line)
            & (frame["skip_scaling"] == scaling)
            & (frame["target"] == target)
        ]
        if cell.empty:
            empty_panel(axes)
            continue
        axes.grid(False)
        lowest[line] = axes
        indices = sorted(set(cell["index"]))
        curves = [mean_over_seeds(cell[cell["index"] == index]) for index in indices]
        picture = axes.imshow(
            np.array([curve for _, curve in curves]),
            aspect="auto",
            cmap="PuOr",
            norm=norm,
            interpolation="nearest",
            extent=(0, curves[0][0][-1], indices[-1] + 0.5, indices[0] - 0.5),
        )
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
    for (scaling, target), column in first.items():
        for axes in column:
            axes.set_ylabel(
                f"{style.scaling_label(scaling)}\n{style.target_label(target)}\nlong skip"
            )
    for axes in lowest.values():
        steps_axis(axes)
    fig.colorbar(
        picture, ax=list(cells.values()), label="mean gate", shrink=0.6, aspect=30, pad=0.01
    )
    return fig


@drawn("skips", probe="dynamics")
def block_norms(tables: Tables) -> Figure:
    """Feature norm after each decoder block, and gradient norm of every block, after training."""
    title = "Norms by block"
    rows = probe_rows(tables, "dynamics", "decoder_norm_after", "grad_norm_block")
    rows = rows if rows.empty else rows[(rows["target"] == "dsm") & np.isfinite(rows["value"])]
    if rows.empty:
        return text_figure(title, "No DSM run of this selection was probed.", made_of(tables))
    features = rows[rows["quantity"] == "decoder_norm_after"]
    features = features.assign(x=pd.to_numeric(features["where"]))
    gradients = rows[(rows["quantity"] == "grad_norm_block") & rows["position"].notna()]
    gradients = gradients.assign(x=gradients["position"].astype(float))
    sigmas = sorted(set(features["sigma"]))
    sigma = min(sigmas, key=lambda s: abs(math.log(s / 0.5))) if sigmas else math.nan
    lines = style.order_lines(rows["line"])
    kinds = ["feature", "gradient"]
    fig, cells, first = line_grid(kinds, lines, 0.85, 1.45)
    style.footer(
        fig,
        made_of(
            tables,
            more="Top: L2 norm of what the decoder block gives that takes each long skip (1 = "
            f"outermost), mean over images at noise level σ = {sigma:g}. Bottom: L2 norm of the "
            "gradient of the training loss by block, in order of execution, before clipping. "
            "Averaged weights, DSM arms, mean over seeds; diverged runs have no rows.",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    for (kind, line), axes in cells.items():
        if kind == "feature":
            panel = features[(features["line"] == line) & (features["sigma"] == sigma)]
        else:
            panel = gradients[gradients["line"] == line]
        if panel.empty:
            empty_panel(axes)
            continue
        for scaling in style.order_scalings(panel["skip_scaling"]):
            mean = panel[panel["skip_scaling"] == scaling].groupby("x")["value"].mean()
            axes.plot(
                mean.index, mean.to_numpy(), color=colours[scaling], marker=".", ms=3.5, lw=1.0
            )
        axes.set_xlabel("long skip" if kind == "feature" else "block")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        if kind == "gradient" and (panel["value"] > 0).all():
            axes.set_yscale("log")
            plain_log_axis(axes.yaxis)
        else:
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
            axes.set_ylim(bottom=0)
    for kind, column in first.items():
        for axes in column:
            axes.set_ylabel(f"{kind} norm")
    arm_legend(fig, tables, targets=False)
    return fig
