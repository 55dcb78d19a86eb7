"""How did training go, and which runs diverged?"""

import math
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from study.analysis import style
from study.analysis.figures.base import (
    arm_legend,
    arms_of,
    curves_of,
    draw_lost_runs,
    drawn,
    line_style,
    made_of,
    mean_over_seeds,
    not_logged,
    panel_grid,
    plain_log_axis,
    steps_axis,
    text_figure,
)
from study.analysis.tables.read import Tables


@drawn("training")
def training_dynamics(tables: Tables) -> Figure:
    """Training loss over steps."""
    return _time_curves(
        tables,
        "loss",
        "Training loss",
        "training loss",
        "Mean loss of each stretch of steps, mean over the seeds that finished; diverged runs by "
        "themselves (thin). DSM and STF losses are measured against different targets: compare "
        "within a line style.",
    )


@drawn("training")
def gradient_norms(tables: Tables) -> Figure:
    """Norm of the whole gradient over steps."""
    return _time_curves(
        tables,
        "grad_norm",
        "Gradient norm",
        "gradient norm",
        "L2 norm of the whole gradient before the optimiser, mean over the seeds that finished; "
        "diverged runs by themselves (thin).",
    )


def _time_curves(
    tables: Tables,
    quantity: str,
    title: str,
    label: str,
    more: str,
    where: str | None = None,
) -> Figure:
    """Small multiples per backbone: the mean over seeds of a quantity over training."""
    frame = curves_of(tables, quantity, where)
    if frame.empty:
        return not_logged(tables, title, quantity)
    lines = style.order_lines(frame["line"])
    columns = min(3, len(lines))
    rows = math.ceil(len(lines) / columns)
    fig = style.figure(height=0.75 + 1.75 * rows)
    style.footer(fig, made_of(tables, more=more))
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    panels = panel_grid(fig, len(lines), columns)
    for axes, line in zip(panels, lines, strict=True):
        panel = frame[frame["line"] == line]
        for scaling, target, arm in arms_of(panel[panel["status"] != "diverged"]):
            steps, mean = mean_over_seeds(arm)
            axes.plot(steps, mean, color=colours[scaling], ls=line_style(target), lw=1.1)
        draw_lost_runs(axes, panel, colours)
        axes.set_yscale("log")
        plain_log_axis(axes.yaxis)
        axes.set_title(style.line_label(line))
        steps_axis(axes)
    for axes in panels[::columns]:
        axes.set_ylabel(label)
    arm_legend(fig, tables, diverged=True)
    return fig


@drawn("training")
def loss_by_noise(tables: Tables) -> Figure:
    """Loss against the noise level at the end of training."""
    frame = curves_of(tables, "loss_by_noise")
    frame = frame[frame["status"] != "diverged"]
    if frame.empty:
        return not_logged(tables, "Loss by noise level", "loss_by_noise")
    lines = style.order_lines(frame["line"])
    columns = min(3, len(lines))
    fig = style.figure(height=0.75 + 1.75 * math.ceil(len(lines) / columns))
    style.footer(
        fig,
        made_of(
            tables,
            more="Mean loss in each noise bin over the last quarter of training and over seeds; "
            "diverged runs left out.",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    panels = panel_grid(fig, len(lines), columns)
    for axes, line in zip(panels, lines, strict=True):
        for scaling, target, arm in arms_of(frame[frame["line"] == line]):
            late = arm[arm["step"] >= 0.75 * arm["step"].max()]
            mean = late.assign(sigma=late["where"].astype(float)).groupby("sigma")["value"].mean()
            axes.plot(
                mean.index,
                mean.to_numpy(),
                color=colours[scaling],
                ls=line_style(target),
                marker=".",
                ms=3,
            )
        axes.set(xscale="log", yscale="log", xlabel="noise level σ")
        plain_log_axis(axes.yaxis)
        axes.set_title(style.line_label(line))
    for axes in panels[::columns]:
        axes.set_ylabel("training loss")
    arm_legend(fig, tables)
    return fig


@drawn("divergence")
def divergence(tables: Tables) -> Figure:
    """Which runs diverged, when, and why."""
    runs = tables.runs
    lost = runs[runs["status"] == "diverged"]
    if lost.empty:
        finished = int((runs["status"] == "done").sum())
        if not finished:
            return text_figure("Divergence", "No run has finished yet.", made_of(tables))
        return text_figure(
            "No run diverged",
            f"All {finished} runs that finished kept finite losses, gradients and weights to "
            "their last step, and none was stopped by the divergence rule. That says nothing "
            "about longer training or larger learning rates.",
            made_of(tables),
        )
    lines = style.order_lines(runs["line"])
    scalings = style.order_scalings(runs["skip_scaling"])
    lost = lost.assign(
        _line=[lines.index(line) for line in lost["line"]],
        _scaling=[scalings.index(scaling) for scaling in lost["skip_scaling"]],
    ).sort_values(["_line", "_scaling", "target", "seed", "run"])
    shown = lost.head(40)
    fig = style.figure(height=max(0.9 + 0.34 * len(lines), 0.9 + 0.19 * len(shown)))
    more = "Left: diverged of all runs, all targets. Right: how far each diverged run came."
    if len(lost) > len(shown):
        more += f" {len(lost) - len(shown)} further diverged runs are in the table."
    style.footer(fig, made_of(tables, more=more))
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.25))
    _shares_lost(left, runs[runs["status"] != "missing"], lines, scalings)
    _ends(right, shown, style.scaling_colours(runs["skip_scaling"]))
    return fig


