"""How good are the arms, and how far are they from the unscaled DSM arm?"""

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from study.analysis import style
from study.analysis.figures.base import (
    Part,
    drawn,
    headline,
    line_grid,
    made_of,
    panel_grid,
    parts_of,
    text_figure,
)
from study.analysis.tables.read import Tables
from study.analysis.words import absent, points_text, short
from study.files import UserError


@drawn("quality")
def quality_heatmap(tables: Tables, metric: str | None = None) -> Figure:
    """Mean of a metric, backbone × skip scaling, one panel per target; diverged arms hatched."""
    parts = parts_of(tables, metric)
    if not parts:
        return text_figure("Quality", "No run has been evaluated.", made_of(tables))
    summaries = [_summary(part) for part in parts]
    targets = style.order_targets(pd.concat(summaries)["target"])
    heights = [rows["line"].nunique() for rows in summaries]
    fig = style.figure(height=0.95 * len(parts) + 0.46 * sum(heights))
    side = "Lower" if parts[0].lower else "Higher"
    style.footer(
        fig,
        made_of(
            tables,
            parts,
            "Cells: mean over the runs that finished, below it the 95 % bootstrap interval of "
            f"the mean (n > 1). {f'{side} is better; a' if len(parts) == 1 else 'A'} frame marks "
            f"each row's best mean in a panel, which is not a test. {_reference_points(parts)}",
        ),
    )
    cells = len(parts) * len(targets)
    panels = panel_grid(fig, cells, len(targets), height_ratios=heights)
    for number, (part, rows) in enumerate(zip(parts, summaries, strict=True)):
        strip = panels[number * len(targets) : (number + 1) * len(targets)]
        _heat_strip(strip, rows, targets, part.lower)
        if len(parts) > 1:
            words = f"{part.name}: {part.label} ({'lower' if part.lower else 'higher'} is better)"
            strip[0].set_title(f"{words}\n{strip[0].get_title('left')}".strip(), loc="left")
    headline(fig, "Quality" if len(parts) > 1 else f"{parts[0].label} ({side.lower()} is better)")
    return fig


def _reference_points(parts: list[Part]) -> str:
    """What the numbers mean: those of images that are no network's."""
    said = [points_text(part.tables.reference_points(part.metric)) for part in parts]
    said = [
        (f"{part.name}: " if len(parts) > 1 else "") + text
        for part, text in zip(parts, said, strict=True)
        if text
    ]
    return f"For comparison: {'; '.join(said)}." if said else ""


def _summary(part: Part) -> pd.DataFrame:
    rows = part.tables.summary
    return rows[rows["metric"] == part.metric]


def _heat_strip(panels: list, rows: pd.DataFrame, targets: list[str], lower: bool) -> None:
    """The panels of one data set, which share their colours."""
    lines = style.order_lines(rows["line"])
    scalings = style.order_scalings(rows["skip_scaling"])
    values = rows["mean"].to_numpy(dtype=float)
    finite = values[np.isfinite(values)]
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


@drawn("comparisons")
def comparisons(tables: Tables, metric: str | None = None) -> Figure:
    """Paired differences to the unscaled DSM arm of the same backbone, with intervals."""
    parts = parts_of(tables, metric)
    found = [(part, part.tables.comparisons) for part in parts]
    found = [(part, own[own["metric"] == part.metric]) for part, own in found]
    rows = pd.concat([tables.comparisons[:0], *(own for _, own in found)])
    rows = rows[rows["n_pairs"] > 0]
    labels = {line: f"{part.label}\n({_side(part)})" for part, own in found for line in own["line"]}
    title = "Paired differences to the unscaled DSM arm"
    if rows.empty:
        return text_figure(
            title, "No arm shares a finished seed with its unscaled DSM arm.", made_of(tables)
        )
    lines = style.order_lines(rows["line"])
    scalings = style.order_scalings(rows["skip_scaling"])
    targets = style.order_targets(rows["target"])
    made = set(zip(rows["skip_scaling"], rows["target"], strict=True))
    order = [(s, t) for s in scalings for t in targets if (s, t) in made]
    colours = style.scaling_colours(tables.runs["skip_scaling"])
    pairs = sorted(set(rows["n_pairs"]))
    tested = bool(rows["p_value"].notna().any())
    fig, cells, first = line_grid(
        ["all"], lines, 0.95, 0.16 * len(order) + (0.2 if len(parts) == 1 else 0.4)
    )
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
        fig, made_of(tables, parts, f"Pairs per arm: {', '.join(map(str, pairs))}. {words}")
    )
    for (_, line), axes in cells.items():
        axes.set_xlabel(labels[line] if len(parts) > 1 else "difference")
        axes.axvline(0, color="#888", lw=0.8, zorder=1)
        _draw_differences(axes, rows[rows["line"] == line], order, colours)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
        axes.set_yticks(range(len(order)), [])
        axes.set_ylim(len(order) - 0.5, -0.5)
    for axes in first["all"]:
        axes.set_yticks(
            range(len(order)),
            [f"{style.scaling_label(s)}, {style.target_label(t)}" for s, t in order],
        )
    words = "Paired difference to no scaling, DSM"
    if len(parts) == 1:
        words = f"{parts[0].label}: {words[0].lower()}{words[1:]} ({_side(parts[0])})"
    headline(fig, words)
    return fig


def _side(part: Part) -> str:
    return f"{'left' if part.lower else 'right'} of zero is better"


def _draw_differences(axes: Any, rows: pd.DataFrame, order: list, colours: dict[str, str]) -> None:
    """A mark for each arm, filled where it is sure, with its interval."""
    for position, (scaling, target) in enumerate(order):
        colour, marker = colours[scaling], "o" if target == "dsm" else "D"
        found = rows[(rows["skip_scaling"] == scaling) & (rows["target"] == target)]
        for row in found.itertuples():
            if pd.notna(row.ci_low):
                ends = [row.ci_low, row.ci_high]
                axes.plot(ends, [position] * 2, color=colour, lw=1.3, ls="-")
            sure = pd.notna(row.p_holm) and row.p_holm < 0.05
            fill = colour if sure else "white"
            place = [row.mean_difference], [position]
            axes.plot(*place, marker=marker, color=colour, ms=4, mfc=fill, mew=1.1)
