"""What figures share: their look, their small print, and the panels of a grid of arms."""

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.analysis import style
from study.analysis.names import NOT_MEASURED, OTHERWISE, better
from study.analysis.tables.read import Tables
from study.analysis.words import dataset_notes, describe_identity


def drawn(
    section: str = "more",
    probe: str | None = None,
    where: Callable[[Tables], bool] = lambda tables: True,
) -> Callable[..., Any]:
    """Mark a function as a figure, and give it the house's look.

    ``section`` is where it stands on the page. With ``probe`` it is drawn where a study has that,
    and only ``where`` its tables hold what it shows; ``applies`` says so of a study.
    """

    def mark(function: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(function)
        def styled(*arguments: Any, **options: Any) -> Figure:
            with style.look():
                figure = style.finish(function(*arguments, **options))
            figure.set_label(" ".join((function.__doc__ or "").split()))
            return figure

        styled.section, styled.probe = section, probe
        styled.applies = lambda tables: (probe is None or probe in tables.probes) and where(tables)
        return styled

    return mark


@dataclass(frozen=True)
class Part:
    """A data set of a study and the metric that is drawn of it: no other's numbers compare."""

    name: str
    metric: str
    tables: Tables

    @property
    def lower(self) -> bool:
        return better(self.metric) == "lower"

    @property
    def label(self) -> str:
        """The metric in words; of a data set that has no number yet that it has none."""
        rows = self.tables.metrics
        measured = rows.loc[rows["metric"] == self.metric, "value"].notna().any()
        return style.metric_label(self.metric) if measured else "nothing measured"


def parts_of(tables: Tables, metric: str | None = None) -> list[Part]:
    """Every data set with its leading metric, or with ``metric``; empty where nothing is known."""
    parts = [
        Part(name, metric or part.leading_metric() or "", part)
        for name, part in tables.by_dataset().items()
    ]
    return [part for part in parts if (part.tables.metrics["metric"] == part.metric).any()]


def made_of(tables: Tables, parts: Sequence[Part] = (), more: str = "") -> str:
    """The small print: runs, seeds, data sets and their notes, the identities of the metrics."""
    runs = tables.runs
    finished = runs["status"].isin(["done", "diverged"])
    apart = [
        f"{int((runs['status'] == state).sum())} {state}"
        for state in ("diverged", "running", "missing")
        if (runs["status"] == state).any()
    ]
    seeds = runs.groupby("arm")["run"].count()
    per_arm = f"n = {seeds.min()}" if seeds.nunique() <= 1 else f"n = {seeds.min()}–{seeds.max()}"
    facts = [
        f"{int(finished.sum())} of {len(runs)} runs"
        + (f" ({', '.join(apart)})" if apart else "")
        + f", {per_arm} seed{'s' if seeds.max() > 1 else ''} per arm",
        f"data set {', '.join(sorted(set(runs['dataset'])))}",
    ]
    states = pd.concat(
        [part.tables.metrics.query("metric == @part.metric")["status"] for part in parts]
        or [pd.Series(dtype=str)]
    )
    facts += [
        f"{int((states == state).sum())} {state}, not shown"
        for state in (OTHERWISE, NOT_MEASURED)
        if (states == state).any()
    ]
    for metric in dict.fromkeys(part.metric for part in parts):
        facts.append(describe_identity(metric, tables.identity(metric)))
    text = "; ".join(facts) + "."
    return " ".join([text, *([more] if more else []), *dataset_notes(runs)])


def headline(fig: Figure, text: str) -> None:
    fig.suptitle(text, fontsize=9, weight="bold", x=0.01, ha="left")


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


def panel_grid(fig: Figure, count: int, columns: int, **options: Any) -> list:
    """``count`` axes in rows of ``columns``; the cells left over are blank."""
    columns = min(columns, count)
    grid = fig.subplots(math.ceil(count / columns), columns, squeeze=False, **options)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    return axes[:count]


def line_grid(
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


def empty_panel(axes: Any) -> None:
    """A panel without an arm: neither ticks nor frame, but it keeps its labels."""
    axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.text(0.5, 0.5, "no arm", ha="center", va="center", color="#aaa", transform=axes.transAxes)


def plain_log_axis(axis: Any) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2, 3, 5, 7 over a decade, fewer over more."""
    low, high = axis.get_view_interval()
    span = high / low
    subs = (2, 3, 5, 7) if span < 10 else (2, 5) if span < 100 else (3,) if span < 1000 else ()
    plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    axis.set_minor_locator(matplotlib.ticker.LogLocator(subs=subs))
    axis.set_minor_formatter(plain)


def arm_legend(fig: Figure, tables: Tables, targets: bool = True, diverged: bool = False) -> None:
    """Colours of the scalings and line styles of the targets, above the panels."""
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    handles: list[Any] = [
        Line2D([], [], color=colour, lw=2, label=style.scaling_label(scaling))
        for scaling, colour in colours.items()
    ]
    kinds = style.order_targets(tables.runs["target"])
    if targets and len(kinds) > 1:
        handles += [
            Line2D(
                [], [], color="#555", lw=1.2, ls=line_style(kind), label=style.target_label(kind)
            )
            for kind in kinds
        ]
    if diverged and (tables.runs["status"] == "diverged").any():
        handles.append(
            Line2D([], [], color="#c1121f", ls="", marker="X", ms=5, mec="white", label="diverged")
        )
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.8)


def line_style(target: str) -> Any:
    return style.LINES.get(target, ":")


def steps_axis(axes: Any) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(thousands))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, integer=True))
    axes.tick_params(labelbottom=True)


def thousands(value: float, _position: int = 0) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def curves_of(tables: Tables, quantity: str, where: str | None = None) -> pd.DataFrame:
    """Thinned curves of one quantity, with the axes of their runs."""
    frame = tables.dynamics[tables.dynamics["quantity"] == quantity]
    if where is not None:
        frame = frame[frame["where"] == where]
    columns = ["run", "arm", "line", "skip_scaling", "target", "seed", "status", "skips"]
    return frame.merge(tables.runs[columns], on="run", validate="many_to_one")


def mean_over_seeds(frame: pd.DataFrame, column: str = "value") -> tuple[np.ndarray, np.ndarray]:
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


def arms_of(frame: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(scaling, target, rows) of each arm in a panel, in the fixed order."""
    groups = dict(list(frame.groupby(["skip_scaling", "target"])))
    return [
        (scaling, target, groups[scaling, target])
        for scaling in style.order_scalings(frame["skip_scaling"])
        for target in style.order_targets(frame["target"])
        if (scaling, target) in groups
    ]


def draw_lost_runs(axes: Any, frame: pd.DataFrame, colours: dict[str, str]) -> None:
    """Every diverged run by itself: a thin line that ends in a red cross."""
    for _, run in frame[frame["status"] == "diverged"].groupby("run"):
        known = run[np.isfinite(run["value"])].sort_values("step")
        if known.empty:
            continue
        scaling, target = known["skip_scaling"].iloc[0], known["target"].iloc[0]
        axes.plot(
            known["step"], known["value"], color=colours[scaling], ls=line_style(target), lw=0.6
        )
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


def not_logged(tables: Tables, title: str, quantity: str) -> Figure:
    return text_figure(title, f"No run of this selection logged {quantity}.", made_of(tables))


def probe_rows(tables: Tables, kind: str, *quantities: str) -> pd.DataFrame:
    """Rows of a probe with these quantities; empty where there are none."""
    rows = tables.probe(kind)
    return rows if rows.empty else rows[rows["quantity"].isin(quantities)]


def probed_words(frame: pd.DataFrame) -> str:
    """How many runs and seeds stand behind a probe's rows."""
    runs = frame.drop_duplicates("run")
    per_arm = runs.groupby("arm")["run"].count()
    low, high = per_arm.min(), per_arm.max()
    count = f"{low}" if low == high else f"{low}–{high}"
    seeds = sorted(set(runs["seed"].astype(str)), key=lambda seed: (len(seed), seed))
    plural = "s" if high > 1 else ""
    return f"Probed: {len(runs)} runs, n = {count} seed{plural} per arm (seeds {', '.join(seeds)})."
