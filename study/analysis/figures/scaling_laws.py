"""Figures about the scaling laws of long skips at initialisation."""

import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.analysis import style
from study.analysis.figures.base import (
    drawn,
    line_grid,
    made_of,
    panel_grid,
    plain_log_axis,
    text_figure,
)
from study.analysis.tables.read import Tables

DEPTH_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
QUANTITIES = {
    "forward": "features\n‖h‖²",
    "gradient": "gradient\n‖∂ℓ/∂W‖²",
    "sensitivity": "sensitivity\n‖Δh‖ / ‖δ‖",
}
"""What is shown, with its label on the backbones' figure."""
LINE = {"color": "#999999", "lw": 1.0, "zorder": 0}


def _rows(tables: Tables, recursion: bool) -> pd.DataFrame:
    """Finite rows of the clean recursion, or of the backbones; empty where there are none."""
    frame = tables.probe("scaling_laws")
    if frame.empty:
        return frame
    frame = frame[(frame["network"] == "recursion") == recursion]
    return frame[np.isfinite(frame["value"].astype(float))]


def _colour_handles(colours: dict[str, str]) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, lw=2, label=style.scaling_label(scaling))
        for scaling, colour in colours.items()
    ]


def _means(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean, root mean square and standard deviation over the draws of every point."""
    keys = ["skip_scaling", "depth", "where", "sum_squares"]
    grouped = frame.groupby(keys, as_index=False)["value"]
    means = grouped.agg(
        mean="mean", spread=lambda v: v.std(ddof=0), root=lambda v: float(np.sqrt((v**2).mean()))
    )
    return means.sort_values(keys, ignore_index=True)


def _points(axes: Any, points: pd.DataFrame, column: str, colours: dict, marker: str) -> None:
    """Points with bars of one standard deviation, in the colours of their scalings."""
    x, y, spread = (points[name].to_numpy(float) for name in ("sum_squares", column, "spread"))
    shades = [colours[scaling] for scaling in points["skip_scaling"]]
    # A logarithmic axis has no place for bars that reach zero.
    axes.vlines(x, np.maximum(y - spread, 0.05 * y), y + spread, colors=shades, lw=0.8, zorder=2)
    axes.scatter(x, y, c=shades, marker=marker, s=22, edgecolors="white", linewidths=0.5, zorder=3)


def _law(axes: Any, frame: pd.DataFrame, power: float) -> None:
    """The line c (1 + S)^power through the predictions of the rows."""
    known = frame.dropna(subset=["predicted"])
    if known.empty:
        return
    first = known.iloc[0]
    factor = first["predicted"] / (1 + first["sum_squares"]) ** power
    squares = np.geomspace(1 + known["sum_squares"].min(), 1 + known["sum_squares"].max(), 60) - 1
    axes.plot(squares, factor * (1 + squares) ** power, **LINE)


def _deviation(rows: pd.DataFrame, power: int) -> str:
    """By how many standard errors a mean over draws of value^power leaves its prediction."""
    worst, groups = 0.0, rows.groupby(["skip_scaling", "depth"])
    for _, group in groups:
        values = group["value"].to_numpy(float) ** power
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        if error > 0:
            off = values.mean() - group["predicted"].iloc[0] ** power
            worst = max(worst, abs(off) / error)
    return f"{groups.ngroups} means within {worst:.1f} standard errors"


def _say(axes: Any, text: str) -> None:
    """Words in the upper left corner of a panel."""
    axes.text(
        0.04, 0.97, text, transform=axes.transAxes, fontsize=6, va="top", linespacing=1.3, zorder=5
    )


def _squares_axis(axes: Any, rows: pd.DataFrame) -> None:
    """S on an axis that is logarithmic in 1 + S: the laws are straight and 0 has its place."""
    low, high = np.log1p([rows["sum_squares"].min(), rows["sum_squares"].max()])
    room = 0.06 * max(high - low, 0.5)
    axes.set_xscale("function", functions=(np.log1p, np.expm1))
    axes.set_xlim(np.expm1(low - room), np.expm1(high + room))
    seen = axes.get_xlim()
    axes.set_xticks([tick for tick in (0, 1, 2, 4, 8, 16, 32, 64) if seen[0] <= tick <= seen[1]])
    axes.set_xlabel("sum of κ²")


@drawn("theory", probe="scaling_laws")
def scaling_law_recursion(tables: Tables) -> Figure:
    """Norms of features and gradients, and sensitivity to the input, of a recursion of random
    blocks with long skips, against the sum of their squared factors; the line is exact for it."""
    frame = _rows(tables, recursion=True)
    if frame.empty:
        return text_figure("Scaling laws", "The clean recursion was not measured.", made_of(tables))
    colours = style.scaling_colours(frame["skip_scaling"])
    depths = sorted(set(frame["depth"]))
    markers = {depth: DEPTH_MARKERS[i % len(DEPTH_MARKERS)] for i, depth in enumerate(depths)}
    parts = dict(list(frame.groupby("quantity")))
    nothing = frame.iloc[:0]
    draws = int(frame["seed"].nunique())
    fig = style.figure(height=3.3)
    style.footer(
        fig,
        made_of(
            tables,
            more="None of the runs has a part in this figure, nor have the data: it shows random "
            f"networks. Points: means over n = {draws} draws of the weights (sensitivity: root "
            "mean square), bars one standard deviation of a single draw; all scalings share their "
            "draws. Network: UNet(x) = h₀, hᵢ₋₁ = bᵢ(κᵢ xᵢ + hᵢ), xᵢ = aᵢ(xᵢ₋₁), blocks of "
            f"{_one(frame['layers'])} layers of width m = {_one(frame['width'])} that keep the "
            "mean square: weights N(0, 2/m) before a ReLU, N(0, 1/m) in the last, linear layer. "
            "Gradient: of all weights of a block for a squared error of length 1; large points "
            "b₁, small ones other blocks i against their own sum, over j ≥ i. Line: the mean, "
            "exact for this recursion (gradients but for terms of order 1/m). ScaleLong's abstract "
            "(Huang et al. 2023) claims that the factors govern norms, gradients and robustness; "
            "the form of its bounds is not among our sources. Upper bound: sum of κᵢ M₀ⁱ + c₀, as "
            "restated in arXiv 2411.02149, with c₀ = M₀ᴺ ‖middle‖, our choice; random directions "
            "are no test of a worst case.",
        ),
    )
    forward, gradient, sensitivity = panel_grid(fig, 3, 3)
    large = {name: _means(parts.get(name, nothing)) for name in QUANTITIES}
    blocks = parts.get("gradient_block", nothing)
    small = _means(blocks)
    for depth, marker in markers.items():
        for axes, name, column in (
            (forward, "forward", "mean"),
            (gradient, "gradient", "mean"),
            (sensitivity, "sensitivity", "root"),
        ):
            points = large[name]
            _points(axes, points[points["depth"] == depth], column, colours, marker)
        others = small[small["depth"] == depth]
        shades = [colours[scaling] for scaling in others["skip_scaling"]]
        gradient.scatter(
            others["sum_squares"], others["mean"], c=shades, marker=marker, s=5, lw=0, alpha=0.7
        )

    rows = parts.get("forward", nothing)
    _law(forward, rows, 1.0)
    forward.set_title("features")
    forward.set_ylabel("‖h₀‖² / ‖x‖²")
    _say(forward, _deviation(rows, 1))

    rows = parts.get("gradient", nothing)
    _law(gradient, pd.concat([rows, blocks]), 1.0)
    gradient.set_title("gradient of a block")
    gradient.set_ylabel("‖∂ℓ/∂W‖² / (ℓ ‖x‖²)")
    _say(gradient, "b₁: " + _deviation(rows, 1) + _fit(pd.concat([large["gradient"], small]), rows))

    rows = parts.get("sensitivity", nothing)
    _law(sensitivity, rows, 0.5)
    sensitivity.set_title("sensitivity, random directions")
    sensitivity.set_ylabel("‖UNet(x+δ) − UNet(x)‖ / ‖δ‖")
    _say(sensitivity, _deviation(rows, 2) + _bounds(rows, parts.get("bound", nothing)))

    for axes, name, room in (
        (forward, "forward", 1.2),
        (gradient, "gradient", 1.9),
        (sensitivity, "sensitivity", 1.35),
    ):
        if large[name].empty:
            continue
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * room)
        plain_log_axis(axes.yaxis)
        _squares_axis(axes, pd.concat([large[name], small if name == "gradient" else nothing]))
    handles = _colour_handles(colours)
    handles += [
        Line2D(
            [], [], color="#555", ls="", marker=marker, ms=4.5, mec="white", label=f"N = {depth}"
        )
        for depth, marker in markers.items()
    ]
    handles.append(Line2D([], [], **LINE, label="exact for this recursion"))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.5)
    return fig


def _one(values: Iterable[Any]) -> str:
    """The values as whole numbers, each once."""
    return ", ".join(f"{value:.0f}" for value in sorted(set(pd.Series(values).dropna())))


def _fit(means: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Straight line through the points, and the one that is predicted, in words."""
    if means["sum_squares"].nunique() < 2:
        return ""
    x, y = means["sum_squares"].to_numpy(float), means["mean"].to_numpy(float)
    slope, start = np.polyfit(x, y, 1)
    share = 1 - ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    first = rows.iloc[0]
    law = first["predicted"] / (1 + first["sum_squares"])
    return (
        f"\nline {law:g} S + {law:g}, S = sum of κ²\n"
        f"fit {slope:.2f} S + {start:.2f}, R² = {share:.3f} ({len(means)} points)"
    )


def _bounds(rows: pd.DataFrame, bounds: pd.DataFrame) -> str:
    """How far the upper bound lies above what was measured, in words."""
    keys = ["skip_scaling", "depth", "seed"]
    both = rows.merge(bounds, on=keys, suffixes=("", "_bound"))
    if both.empty:
        return ""
    both["ratio"] = both["value_bound"] / both["value"]
    crossed = int((both["ratio"] < 1).sum())
    least = both.groupby("depth")["ratio"].min()
    lines = [
        f"\nupper bound crossed in {crossed} of {len(both)} draws;",
        f"at least {_times(least.iloc[0])} the measured (N = {least.index[0]})",
    ]
    if len(least) > 1:
        lines[-1] += ","
        lines.append(f"{_times(least.iloc[-1])} (N = {least.index[-1]})")
    return "\n".join(lines)


def _times(value: float) -> str:
    return f"{value:.3g} ×" if value < 1000 else f"{value:.1e} ×"


@drawn("theory", probe="scaling_laws")
def scaling_law_backbones(tables: Tables) -> Figure:
    """The same three quantities on the study's backbones at initialisation, relative to unscaled
    long skips: here only the order of the scalings can be compared."""
    frame = _rows(tables, recursion=False)
    frame = frame[frame["quantity"].isin(list(QUANTITIES))] if len(frame) else frame
    if frame.empty:
        return text_figure(
            "Scaling laws on the backbones", "No backbone was measured.", made_of(tables)
        )
    scalings = style.order_scalings(frame["skip_scaling"])
    base = "none" if "none" in scalings else scalings[0]
    colours = style.scaling_colours(scalings)
    families = frame.groupby("network")["family"].first().to_dict()
    markers = style.markers(families, families)
    lines = style.order_lines(frame["network"])
    draws = int(frame["seed"].nunique())
    fig, cells, first = line_grid(list(QUANTITIES), lines, 0.75, 1.25)
    style.footer(
        fig,
        made_of(
            tables,
            more=f"Not from the runs but from their networks at initialisation: points are means "
            f"over n = {draws} initialisations of the ratio to {style.scaling_label(base)}, bars "
            "one standard deviation. h is the output of the decoder block that consumes long skip "
            "1 (many networks output zero at the start), for noisy images as in training; gradient "
            "of all weights for half a squared error of length 1 at h. ρ: Spearman's rank "
            "correlation of the means with the sum of κ² over the scalings; in brackets without "
            "those that scale the outermost skip. Grey: the clean recursion with as many skips "
            "(it has neither normalisation nor residual branches).",
        ),
    )
    for (quantity, line), axes in cells.items():
        panel = frame[(frame["quantity"] == quantity) & (frame["network"] == line)]
        ratios = _relative(panel, base)
        if quantity == "forward":
            name = f"{style.line_label(line)}, N = {_one(panel['depth'])}"
            axes.set_title("\n".join(textwrap.wrap(name, 21)), fontsize=7)
        if ratios.empty:
            continue
        _points(axes, ratios, "mean", colours, markers[line])
        top = float(ratios.loc[ratios["skip_scaling"] == base, "sum_squares"].iloc[0])
        squares = np.linspace(ratios["sum_squares"].min(), ratios["sum_squares"].max(), 50)
        power = 0.5 if quantity == "sensitivity" else 1.0
        axes.plot(squares, ((1 + squares) / (1 + top)) ** power, **LINE)
        kept = ratios[[style.method(text) in ("none", "cs") for text in ratios["skip_scaling"]]]
        said = f"ρ = {_agreement(ratios)}"
        if 3 <= len(kept) < len(ratios):
            said += f" (κ₁ = 1: {_agreement(kept)})"
        _say(axes, said)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.2 * (high - low))
        if quantity == "sensitivity":
            axes.set_xlabel("sum of κ²")
    for quantity, label in QUANTITIES.items():
        for axes in first[quantity]:
            axes.set_ylabel(label)
    handles = _colour_handles(colours)
    handles.append(Line2D([], [], **LINE, label="clean recursion"))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.8)
    return fig


def _agreement(ratios: pd.DataFrame) -> str:
    """Spearman's rank correlation of a panel's means with the sum of squares."""
    value = ratios["sum_squares"].corr(ratios["mean"], method="spearman")
    return f"{value:.2f}" if np.isfinite(value) else "undefined"


def _relative(panel: pd.DataFrame, base: str) -> pd.DataFrame:
    """Mean and standard deviation over seeds of the ratio to the scaling ``base``."""
    plain = panel[panel["skip_scaling"] == base][["seed", "value"]]
    both = panel.merge(plain, on="seed", suffixes=("", "_base"))
    both = both[both["value_base"] > 0]
    both["ratio"] = both["value"] / both["value_base"]
    grouped = both.groupby("skip_scaling", as_index=False)
    found = grouped.agg(
        sum_squares=("sum_squares", "mean"),
        mean=("ratio", "mean"),
        spread=("ratio", lambda v: v.std(ddof=0)),
    )
    return found.sort_values(["sum_squares", "skip_scaling"], ignore_index=True)
