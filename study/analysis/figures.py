"""The figures: one function each, from the tables of a study to a matplotlib figure.

A new figure is a function that takes ``Tables``, and one line above it: ``@drawn``. Every figure
says in small print how many runs, which metric and which seeds it shows.
"""

import functools
import json
import math
import re
import textwrap
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from study import bounded
from study.analysis import statistics, style
from study.analysis.names import ALL, NOT_MEASURED, OTHERWISE
from study.analysis.tables.measures import MEASURES
from study.analysis.tables.read import Tables
from study.analysis.tables.stability import overall
from study.files import UserError, read_json
from study.pictures import in_order

FORMATS = ("png", "svg", "pdf")
FIGURES: dict[str, Callable[..., Figure]] = {}


NEEDS: dict[str, str] = {}
"""Figures that show a probe, and which: they are drawn where the study has it."""


def drawn(
    function: Callable[..., Figure] | None = None, *, probe: str | None = None
) -> Callable[..., Any]:
    """Register a figure under its function's name and give it the house's look.

    ``@drawn(probe="robustness")`` is for a figure that only studies with this probe have.
    """
    if function is None:
        return functools.partial(drawn, probe=probe)

    @functools.wraps(function)
    def styled(*arguments: Any, **options: Any) -> Figure:
        with style.look():
            figure = style.finish(function(*arguments, **options))
        figure.set_label(" ".join((function.__doc__ or "").split()))
        return figure

    FIGURES[function.__name__] = styled
    if probe is not None:
        NEEDS[function.__name__] = probe
    return styled


def draw_all(
    tables: str | Path,
    results: str | Path,
    out: str | Path,
    only: Iterable[str] | None = None,
    formats: Iterable[str] = FORMATS,
) -> list[str]:
    """Draw every figure (or those named in ``only``) into ``out``; returns the paths written."""
    data = Tables.read(tables, results)
    made = [name for name in FIGURES if name not in NEEDS or NEEDS[name] in data.probes]
    names = list(made if only is None else only)
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise UserError(f"figure {unknown[0]!r} is unknown; there are {', '.join(FIGURES)}")
    paths = []
    for name in names:
        paths += style.save(FIGURES[name](data), Path(out) / name, formats)
    return paths


# --- what several figures need -------------------------------------------------------------------


def _made_of(tables: Tables, metric: str | None = None, more: str = "") -> str:
    """The small print: runs, seeds, data set and its note, the metric's identity."""
    runs = tables.runs
    finished = runs["status"].isin(["done", "diverged"])
    apart = [
        f"{int((runs['status'] == state).sum())} {state}"
        for state in ("diverged", "running", "missing")
        if (runs["status"] == state).any()
    ]
    seeds = runs.groupby("arm")["run"].count()
    per_arm = f"n = {seeds.min()}" if seeds.nunique() <= 1 else f"n = {seeds.min()}–{seeds.max()}"
    parts = [
        f"{int(finished.sum())} of {len(runs)} runs"
        + (f" ({', '.join(apart)})" if apart else "")
        + f", {per_arm} seed{'s' if seeds.max() > 1 else ''} per arm",
        f"data set {', '.join(sorted(set(runs['dataset'])))}",
    ]
    if metric:
        states = tables.metrics.loc[tables.metrics["metric"] == metric, "status"]
        parts += [
            f"{int((states == state).sum())} {state}, not shown"
            for state in (OTHERWISE, NOT_MEASURED)
            if (states == state).any()
        ]
        parts.append(describe_identity(tables, metric))
    text = "; ".join(parts) + "."
    notes = sorted(set(runs["dataset_note"]) - {""})
    return " ".join([text, *([more] if more else []), *notes])


def describe_identity(tables: Tables, metric: str) -> str:
    """One metric's identity in a line of prose."""
    identity = tables.identity(metric)
    if not identity:
        return f"{metric}: never measured"
    return f"{metric} (identity {identity['identity']}): {measured(identity)}"


def measured(identity: dict[str, Any]) -> str:
    """How a metric was measured, without its name."""
    try:
        sampler = json.loads(identity.get("sampler", "{}"))
    except json.JSONDecodeError:
        sampler = {"kind": identity["sampler"]}
    kind, steps = sampler.get("kind", "sampler"), sampler.get("steps")
    more = "".join(
        f", {key} {re.sub('[0-9a-f]{64}', lambda found: found[0][:8], str(identity[key]))}"
        for key in ("precision", "guidance", "decoder")
        if identity.get(key)
    )
    return (
        f"{identity.get('images')} generated against {identity.get('reference_images')} images of "
        f"{identity.get('reference')} ({identity.get('split')}), {identity.get('extractor')} "
        f"features, {kind}"
        + (f" {steps} steps" if steps else "")
        + f" (NFE {identity.get('nfe')}), {identity.get('weights')} weights{more}, "
        f"{identity.get('tool')} {identity.get('tool_version')}"
    )


def leading_metric(tables: Tables, metric: str | None = None) -> str | None:
    """The metric asked for, else the study's leading one, else None."""
    if metric is not None:
        return metric
    names = tables.metric_names()
    return names[0] if names else None


def text_figure(title: str, text: str, footer: str = "") -> Figure:
    """A figure that says in words why there is nothing to draw."""
    fig = style.figure(height=1.3)
    if footer:
        style.footer(fig, footer)
    axes = fig.add_subplot()
    axes.set_axis_off()
    axes.text(0, 0.8, title, fontsize=9, weight="bold", va="center", transform=axes.transAxes)
    axes.text(
        0,
        0.6,
        "\n".join(textwrap.wrap(text, 130)),
        fontsize=8,
        va="top",
        transform=axes.transAxes,
    )
    return fig