def _shares_lost(axes: Any, runs: pd.DataFrame, lines: list[str], scalings: list[str]) -> None:
    """Diverged of all runs by backbone and scaling, coloured by their share."""
    lost = runs.assign(lost=runs["status"] == "diverged").groupby(["line", "skip_scaling"])["lost"]
    share, count, total = (
        table.unstack().reindex(index=lines, columns=scalings)
        for table in (lost.mean(), lost.sum(), lost.size())
    )
    words = [
        [
            "" if pd.isna(total.iloc[i, j]) else f"{count.iloc[i, j]:.0f}/{total.iloc[i, j]:.0f}"
            for j in range(len(scalings))
        ]
        for i in range(len(lines))
    ]
    sns.heatmap(
        share.astype(float),
        ax=axes,
        vmin=0,
        vmax=1,
        cmap="Reds",
        cbar=False,
        annot=words,
        fmt="",
        linewidths=1.5,
        linecolor="white",
        annot_kws={"fontsize": 7},
    )
    axes.grid(False)
    axes.set(xlabel="skip scaling", ylabel="")
    axes.set_title("runs that diverged")
    names = [style.scaling_label(s).replace("LS unshared", "LS\nunshared") for s in scalings]
    axes.set_xticklabels(names, rotation=0)
    axes.set_yticklabels([style.line_label(line) for line in lines], rotation=0)
    axes.tick_params(length=0)


def _ends(axes: Any, lost: pd.DataFrame, colours: dict[str, str]) -> None:
    """A bar for each diverged run, up to the step at which it did, with the reason."""
    names = []
    bar = {"lw": 3, "solid_capstyle": "butt"}
    for position, row in enumerate(lost.itertuples()):
        axes.plot([0, row.steps], [position] * 2, color="#e3e3e3", **bar)
        axes.plot([0, row.step], [position] * 2, color=colours[row.skip_scaling], **bar)
        axes.plot([row.step], [position], marker="X", color="#c1121f", ms=5, mec="white", mew=0.5)
        axes.text(row.steps, position, f" {row.reason}", va="center", fontsize=5.8, color="#444")
        names.append(
            f"{style.line_label(row.line)}, {style.scaling_label(row.skip_scaling)}, "
            f"{style.target_label(row.target)}, seed {row.seed}"
        )
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(len(names) - 0.4, -0.6)
    longest = int(lost["steps"].max())
    axes.set_xlim(0, longest * 1.3)
    axes.grid(False, axis="y")
    axes.set_title("step at which they diverged")
    steps_axis(axes)
    ticks = matplotlib.ticker.MaxNLocator(4).tick_values(0, longest)
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= longest])
