"""What does quality cost in parameters, time and memory, and what do scalings add?"""

import math
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from study.analysis import style
from study.analysis.figures.base import (
    drawn,
    made_of,
    panel_grid,
    parts_of,
    probe_rows,
    text_figure,
    thousands,
)
from study.analysis.tables.axes import without_dataset
from study.analysis.tables.read import Tables


@drawn("cost")
def cost(tables: Tables, metric: str | None = None) -> Figure:
    """Quality against training time, parameters and speed of generation."""
    quantities = [
        ("parameters", "parameters"),
        ("train_seconds", "training time (s)"),
        ("generate_images_per_second", "images generated per second"),
    ]
    done = tables.cost[tables.cost["status"] == "done"]
    means = done.groupby("arm")[[column for column, _ in quantities]].mean().reset_index()
    shown = []
    for part in parts_of(tables, metric):
        rows = part.tables.summary
        rows = rows[(rows["metric"] == part.metric) & rows["mean"].notna()].merge(means, on="arm")
        shown += [(part, rows)] if len(rows) else []
    if not shown:
        return text_figure(
            "Cost", "No arm has both a measured cost and a quality.", made_of(tables)
        )
    devices = sorted(set(done["device"]) - {""})
    fig = style.figure(height=0.6 + 2.15 * len(shown))
    style.footer(
        fig,
        made_of(
            tables,
            [part for part, _ in shown],
            "Mean per arm over its finished seeds, with the 95 % bootstrap interval of the metric "
            "(n > 1). Times were measured on "
            + (", ".join(devices) or "an unknown device")
            + "; runs that shared the machine are slower. The grey step is the best metric seen "
            "up to that cost.",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    runs = without_dataset(tables.runs)
    families = runs.drop_duplicates("line").set_index("line")["family"].to_dict()
    lines = runs.drop_duplicates("arm").set_index("arm")["line"]
    marks = style.markers(families, families)
    width = len(quantities)
    panels = panel_grid(fig, width * len(shown), width, sharey="row")
    shown = [(part, arms.assign(line=arms["arm"].map(lines))) for part, arms in shown]
    for number, (part, arms) in enumerate(shown):
        strip = panels[number * width : (number + 1) * width]
        for axes, (column, label) in zip(strip, quantities, strict=True):
            known = arms[arms[column].notna()]
            _frontier(axes, known, column, part.lower)
            _cost_points(axes, known, column, colours, marks)
            axes.set_xlabel(label)
        side = f"({'lower' if part.lower else 'higher'} is better)"
        name = [part.name] if len(tables.by_dataset()) > 1 else []
        strip[0].set_ylabel("\n".join([*name, part.label, side]))
    arms = pd.concat([rows for _, rows in shown])
    _cost_legend(fig, arms, colours, marks)
    return fig


def _cost_points(axes: Any, arms: pd.DataFrame, column: str, colours: dict, marks: dict) -> None:
    """A mark for each arm, on an axis that is logarithmic where costs span a wide range."""
    for row in arms.itertuples():
        x, colour = getattr(row, column), colours[row.skip_scaling]
        if pd.notna(row.ci_low):
            axes.plot([x, x], [row.ci_low, row.ci_high], color=colour, lw=0.7, alpha=0.6)
        fill = colour if row.target == "dsm" else "white"
        look = {"marker": marks[row.line], "ms": 4.5, "mew": 0.9, "ls": ""}
        axes.plot([x], [row.mean], color=colour, mfc=fill, **look)
    values = arms[column].to_numpy(dtype=float)
    if len(values) and values.min() > 0 and values.max() / values.min() > 8:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(thousands))


def _cost_legend(fig: Figure, arms: pd.DataFrame, colours: dict, marks: dict) -> None:
    look = {"ls": "", "color": "#555"}
    handles: list[Any] = [
        Patch(color=colour, label=style.scaling_label(scaling))
        for scaling, colour in colours.items()
    ]
    handles += [
        Line2D([], [], marker=marks[line], ms=4.5, label=style.line_label(line), **look)
        for line in style.order_lines(arms["line"])
    ]
    if (arms["target"] != "dsm").any():
        handles.append(Line2D([], [], marker="o", mfc="white", label="hollow: STF", **look))
    widest = max(len(handle.get_label()) for handle in handles)
    fig.legend(
        handles=handles,
        loc="outside upper center",
        ncols=max(1, min(math.ceil(len(handles) / 2), 120 // (widest + 6))),
        handlelength=1.2,
        columnspacing=1.2,
    )


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


COSTS = {
    # quantity: (title, unit of the number beside it, divisor, more is better)
    "macs": ("multiply-adds", "MMAC", 1e6, False),
    "activation_memory": ("activation memory", "KiB", 2**10, False),
    "train_step": ("training step", "ms", 1e-3, False),
    "evaluation_throughput": ("network evaluation", "µs", 1e-6, True),
    "train_energy": ("energy of a step", "J", 1.0, False),
}


def _scaled(value: float, unit: str) -> str:
    """Three digits, in a unit with a larger prefix where the number is long."""
    larger = {"MMAC": ("GMAC", 1e3), "KiB": ("MiB", 2**10), "ms": ("s", 1e3), "µs": ("ms", 1e3)}
    while value >= 1000 and unit in larger:
        unit, factor = larger[unit]
        value /= factor
    return f"{value:.3g} {unit}"


@drawn("cost", probe="cost")
def compute_cost(tables: Tables) -> Figure:
    """Operations, memory and time of every arm relative to the same backbone without scaling."""
    title = "Computational cost"
    rows = probe_rows(tables, "cost", *COSTS)
    rows = rows if rows.empty else rows[rows["value"].notna()]
    if rows.empty:
        return text_figure(title, "No arm of this selection was measured.", made_of(tables))
    rows = rows.assign(value=rows["value"].astype(float))
    inverse = rows["quantity"] == "evaluation_throughput"
    rows.loc[inverse, "value"] = 1 / rows.loc[inverse, "value"]
    keys = ["quantity", "line", "skip_scaling", "target"]
    means = rows.groupby(keys)["value"].mean().reset_index()
    lines = style.order_lines(means["line"])
    scalings = style.order_scalings(means["skip_scaling"])
    targets = style.order_targets(means["target"])
    quantities = [quantity for quantity in COSTS if (means["quantity"] == quantity).any()]
    batches = {
        quantity: "/".join(str(n) for n in sorted(set(group["batch"])))
        for quantity, group in rows.groupby("quantity")
    }
    fig = style.figure(height=0.95 + 0.62 * len(lines))
    style.footer(
        fig,
        made_of(
            tables,
            more="Mean over seeds, relative to the unscaled "
            f"{style.target_label(targets[0])} arm of the backbone, whose own value stands in "
            "grey (per image; a step of "
            f"{batches.get('train_step', '?')} images, evaluations of "
            f"{batches.get('evaluation_throughput', '?')} at a time). Multiply-adds of a forward "
            "pass in matrix products, convolutions and attention; memory that a training step "
            "keeps for its backward pass; shortest times on "
            f"{', '.join(sorted(set(rows['device'])))}. Times scatter with what else the "
            "machine does; counts do not.",
        ),
    )
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    panels = panel_grid(fig, len(quantities), len(quantities), sharey=True)
    for axes, quantity in zip(panels, quantities, strict=True):
        panel = means[means["quantity"] == quantity]
        _relative_costs(axes, quantity, panel, lines, scalings, targets[0], colours)
        axes.set_title(COSTS[quantity][0])
        axes.set_xlabel("relative to none")
        axes.set_yticks(range(len(lines)), [style.line_label(line) for line in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.grid(False, axis="y")
        for edge in range(1, len(lines)):
            axes.axhline(edge - 0.5, color="#e6e6e6", lw=0.5, zorder=0)
    look = {"ls": "", "ms": 3.5}
    handles = [
        Line2D([], [], color=colours[s], marker="o", label=style.scaling_label(s), **look)
        for s in scalings
    ]
    for target in targets if len(targets) > 1 else []:
        look |= {"color": "#555", "label": style.target_label(target)}
        marker, fill = ("o", "#555") if target == targets[0] else ("D", "white")
        handles.append(Line2D([], [], marker=marker, mfc=fill, **look))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), handletextpad=0.2)
    return fig


def _relative_costs(
    axes: Any,
    quantity: str,
    panel: pd.DataFrame,
    lines: list[str],
    scalings: list[str],
    target: str,
    colours: dict[str, str],
) -> None:
    """A mark for each arm, relative to its backbone's unscaled arm with the first target."""
    _, unit, divisor, _ = COSTS[quantity]
    ratios = []
    for place, line in enumerate(lines):
        here = panel[panel["line"] == line].set_index(["skip_scaling", "target"])["value"]
        base = here.get(("none", target))
        if base is None:
            continue
        axes.annotate(
            _scaled(base / divisor, unit),
            (1, place - 0.36),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=5.6,
            color="#777",
        )
        for (scaling, kind), value in here.items():
            offset = (scalings.index(scaling) - (len(scalings) - 1) / 2) * 0.115
            ratios.append(value / base)
            axes.plot(
                [value / base],
                [place + 0.06 + offset],
                marker="o" if kind == target else "D",
                ms=3.2,
                mew=0.8,
                color=colours[scaling],
                mfc=colours[scaling] if kind == target else "white",
                zorder=3,
            )
    axes.axvline(1, color="#999", lw=0.7, zorder=1)
    low, high = min([0.97, *ratios]), max([1.03, *ratios])
    margin = 0.06 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