def _panels(fig: Figure, count: int, columns: int, **options: Any) -> list:
    """``count`` axes in rows of ``columns``; the cells left over are blank."""
    columns = min(columns, count)
    grid = fig.subplots(math.ceil(count / columns), columns, squeeze=False, **options)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    return axes[:count]


def _line_grid(
    rows: list, lines: list[str], top: float, height: float, most: int = 5, **options: Any
) -> tuple:
    """A figure with an axes per (row, line), at most ``most`` lines abreast.

    Returns the figure, {(row, line): axes}, and {row: the axes in its first column}.
    """
    abreast = math.ceil(len(lines) / math.ceil(len(lines) / most))
    blocks = [lines[start : start + abreast] for start in range(0, len(lines), abreast)]
    fig = style.figure(height=top + height * len(rows) * len(blocks))
    grid = fig.subplots(len(blocks) * len(rows), abreast, squeeze=False, **options)
    cells = {}
    for number, block in enumerate(blocks):
        for position, row in enumerate(rows):
            strip = grid[number * len(rows) + position]
            for axes in strip[len(block) :]:
                axes.set_axis_off()
            for axes, line in zip(strip, block, strict=False):
                cells[row, line] = axes
                if position == 0:
                    axes.set_title(style.line_label(line))
    first = {row: [strip[0] for strip in grid[i :: len(rows)]] for i, row in enumerate(rows)}
    return fig, cells, first


def _empty(axes: Any) -> None:
    """A panel without an arm: neither ticks nor frame, but it keeps its labels."""
    axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.text(0.5, 0.5, "no arm", ha="center", va="center", color="#aaa", transform=axes.transAxes)


def _plain_log(axis: Any) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2, 3, 5, 7 over a decade, fewer over more."""
    low, high = axis.get_view_interval()
    span = high / low
    subs = (2, 3, 5, 7) if span < 10 else (2, 5) if span < 100 else (3,) if span < 1000 else ()
    plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    axis.set_minor_locator(matplotlib.ticker.LogLocator(subs=subs))
    axis.set_minor_formatter(plain)


def _legend(fig: Figure, tables: Tables, targets: bool = True, diverged: bool = False) -> None:
    """Colours of the scalings and line styles of the targets, above the panels."""
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    handles: list[Any] = [
        Line2D([], [], color=colour, lw=2, label=style.scaling_label(scaling))
        for scaling, colour in colours.items()
    ]
    kinds = style.order_targets(tables.runs["target"])
    if targets and len(kinds) > 1:
        handles += [
            Line2D([], [], color="#555", lw=1.2, ls=_line(kind), label=style.target_label(kind))
            for kind in kinds
        ]
    if diverged and (tables.runs["status"] == "diverged").any():
        handles.append(
            Line2D([], [], color="#c1121f", ls="", marker="X", ms=5, mec="white", label="diverged")
        )
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.8)


def _line(target: str) -> Any:
    return style.LINES.get(target, ":")


def _curves(tables: Tables, quantity: str, where: str | None = None) -> pd.DataFrame:
    """Thinned curves of one quantity, with the axes of their runs."""
    frame = tables.dynamics[tables.dynamics["quantity"] == quantity]
    if where is not None:
        frame = frame[frame["where"] == where]
    columns = ["run", "arm", "line", "skip_scaling", "target", "seed", "status", "skips"]
    return frame.merge(tables.runs[columns], on="run", validate="many_to_one")


def _over_seeds(frame: pd.DataFrame, column: str = "value") -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean over the runs in ``frame``, each read off at the longest run's steps."""
    runs = [group.sort_values("step") for _, group in frame.groupby("run")]
    steps = max((run["step"].to_numpy() for run in runs), key=lambda s: (s[-1], len(s)))
    values = []
    for run in runs:
        known = run[np.isfinite(run[column])]
        if known.empty:
            continue
        values.append(np.interp(steps, known["step"], known[column], left=np.nan, right=np.nan))
    if not values:
        return steps, np.full(len(steps), np.nan)
    stacked = np.array(values)
    count = np.isfinite(stacked).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return steps, np.where(count > 0, np.nansum(stacked, axis=0) / count, np.nan)


