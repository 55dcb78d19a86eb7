"""Figures about trained networks: similarity of blocks, spectra of features, cost."""

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.analysis import style
from study.analysis.figures import (
    _empty,
    _legend,
    _line_grid,
    _made_of,
    _panels,
    _plain_log,
    drawn,
    text_figure,
)
from study.analysis.tables.read import Tables


def _first_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one run for each (line, skip scaling): its first target and first seed."""
    if rows.empty:
        return rows
    runs = rows.drop_duplicates("run")
    targets = {target: rank for rank, target in enumerate(style.order_targets(runs["target"]))}
    runs = runs.assign(
        _target=runs["target"].map(targets), _seed=pd.to_numeric(runs["seed"], errors="coerce")
    ).sort_values(["_target", "_seed", "run"])
    kept = runs.drop_duplicates(["line", "skip_scaling"])["run"]
    return rows[rows["run"].isin(set(kept))]


def _probed(tables: Tables, kind: str, *quantities: str) -> pd.DataFrame:
    """Rows of a probe with these quantities; empty where there are none."""
    rows = tables.probe(kind)
    return rows if rows.empty else rows[rows["quantity"].isin(quantities)]


def _which(rows: pd.DataFrame) -> str:
    """The target and seed that a figure of one run per arm shows, in words."""
    runs = rows.drop_duplicates("run")
    seeds = ", ".join(sorted(set(runs["seed"].astype(str))))
    targets = ", ".join(style.target_label(t) for t in style.order_targets(runs["target"]))
    return f"one run per arm ({targets}, seed {seeds})"


# --- representation ------------------------------------------------------------------------------


def _matrix(rows: pd.DataFrame) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """CKA between all blocks, and the (earlier, later) blocks that a long skip joins."""
    table = rows.pivot(index="position", columns="other_position", values="value")
    joined = rows[(rows["long_skip"] > 0) & (rows["position"] < rows["other_position"])]
    pairs = joined[["position", "other_position"]].astype(int)
    return table.to_numpy(dtype=float), list(pairs.itertuples(index=False, name=None))


def ridge(similar: np.ndarray, joined: list[tuple[int, int]]) -> float:
    """How much more alike blocks are that a long skip joins than pairs one block closer.

    Mean over the joined pairs (i, j), j - i > 1, of CKA(i, j) minus the mean of CKA(i + 1, j) and
    CKA(i, j - 1): negative where likeness only fades with distance.
    """
    found = [
        similar[i, j] - (similar[i + 1, j] + similar[i, j - 1]) / 2 for i, j in joined if j - i > 1
    ]
    return float(np.mean(found)) if found else math.nan


def _similarity(
    axes: Any, similar: np.ndarray, joined: list[tuple[int, int]], norm: Normalize, size: float
) -> Any:
    """One heat map, with circles where long skips run and the height of their ridge."""
    axes.grid(False)
    axes.set_xticks([])
    picture = axes.imshow(
        similar, norm=norm, cmap="viridis", origin="lower", interpolation="nearest"
    )
    if joined:
        pairs = np.array(joined)
        both = np.concatenate([pairs, pairs[:, ::-1]])
        size = min(2.6, size / len(similar))
        look = {"ls": "", "marker": "o", "ms": size, "mfc": "none", "mew": 0.6}
        axes.plot(both[:, 0], both[:, 1], color="black", **look)
        height = ridge(similar, joined)
        words = f"{height:+.2f}" if math.isfinite(height) else ""
        axes.set_title(words, loc="right", fontsize=5.8, color="#444")
    return picture


@drawn(probe="representation")
def representation_similarity(tables: Tables) -> Figure:
    """Likeness (linear CKA) of what the blocks of a network give, and where long skips run."""
    title = "Similarity of blocks"
    rows = _probed(tables, "representation", "cka")
    if rows.empty:
        return text_figure(title, "No run of this selection was probed.", _made_of(tables))
    rows = _first_runs(rows)
    rows = rows[(rows["part"] == 0) & rows["sigma"].isna()]
    lines = style.order_lines(rows["line"])
    scalings = style.order_scalings(rows["skip_scaling"])
    sheet = [[(line, scaling) for scaling in scalings] for line in lines]
    if len(scalings) == 1:  # then backbones stand abreast
        sheet = [
            [(line, scalings[0]) for line in lines[n : n + 4]] for n in range(0, len(lines), 4)
        ]
    across = len(sheet[0])
    cell = min((style.WIDTH - 1.1) / across, 1.6)
    fig = style.figure(max(4.4, cell * across + 1.1), 0.75 + (cell + 0.02) * len(sheet))
    style.footer(
        fig,
        _made_of(
            tables,
            more="Linear CKA between the outputs of every two blocks, in order of execution from "
            "left to right and from bottom to top, on the same noisy images with noise levels in "
            f"training's proportions; {_which(rows)}. Circles: blocks that a long skip joins. "
            "Number: mean CKA of the joined blocks minus that of pairs one block closer; positive "
            "where long skips make a ridge, negative where likeness only fades with distance. CKA "
            "of few samples is biased upwards.",
        ),
    )
    grid = fig.subplots(len(sheet), across, squeeze=False)
    values = rows["value"].to_numpy(dtype=float)
    low = values[np.isfinite(values)].min(initial=0.95)
    norm = Normalize(math.floor(low * 20) / 20, 1)
    groups = dict(list(rows.groupby(["line", "skip_scaling"])))
    picture = None
    for i, strip in enumerate(grid):
        for axes in strip[len(sheet[i]) :]:
            axes.set_axis_off()
        for j, (axes, (line, scaling)) in enumerate(zip(strip, sheet[i], strict=False)):
            name = style.line_label(line).replace("(", "\n(", 1)
            if len(scalings) == 1:
                axes.set_title(name, fontsize=7)
            elif i == 0:
                axes.set_title(style.scaling_label(scaling), fontsize=7)
            if j == 0:
                axes.set_ylabel("block" if len(scalings) == 1 else f"{name}\nblock")
            if (line, scaling) not in groups:
                _empty(axes)
                axes.set_aspect("equal")
                continue
            picture = _similarity(axes, *_matrix(groups[line, scaling]), norm, 32 * cell)
            if j == 0:
                axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
            else:
                axes.set_yticks([])
    fig.colorbar(picture, ax=grid, label="linear CKA", shrink=0.5, aspect=30, pad=0.015)
    return fig


@drawn(probe="representation")
def feature_spectra(tables: Tables) -> Figure:
    """At which spatial frequencies the features of each block lie, by noise level."""
    title = "Spectra of features"
    rows = _probed(tables, "representation", "spectrum")
    rows = rows if rows.empty else _first_runs(rows[rows["part"] == 0])
    if rows.empty:
        return text_figure(title, "No run of this selection was probed.", _made_of(tables))
    # Unscaled long skips where a backbone has such an arm, else the first scaling there is.
    ordered = style.order_scalings(rows["skip_scaling"])
    ranked = rows.assign(_rank=rows["skip_scaling"].map(ordered.index))
    rows = ranked[ranked["_rank"] == ranked.groupby("line")["_rank"].transform("min")]
    lines = style.order_lines(rows["line"])
    sigmas = sorted(set(rows["sigma"]))
    fig, cells, first = _line_grid(sigmas, lines, 0.95, 1.2, sharex=True, sharey=True)
    shown = style.order_scalings(rows["skip_scaling"])
    style.footer(
        fig,
        _made_of(
            tables,
            more="Amplitude of each block's feature maps by spatial frequency, root mean square "
            "over the ring, channels and samples, relative to frequency 0 (the map's mean, "
            "biases and conditions included); logarithm to base 10. Frequency 1 is the Nyquist "
            "frequency of that map, which is coarser in inner stages. Skip scaling "
            f"{', '.join(map(style.scaling_label, shown))}; {_which(rows)}. White noise would be "
            "flat at 0. Dashed: the noisy image itself.",
        ),
    )
    palette = matplotlib.colormaps["viridis"]
    for (sigma, line), axes in cells.items():
        panel = rows[(rows["sigma"] == sigma) & (rows["line"] == line)]
        if panel.empty:
            _empty(axes)
            continue
        last = max(int(panel["position"].max()), 1)
        for position, curve in panel.groupby("position"):
            curve = curve.sort_values("frequency")
            look = {"color": palette(position / last * 0.93), "lw": 0.9, "marker": ".", "ms": 2.5}
            if position < 0:
                look = {"color": "black", "lw": 1.0, "ls": (0, (3, 1.5)), "zorder": 5}
            axes.plot(curve["frequency"], curve["value"], **look)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.tick_params(labelbottom=True)
        if sigma == sigmas[-1]:
            axes.set_xlabel("frequency / Nyquist")
    for sigma, column in first.items():
        for axes in column:
            axes.set_ylabel(f"σ = {sigma:g}\nlog amplitude")
    bar = fig.colorbar(
        ScalarMappable(Normalize(0, 1), palette),
        ax=list(cells.values()),
        ticks=[0, 1],
        shrink=0.5,
        aspect=25,
        pad=0.01,
    )
    bar.ax.set_yticklabels(["first\nblock", "last\nblock"])
    fig.legend(
        handles=[Line2D([], [], color="black", ls=(0, (3, 1.5)), label="noisy image")],
        loc="outside upper center",
    )
    return fig


# --- dynamics ------------------------------------------------------------------------------------


@drawn(probe="dynamics")
def block_norms(tables: Tables) -> Figure:
    """Feature norm after each decoder block, and gradient norm of every block, after training."""
    title = "Norms by block"
    rows = _probed(tables, "dynamics", "decoder_norm_after", "grad_norm_block")
    rows = rows if rows.empty else rows[(rows["target"] == "dsm") & np.isfinite(rows["value"])]
    if rows.empty:
        return text_figure(title, "No DSM run of this selection was probed.", _made_of(tables))
    features = rows[rows["quantity"] == "decoder_norm_after"]
    features = features.assign(x=pd.to_numeric(features["where"]))
    gradients = rows[(rows["quantity"] == "grad_norm_block") & rows["position"].notna()]
    gradients = gradients.assign(x=gradients["position"].astype(float))
    sigmas = sorted(set(features["sigma"]))
    sigma = min(sigmas, key=lambda s: abs(math.log(s / 0.5))) if sigmas else math.nan
    lines = style.order_lines(rows["line"])
    kinds = ["feature", "gradient"]
    fig, cells, first = _line_grid(kinds, lines, 0.85, 1.45)
    style.footer(
        fig,
        _made_of(
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
            _empty(axes)
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
            _plain_log(axes.yaxis)
        else:
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
            axes.set_ylim(bottom=0)
    for kind, column in first.items():
        for axes in column:
            axes.set_ylabel(f"{kind} norm")
    _legend(fig, tables, targets=False)
    return fig


# --- cost ----------------------------------------------------------------------------------------

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


@drawn(probe="cost")
def compute_cost(tables: Tables) -> Figure:
    """Operations, memory and time of every arm relative to the same backbone without scaling."""
    title = "Computational cost"
    rows = _probed(tables, "cost", *COSTS)
    rows = rows if rows.empty else rows[rows["value"].notna()]
    if rows.empty:
        return text_figure(title, "No arm of this selection was measured.", _made_of(tables))
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
        _made_of(
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
    panels = _panels(fig, len(quantities), len(quantities), sharey=True)
    for axes, quantity in zip(panels, quantities, strict=True):
        name, unit, divisor, _ = COSTS[quantity]
        panel = means[means["quantity"] == quantity]
        ratios = []
        for place, line in enumerate(lines):
            here = panel[panel["line"] == line].set_index(["skip_scaling", "target"])["value"]
            base = here.get(("none", targets[0]))
            if base is None:
                continue
            words = _scaled(base / divisor, unit)
            axes.annotate(
                words,
                (1, place - 0.36),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=5.6,
                color="#777",
            )
            for (scaling, target), value in here.items():
                offset = (scalings.index(scaling) - (len(scalings) - 1) / 2) * 0.115
                ratios.append(value / base)
                axes.plot(
                    [value / base],
                    [place + 0.06 + offset],
                    marker="o" if target == targets[0] else "D",
                    ms=3.2,
                    mew=0.8,
                    color=colours[scaling],
                    mfc=colours[scaling] if target == targets[0] else "white",
                    zorder=3,
                )
        axes.axvline(1, color="#999", lw=0.7, zorder=1)
        low, high = min([0.97, *ratios]), max([1.03, *ratios])
        margin = 0.06 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
        axes.set_title(name)
        axes.set_xlabel("relative to none")
        axes.set_yticks(range(len(lines)), [style.line_label(line) for line in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.grid(False, axis="y")
        for edge in range(1, len(lines)):
            axes.axhline(edge - 0.5, color="#e6e6e6", lw=0.5, zorder=0)
    handles: list[Any] = [
        Line2D([], [], color=colours[s], ls="", marker="o", ms=3.5, label=style.scaling_label(s))
        for s in scalings
    ]
    if len(targets) > 1:
        handles += [
            Line2D(
                [],
                [],
                color="#555",
                ls="",
                marker="o" if target == targets[0] else "D",
                ms=3.5,
                mfc="#555" if target == targets[0] else "white",
                label=style.target_label(target),
            )
            for target in targets
        ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), handletextpad=0.2)
    return fig