def _arms(frame: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(scaling, target, rows) of each arm in a panel, in the fixed order."""
    groups = dict(list(frame.groupby(["skip_scaling", "target"])))
    return [
        (scaling, target, groups[scaling, target])
        for scaling in style.order_scalings(frame["skip_scaling"])
        for target in style.order_targets(frame["target"])
        if (scaling, target) in groups
    ]


def _lost_runs(axes: Any, frame: pd.DataFrame, colours: dict[str, str]) -> None:
    """Every diverged run by itself: a thin line that ends in a red cross."""
    for _, run in frame[frame["status"] == "diverged"].groupby("run"):
        known = run[np.isfinite(run["value"])].sort_values("step")
        if known.empty:
            continue
        scaling, target = known["skip_scaling"].iloc[0], known["target"].iloc[0]
        axes.plot(known["step"], known["value"], color=colours[scaling], ls=_line(target), lw=0.6)
        axes.plot(
            known["step"].tail(1),
            known["value"].tail(1),
            color="#c1121f",
            marker="X",
            ms=5,
            mec="white",
            mew=0.5,
            zorder=5,
        )


def _steps_axis(axes: Any) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_thousands))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, integer=True))
    axes.tick_params(labelbottom=True)


def _thousands(value: float, _position: int = 0) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def _nothing(tables: Tables, title: str, quantity: str) -> Figure:
    return text_figure(title, f"No run of this selection logged {quantity}.", _made_of(tables))


def _time_curves(
    tables: Tables,
    quantity: str,
    title: str,
    label: str,
    more: str,
    where: str | None = None,
) -> Figure:
    """Small multiples per backbone: the mean over seeds of a quantity over training."""
    frame = _curves(tables, quantity, where)
    if frame.empty:
        return _nothing(tables, title, quantity)
    lines = style.order_lines(frame["line"])
    columns = min(3, len(lines))
    rows = math.ceil(len(lines) / columns)
    fig = style.figure(height=0.75 + 1.75 * rows)
    style.footer(fig, _made_of(tables, more=more))
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    panels = _panels(fig, len(lines), columns)
    for axes, line in zip(panels, lines, strict=True):
        panel = frame[frame["line"] == line]
        for scaling, target, arm in _arms(panel[panel["status"] != "diverged"]):
            steps, mean = _over_seeds(arm)
            axes.plot(steps, mean, color=colours[scaling], ls=_line(target), lw=1.1)
        _lost_runs(axes, panel, colours)
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
        axes.set_title(style.line_label(line))
        _steps_axis(axes)
    for axes in panels[::columns]:
        axes.set_ylabel(label)
    _legend(fig, tables, diverged=True)
    return fig


# --- quality -------------------------------------------------------------------------------------


@drawn
def quality_heatmap(tables: Tables, metric: str | None = None) -> Figure:
    """Mean of a metric, backbone × skip scaling, one panel per target; diverged arms hatched."""
    metric = leading_metric(tables, metric)
    if metric is None:
        return text_figure("Quality", "No run has been evaluated.", _made_of(tables))
    rows = tables.summary[tables.summary["metric"] == metric]
    lines = style.order_lines(rows["line"])
    scalings = style.order_scalings(rows["skip_scaling"])
    targets = style.order_targets(rows["target"])
    lower = bool((rows["better"] == "lower").all())
    values = rows["mean"].to_numpy(dtype=float)
    finite = values[np.isfinite(values)]
    fig = style.figure(height=0.95 + 0.46 * len(lines))
    style.footer(
        fig,
        _made_of(
            tables,
            metric,
            f"Cells: mean over the runs that finished, below it the 95 % bootstrap interval of "
            f"the mean (n > 1). {'Lower' if lower else 'Higher'} is better; a frame marks each "
            f"row's best mean in a panel, which is not a test.",
        ),
    )
    panels = _panels(fig, len(targets), len(targets))
    spread = len(finite) > 1 and finite.max() > finite.min()
    log = spread and finite.min() > 0 and finite.max() / finite.min() > 3
    bounds = (finite.min(), finite.max()) if spread else (0.0, 1.0)
    norm = LogNorm(*bounds) if log else Normalize(*bounds)
    palette = sns.color_palette("cividis_r" if lower else "cividis", as_cmap=True)
    for index, (axes, target) in enumerate(zip(panels, targets, strict=True)):
        here = rows[rows["target"] == target].set_index(["line", "skip_scaling"])
        table = here["mean"].unstack().reindex(index=lines, columns=scalings).astype(float)
        sns.heatmap(
            table,
            ax=axes,
            norm=norm,
            cmap=palette,
            cbar=False,
            linewidths=1.5,
            linecolor="white",
        )
        for i, line in enumerate(lines):
            for j, scaling in enumerate(scalings):
                _heat_cell(axes, i, j, here, (line, scaling), norm, palette)
            if table.loc[line].notna().sum() > 1:
                best = table.loc[line].idxmin() if lower else table.loc[line].idxmax()
                axes.add_patch(
                    Rectangle(
                        (scalings.index(best) + 0.035, i + 0.045),
                        0.93,
                        0.91,
                        fill=False,
                        ec="#c1121f",
                        lw=1.4,
                        zorder=6,
                    )
                )
        axes.grid(False)
        axes.set(xlabel="skip scaling", ylabel="")
        axes.set_title(style.target_label(target) if len(targets) > 1 else "")
        axes.set_xticklabels([style.scaling_label(s) for s in scalings], rotation=0)
        axes.tick_params(length=0)
        names = [style.line_label(line) for line in lines] if index == 0 else []
        axes.set_yticks(np.arange(len(names)) + 0.5, names, rotation=0)
    fig.suptitle(
        f"{style.metric_label(metric)} ({'lower' if lower else 'higher'} is better)",
        fontsize=9,
        weight="bold",
        x=0.01,
        ha="left",
    )
    return fig


def _heat_cell(
    axes: Any, i: int, j: int, rows: pd.DataFrame, key: tuple, norm: Any, palette: Any
) -> None:
    """The words of one cell: mean and interval, or why there is none."""
    if key not in rows.index:
        axes.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color="#999")
        return
    row = rows.loc[key]
    if isinstance(row, pd.DataFrame):
        raise UserError(f"two arms share the cell {key[0]} x {key[1]}")
    lost, runs = int(row["n_diverged"]), int(row["n_runs"])
    if pd.isna(row["mean"]):
        word = absent(row).replace(" ", "\n")
        axes.add_patch(
            Rectangle(
                (j + 0.02, i + 0.02),
                0.96,
                0.96,
                hatch="/////" if lost else "",
                fc="#f1f1f1",
                ec="#b9b9b9",
                lw=0,
            )
        )
        count = f"\n{lost} of {runs}" if lost else ""
        box = {"fc": "white", "ec": "none", "pad": 1.2}
        axes.text(
            j + 0.5,
            i + 0.5,
            word + count,
            ha="center",
            va="center",
            fontsize=6.2,
            color="#444",
            bbox=box,
        )
        return
    red, green, blue, _ = palette(norm(row["mean"]))
    ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "#111111"
    small = ""
    if pd.notna(row["ci_low"]):
        low, high = (short(row[end], like=row["mean"]) for end in ("ci_low", "ci_high"))
        small = f"[{low}, {high}]"
    extra = f"{lost}/{runs} diverged" if lost else ""
    detail = "\n".join(part for part in (small, extra) if part)
    axes.text(
        j + 0.5,
        i + (0.5 if not detail else 0.33),
        short(row["mean"]),
        ha="center",
        va="center",
        color=ink,
        fontsize=7.5,
    )
    axes.text(
        j + 0.5,
        i + (0.72 if len(detail.splitlines()) < 2 else 0.74),
        detail,
        ha="center",
        va="center",
        color=ink,
        fontsize=5,
        linespacing=1.1,
    )


def absent(row: Any) -> str:
    """Why an arm (a row of ``summary.csv``) has no mean in the column of a metric."""
    if row["n_diverged"]:
        return "diverged"
    if row["n_otherwise"]:
        return OTHERWISE
    return NOT_MEASURED if row["n_not_measured"] else "missing"


def short(value: float, like: float | None = None) -> str:
    """Three significant digits of ``like`` (of the value itself by default), without an exponent
    where that is readable.
    """
    scale = abs(value if like is None else like)
    if scale == 0:
        return f"{value:.3g}"
    if 1e-3 <= scale < 1e5:
        return f"{value:.{max(0, 2 - math.floor(math.log10(scale)))}f}"
    return f"{value:.2g}"


@drawn
def comparisons(tables: Tables, metric: str | None = None) -> Figure:
    """Paired differences to the unscaled DSM arm of the same backbone, with intervals."""
    metric = leading_metric(tables, metric)
    rows = tables.comparisons[tables.comparisons["metric"] == (metric or "")]
    rows = rows[rows["n_pairs"] > 0]
    title = "Paired differences to the unscaled DSM arm"
    if rows.empty:
        return text_figure(
            title, "No arm shares a finished seed with its unscaled DSM arm.", _made_of(tables)
        )
    lines = style.order_lines(rows["line"])
    scalings = style.order_scalings(rows["skip_scaling"])
    targets = style.order_targets(rows["target"])
    made = set(zip(rows["skip_scaling"], rows["target"], strict=True))
    order = [(s, t) for s in scalings for t in targets if (s, t) in made]
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    pairs = sorted(set(rows["n_pairs"]))
    tested = bool(rows["p_value"].notna().any())
    fig, cells, first = _line_grid(["all"], lines, 0.95, 0.16 * len(order) + 0.2)
    words = (
        "Bars: Student 95 % interval of the mean paired difference; filled marks: Holm-corrected "
        "p < 0.05 over the tests of that backbone."
        if tested
        else "One pair per arm: no interval and no test; differences are shown, not claimed."
    )
    absent = [line for line in style.order_lines(tables.runs["line"]) if line not in lines]
    if absent:
        words += f" Nothing to compare: {', '.join(map(style.line_label, absent))}."
    style.footer(
        fig, _made_of(tables, metric, f"Pairs per arm: {', '.join(map(str, pairs))}. {words}")
    )
    for (_, line), axes in cells.items():
        axes.axvline(0, color="#888", lw=0.8, zorder=1)
        for position, key in enumerate(order):
            found = rows[
                (rows["line"] == line)
                & (rows["skip_scaling"] == key[0])
                & (rows["target"] == key[1])
            ]
            for row in found.itertuples():
                colour = colours[key[0]]
                if pd.notna(row.ci_low):
                    axes.plot(
                        [row.ci_low, row.ci_high],
                        [position] * 2,
                        color=colour,
                        lw=1.3,
                        ls="-",
                    )
                significant = pd.notna(row.p_holm) and row.p_holm < 0.05
                axes.plot(
                    [row.mean_difference],
                    [position],
                    marker="o" if key[1] == "dsm" else "D",
                    color=colour,
                    ms=4,
                    mfc=colour if significant else "white",
                    mew=1.1,
                )
        axes.grid(False, axis="y")
        axes.set_xlabel("difference")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
        axes.set_yticks(range(len(order)), [])
        axes.set_ylim(len(order) - 0.5, -0.5)
    for axes in first["all"]:
        axes.set_yticks(
            range(len(order)),
            [f"{style.scaling_label(s)}, {style.target_label(t)}" for s, t in order],
        )
    side = "left" if rows["better"].iloc[0] == "lower" else "right"
    fig.suptitle(
        f"{style.metric_label(metric)}: paired difference to no scaling, DSM "
        f"({side} of zero is better)",
        fontsize=9,
        weight="bold",
        x=0.01,
        ha="left",
    )
    return fig


# --- training dynamics ---------------------------------------------------------------------------


@drawn
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


@drawn
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


@drawn
def loss_by_noise(tables: Tables) -> Figure:
    """Loss against the noise level at the end of training."""
    frame = _curves(tables, "loss_by_noise")
    frame = frame[frame["status"] != "diverged"]
    if frame.empty:
        return _nothing(tables, "Loss by noise level", "loss_by_noise")
    lines = style.order_lines(frame["line"])
    columns = min(3, len(lines))
    fig = style.figure(height=0.75 + 1.75 * math.ceil(len(lines) / columns))
    style.footer(
        fig,
        _made_of(
            tables,
            more="Mean loss in each noise bin over the last quarter of training and over seeds; "
            "diverged runs left out.",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    panels = _panels(fig, len(lines), columns)
    for axes, line in zip(panels, lines, strict=True):
        for scaling, target, arm in _arms(frame[frame["line"] == line]):
            late = arm[arm["step"] >= 0.75 * arm["step"].max()]
            mean = late.assign(sigma=late["where"].astype(float)).groupby("sigma")["value"].mean()
            axes.plot(
                mean.index,
                mean.to_numpy(),
                color=colours[scaling],
                ls=_line(target),
                marker=".",
                ms=3,
            )
        axes.set(xscale="log", yscale="log", xlabel="noise level σ")
        _plain_log(axes.yaxis)
        axes.set_title(style.line_label(line))
    for axes in panels[::columns]:
        axes.set_ylabel("training loss")
    _legend(fig, tables)
    return fig


# --- norms of features and skips -----------------------------------------------------------------


@drawn
def feature_norms(tables: Tables, quantity: str = "decoder_norm_after") -> Figure:
    """Norm of the last decoder block's output over training, with its oscillation."""
    title = "Decoder feature norm"
    frame = _curves(tables, quantity, "1")
    if frame.empty:
        return _nothing(tables, title, quantity)
    lines = style.order_lines(frame["line"])
    targets = style.order_targets(frame["target"])
    fig, cells, first = _line_grid(targets, lines, 0.75, 1.45, sharex=True)
    what = (
        "mean over samples of the L2 norm"
        if quantity == "decoder_norm_after"
        else "L2 norm over the whole batch"
    )
    style.footer(
        fig,
        _made_of(
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
            _empty(axes)
            continue
        for scaling, _, arm in _arms(panel[panel["status"] != "diverged"]):
            raw = arm[arm["run"] == arm.sort_values(["seed", "run"])["run"].iloc[0]]
            axes.fill_between(
                raw["step"],
                raw["minimum"],
                raw["maximum"],
                color=colours[scaling],
                alpha=0.22,
                lw=0,
            )
            steps, mean = _over_seeds(arm)
            known = np.isfinite(mean)
            axes.plot(
                steps[known], statistics.smooth(mean[known], 3), color=colours[scaling], lw=1.2
            )
        _lost_runs(axes, panel, colours)
        lowest[line] = axes
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.set_ylim(bottom=0)
    for target, column in first.items():
        for axes in column:
            axes.set_ylabel(f"{style.target_label(target)}\nfeature norm")
    for axes in lowest.values():
        _steps_axis(axes)
    _legend(fig, tables, targets=False, diverged=True)
    return fig


@drawn
def skip_norms(tables: Tables) -> Figure:
    """Norm of every long skip at the end of training, before and after its factor."""
    title = "Norms of the long skips"
    before = _final(_curves(tables, "skip_norm"))
    after = _final(_curves(tables, "skip_norm_scaled"))
    if before.empty:
        return _nothing(tables, title, "skip_norm")
    lines = style.order_lines(before["line"])
    targets = style.order_targets(before["target"])
    fig, cells, first = _line_grid(targets, lines, 0.75, 1.45)
    style.footer(
        fig,
        _made_of(
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
            _empty(axes)
            continue
        for data, look in (
            (before, {"ls": ":", "lw": 0.9}),
            (after, {"ls": "-", "lw": 1.2, "marker": ".", "ms": 4}),
        ):
            panel = data[(data["line"] == line) & (data["target"] == target)]
            for scaling, _, arm in _arms(panel):
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
    _legend(fig, tables, targets=False)
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


@drawn
def skip_factors(tables: Tables) -> Figure:
    """The factor that each long skip really has: constants as set, gates as learned."""
    title = "Factors on the long skips"
    rows = tables.runs[tables.runs["status"] != "missing"]
    constant = rows[(rows["skip_factors"] != "") & ~rows["skip_factors"].str.contains("learned")]
    learned = _final(_curves(tables, "gate_mean"))
    if constant.empty and learned.empty:
        return _nothing(tables, title, "skip factors")
    lines = style.order_lines([*constant["line"], *learned["line"]])
    fig, cells, first = _line_grid(["factor"], lines, 0.65, 1.5, sharey=True)
    style.footer(
        fig,
        _made_of(
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
    _legend(fig, tables, targets=False)
    return fig


@drawn
def gates(tables: Tables) -> Figure:
    """Learned gates over training, by long skip."""
    title = "Learned gates"
    frame = _curves(tables, "gate_mean")
    if frame.empty:
        return text_figure(
            title, "No arm of this selection has a learned scaling.", _made_of(tables)
        )
    frame = frame.assign(index=frame["where"].astype(int))
    kinds = [(s, t) for s, t, _ in _arms(frame)]
    lines = style.order_lines(frame["line"])
    fig, cells, first = _line_grid(kinds, lines, 0.6, 1.0, sharex=True)
    style.footer(
        fig,
        _made_of(
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
            _empty(axes)
            continue
        axes.grid(False)
        lowest[line] = axes
        indices = sorted(set(cell["index"]))
        curves = [_over_seeds(cell[cell["index"] == index]) for index in indices]
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
        _steps_axis(axes)
    fig.colorbar(
        picture, ax=list(cells.values()), label="mean gate", shrink=0.6, aspect=30, pad=0.01
    )
    return fig


# --- samples -------------------------------------------------------------------------------------


def read_samples(path: str | Path, count: int) -> np.ndarray:
    """The first ``count`` images of a samples file: uint8 [n, H, W, C]; the rest stays unread."""
    path = Path(path)
    with bounded.reading(path, "a samples file"), zipfile.ZipFile(path) as archive:
        info = bounded.array_member(path, archive, "arr_0")
        with archive.open(info) as stream:
            shape, fortran, dtype = bounded.check_array(stream, info.file_size)
            if fortran or dtype != np.uint8 or len(shape) != 4:
                raise UserError(f"{path}: arr_0 is {dtype} {shape}; samples are uint8 [n, H, W, C]")
            count = min(count, shape[0])
            size = count * math.prod(shape[1:])
            return np.frombuffer(stream.read(size), dtype).reshape(count, *shape[1:])


def _tile(images: np.ndarray, side: int, gap: int) -> np.ndarray:
    """The images in a square of ``side`` x ``side``, with white gaps: uint8 [h, w, 3]."""
    _, height, width, channels = images.shape
    sheet = np.full((side * (height + gap) - gap, side * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images[: side * side]):
        top, left = index // side * (height + gap), index % side * (width + gap)
        sheet[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
    return sheet


@drawn
def sample_grids(tables: Tables) -> Figure:
    """Samples of every arm from the same latents: backbones down, skip scalings across."""
    runs = tables.runs
    lines = style.order_lines(runs["line"])
    scalings = style.order_scalings(runs["skip_scaling"])
    targets = style.order_targets(runs["target"])
    if tables.results is None:
        return text_figure("Samples", "The results folder is not known.", _made_of(tables))
    first = runs.assign(_order=pd.to_numeric(runs["seed"], errors="coerce"))
    first = first.sort_values(["_order", "seed", "run"]).drop_duplicates("arm")
    shown = first[first["generation"].isin(["done", "diverged"])]
    seeds = sorted(set(shown["sampling_seed"].dropna()))
    samplers = sorted(set(shown["sampler"]) - {""})
    same = len(seeds) <= 1 and len(samplers) <= 1
    words = (
        f"The same latents everywhere (sampling seed {', '.join(map(str, seeds))}), first "
        "training seed of each arm, not selected."
        if same
        else "Sampling seeds or samplers differ between runs: tiles do not share their latents."
    )
    stacked = len(scalings) * len(targets) > 10
    # Stacked panels share their columns; others have the scalings of their own arms only.
    columns = {
        target: scalings
        if stacked
        else style.order_scalings(runs.loc[runs["target"] == target, "skip_scaling"])
        for target in targets
    }
    across = len(scalings) if stacked else sum(map(len, columns.values()))
    down = len(lines) * (len(targets) if stacked else 1)
    cell = min((style.WIDTH - 0.75) / across, 1.1)
    heads = 0.35 * (len(targets) if stacked else 1)
    fig = style.figure(min(style.WIDTH, cell * across + 0.95), 0.27 + heads + cell * 1.02 * down)
    style.footer(fig, _made_of(tables, more=words))
    shape = (len(targets), 1) if stacked else (1, len(targets))
    widths = None if stacked else [len(own) for own in columns.values()]
    parts = list(fig.subfigures(*shape, squeeze=False, width_ratios=widths).flat)
    index = first.set_index(["line", "skip_scaling", "target"])
    for number, (part, target) in enumerate(zip(parts, targets, strict=True)):
        grid = part.subplots(len(lines), len(columns[target]), squeeze=False)
        for i, line in enumerate(lines):
            for j, scaling in enumerate(columns[target]):
                axes, key = grid[i][j], (line, scaling, target)
                axes.set(xticks=[], yticks=[], aspect="equal")
                for spine in axes.spines.values():
                    spine.set_visible(False)
                _sample_cell(axes, tables, index.loc[key] if key in index.index else None)
                if i == 0:
                    axes.set_title(style.scaling_label(scaling), fontsize=6, loc="center", pad=3)
                if j == 0 and (number == 0 or stacked):
                    words = textwrap.wrap(style.line_label(line), 14)
                    axes.set_ylabel("\n".join(words), fontsize=6.5)
        part.suptitle(style.target_label(target), fontsize=8, weight="bold")
    return fig


def _sample_cell(axes: Any, tables: Tables, row: Any) -> None:
    if row is None:
        return
    path = tables.results / "runs" / row["run"] / "generate" / "samples.npz"
    images = np.zeros((0, 1, 1, 1), np.uint8)
    if row["status"] == "done" and path.is_file():
        size = read_samples(path, 1).shape[1:] or (1,)
        side = 4 if size[0] <= 16 else 3
        images = read_samples(path, side * side)
        facts = path.with_name("generate.json")
        facts = read_json(facts) if facts.is_file() else {}
        broken = [seed - facts["seed"] for seed in facts.get("not_finite_seeds") or ()]
        images = in_order(images, broken, side * side) if len(images) else images
    if len(images):
        axes.imshow(_tile(images, side, 1 + size[0] // 32), interpolation="nearest")
        return
    lost = row["status"] == "diverged"
    broken = row["status"] == "done" and row["generation"] in ("diverged", "skipped")
    word = "not\nfinite" if broken else "no\nsamples"
    word = f"diverged\nat step\n{row['step']}" if lost else word
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.add_patch(
        Rectangle(
            (0, 0), 1, 1, hatch="/////" if lost or broken else "", fc="#f1f1f1", ec="#b9b9b9", lw=0
        )
    )
    axes.text(
        0.5,
        0.5,
        word,
        ha="center",
        va="center",
        fontsize=5.2,
        color="#333",
        bbox={"fc": "white", "ec": "none", "pad": 0.8},
    )


# --- cost ----------------------------------------------------------------------------------------


@drawn
def cost(tables: Tables, metric: str | None = None) -> Figure:
    """Quality against training time, parameters and speed of generation."""
    metric = leading_metric(tables, metric)
    summary = tables.summary[tables.summary["metric"] == (metric or "")]
    panels = [
        ("parameters", "parameters"),
        ("train_seconds", "training time (s)"),
        ("generate_images_per_second", "images generated per second"),
    ]
    done = tables.cost[tables.cost["status"] == "done"]
    means = done.groupby("arm")[[column for column, _ in panels]].mean().reset_index()
    arms = summary.merge(means, on="arm")
    arms = arms[arms["mean"].notna()]
    if arms.empty:
        return text_figure(
            "Cost", "No arm has both a measured cost and a quality.", _made_of(tables)
        )
    lower = bool((arms["better"] == "lower").all())
    devices = sorted(set(done["device"]) - {""})
    fig = style.figure(height=2.75)
    style.footer(
        fig,
        _made_of(
            tables,
            metric,
            "Mean per arm over its finished seeds, with the 95 % bootstrap interval of the metric "
            "(n > 1). Times were measured on "
            + (", ".join(devices) or "an unknown device")
            + "; runs that shared the machine are slower. The grey step is the best metric seen "
            "up to that cost.",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    families = tables.runs.drop_duplicates("line").set_index("line")["family"].to_dict()
    marks = style.markers(families, families)
    axes_list = _panels(fig, len(panels), len(panels), sharey=True)
    for axes, (column, label) in zip(axes_list, panels, strict=True):
        known = arms[arms[column].notna()]
        _frontier(axes, known, column, lower)
        for row in known.itertuples():
            x, colour = getattr(row, column), colours[row.skip_scaling]
            if pd.notna(row.ci_low):
                axes.plot([x, x], [row.ci_low, row.ci_high], color=colour, lw=0.7, alpha=0.6)
            axes.plot(
                [x],
                [row.mean],
                marker=marks[row.line],
                ms=4.5,
                color=colour,
                mew=0.9,
                ls="",
                mfc=colour if row.target == "dsm" else "white",
            )
        values = known[column].to_numpy(dtype=float)
        if len(values) and values.min() > 0 and values.max() / values.min() > 8:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
            axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_thousands))
        axes.set_xlabel(label)
    side = "lower" if lower else "higher"
    axes_list[0].set_ylabel(f"{style.metric_label(metric)}\n({side} is better)")
    handles = [
        Patch(color=colour, label=style.scaling_label(scaling))
        for scaling, colour in colours.items()
    ]
    for line in style.order_lines(arms["line"]):
        handles.append(
            Line2D(
                [],
                [],
                marker=marks[line],
                ls="",
                color="#555",
                ms=4.5,
                label=style.line_label(line),
            )
        )
    if (arms["target"] != "dsm").any():
        handles.append(
            Line2D(
                [],
                [],
                marker="o",
                ls="",
                color="#555",
                mfc="white",
                label="hollow: STF",
            )
        )
    widest = max(len(handle.get_label()) for handle in handles)
    fig.legend(
        handles=handles,
        loc="outside upper center",
        ncols=max(1, min(math.ceil(len(handles) / 2), 120 // (widest + 6))),
        handlelength=1.2,
        columnspacing=1.2,
    )
    return fig


def _frontier(axes: Any, arms: pd.DataFrame, column: str, lower: bool) -> None:
    """The best metric reached at or below each cost; speed counts downwards."""
    fast = column.endswith("per_second")
    ordered = arms.sort_values(column, ascending=not fast)
    best = ordered["mean"].cummin() if lower else ordered["mean"].cummax()
    axes.step(
        ordered[column],
        best,
        where="post",
        color="#bdbdbd",
        lw=1,
        zorder=0,
    )


# --- divergence ----------------------------------------------------------------------------------


@drawn
def divergence(tables: Tables) -> Figure:
    """Which runs diverged, when, and why."""
    runs = tables.runs
    lost = runs[runs["status"] == "diverged"]
    if lost.empty:
        finished = int((runs["status"] == "done").sum())
        if not finished:
            return text_figure("Divergence", "No run has finished yet.", _made_of(tables))
        return text_figure(
            "No run diverged",
            f"All {finished} runs that finished kept finite losses, gradients and weights to "
            "their last step, and none was stopped by the divergence rule. That says nothing "
            "about longer training or larger learning rates.",
            _made_of(tables),
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
    style.footer(fig, _made_of(tables, more=more))
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.25))
    started = runs[runs["status"] != "missing"]
    group = started.assign(lost=started["status"] == "diverged").groupby(["line", "skip_scaling"])
    share = group["lost"].mean().unstack().reindex(index=lines, columns=scalings)
    count = group["lost"].sum().unstack().reindex(index=lines, columns=scalings)
    total = group["lost"].size().unstack().reindex(index=lines, columns=scalings)
    words = [
        [
            "" if pd.isna(total.iloc[i, j]) else f"{count.iloc[i, j]:.0f}/{total.iloc[i, j]:.0f}"
            for j in range(len(scalings))
        ]
        for i in range(len(lines))
    ]
    sns.heatmap(
        share.astype(float),
        ax=left,
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
    left.grid(False)
    left.set(xlabel="skip scaling", ylabel="")
    left.set_title("runs that diverged")
    names = [style.scaling_label(s).replace("LS unshared", "LS\nunshared") for s in scalings]
    left.set_xticklabels(names, rotation=0)
    left.set_yticklabels([style.line_label(line) for line in lines], rotation=0)
    left.tick_params(length=0)
    colours = style.scaling_colours(runs["skip_scaling"])
    names = []
    for position, row in enumerate(shown.itertuples()):
        right.plot([0, row.steps], [position] * 2, color="#e3e3e3", lw=3, solid_capstyle="butt")
        right.plot(
            [0, row.step],
            [position] * 2,
            color=colours[row.skip_scaling],
            lw=3,
            solid_capstyle="butt",
        )
        right.plot([row.step], [position], marker="X", color="#c1121f", ms=5, mec="white", mew=0.5)
        right.text(row.steps, position, f" {row.reason}", va="center", fontsize=5.8, color="#444")
        names.append(
            f"{style.line_label(row.line)}, {style.scaling_label(row.skip_scaling)}, "
            f"{style.target_label(row.target)}, seed {row.seed}"
        )
    right.set_yticks(range(len(names)), names, fontsize=6)
    right.set_ylim(len(names) - 0.4, -0.6)
    longest = int(shown["steps"].max())
    right.set_xlim(0, longest * 1.3)
    right.grid(False, axis="y")
    right.set_title("step at which they diverged")
    _steps_axis(right)
    ticks = matplotlib.ticker.MaxNLocator(4).tick_values(0, longest)
    right.set_xticks([tick for tick in ticks if 0 <= tick <= longest])
    return fig


# --- stability ------------------------------------------------------------------------------------


@drawn
def stability(tables: Tables) -> Figure:
    """Stability of every scaled arm as a factor of the unscaled arm of its backbone and target."""
    rows = tables.stability
    rows = rows[(rows["against"] == "none") & rows["factor"].notna()]
    if rows.empty:
        return text_figure(
            "Stability against the unscaled arm",
            "No scaled arm shares a finished seed with its unscaled arm.",
            _made_of(tables),
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
    pairs = sorted(set(rows["n_pairs"]))
    mean = overall(tables.stability_pairs)
    mean = mean[(mean["against"] == "none") & mean["factor"].notna()]
    lines = [ALL] * (not mean.empty) + style.order_lines(rows["line"])
    rows = rows if mean.empty else pd.concat([mean, rows])
    height = 0.44 + (0.085 + 0.035 * len(targets)) * len(scalings)
    fig, cells, first = _line_grid(measures, lines, 1.0, height, most=6)
    tested = bool(rows["p_value"].notna().any())
    style.footer(
        fig,
        _made_of(
            tables,
            more=f"Pairs of runs with equal seeds per arm: {', '.join(map(str, pairs))}. "
            + (
                "Bars: Student 95 % interval of the mean log ratio, as factors; they may leave the "
                "panel. "
                if (rows["factor_low"] < rows["factor_high"]).any()
                else ""
            )
            + (
                "All backbones: geometric mean of the backbones' factors in each seed that is "
                "whole on all of them. "
                if len(mean)
                else ""
            )
            + (
                "Filled: Holm-corrected p < 0.05 over the tests of that measure and panel. "
                if tested
                else "No test is possible (too few pairs, or none that differ in their factor): "
                "factors are shown, not claimed. "
            )
            + " ".join(f"{m.label.capitalize()}: {m.words}." for m in measures),
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    for measure in measures:
        here = rows[rows["measure"] == measure.name]
        low, high = _factor_range(here)
        for line in lines:
            axes = cells[measure, line]
            axes.axvline(1, color="#888", lw=0.8, zorder=1)
            for row in here[here["line"] == line].itertuples():
                place, colour = places[row.skip_scaling, row.target], colours[row.skip_scaling]
                if pd.notna(row.factor_low):
                    axes.plot([row.factor_low, row.factor_high], [place] * 2, color=colour, lw=1.2)
                sure = pd.notna(row.p_holm) and row.p_holm < 1 - statistics.LEVEL
                axes.plot(
                    [row.factor],
                    [place],
                    marker="o" if row.target == "dsm" else "D",
                    color=colour,
                    ms=3.8 if row.target == "dsm" else 3.2,
                    mfc=colour if sure else "white",
                    mew=1,
                )
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(_factor_ticks(low, high)))
            axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
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
    shapes = {"dsm": ("o", 3.8)}
    handles = [
        Line2D([], [], ls="", marker=marker, ms=size, color="#555", mfc="white", label=label)
        for marker, size, label in (
            (*shapes.get(target, ("D", 3.2)), style.target_label(target)) for target in targets
        )
        if len(targets) > 1
    ]
    if tested:
        handles.append(
            Line2D([], [], ls="", marker="o", ms=3.8, color="#555", label="Holm p < 0.05")
        )
    if handles:
        fig.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    fig.suptitle(
        "Factor against no scaling, same backbone and target",
        fontsize=9,
        weight="bold",
        x=0.01,
        ha="left",
    )
    return fig


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


# Further figures stand in files of their own and register themselves.
import study.analysis.figures_networks  # noqa: E402
import study.analysis.figures_scaling_laws  # noqa: E402
import study.analysis.figures_stability  # noqa: E402
import study.analysis.figures_targets  # noqa: E402, F401
