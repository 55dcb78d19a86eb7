"""How alike are the blocks of a network, and which frequencies do their features hold?"""

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
from study.analysis.figures.base import (
    drawn,
    empty_panel,
    line_grid,
    made_of,
    probe_rows,
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


def _which(rows: pd.DataFrame) -> str:
    """The target and seed that a figure of one run per arm shows, in words."""
    runs = rows.drop_duplicates("run")
    seeds = ", ".join(sorted(set(runs["seed"].astype(str))))
    targets = ", ".join(style.target_label(t) for t in style.order_targets(runs["target"]))
    return f"one run per arm ({targets}, seed {seeds})"


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


@drawn("representation", probe="representation")
def representation_similarity(tables: Tables) -> Figure:
    """Likeness (linear CKA) of what the blocks of a network give, and where long skips run."""
    title = "Similarity of blocks"
    rows = probe_rows(tables, "representation", "cka")
    if rows.empty:
        return text_figure(title, "No run of this selection was probed.", made_of(tables))
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
        made_of(
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
                empty_panel(axes)
                axes.set_aspect("equal")
                continue
            picture = _similarity(axes, *_matrix(groups[line, scaling]), norm, 32 * cell)
            if j == 0:
                axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
            else:
                axes.set_yticks([])
    fig.colorbar(picture, ax=grid, label="linear CKA", shrink=0.5, aspect=30, pad=0.015)
    return fig


@drawn("representation", probe="representation")
def feature_spectra(tables: Tables) -> Figure:
    """At which spatial frequencies the features of each block lie, by noise level."""
    title = "Spectra of features"
    rows = probe_rows(tables, "representation", "spectrum")
    rows = rows if rows.empty else _first_runs(rows[rows["part"] == 0])
    if rows.empty:
        return text_figure(title, "No run of this selection was probed.", made_of(tables))
    # Unscaled long skips where a backbone has such an arm, else the first scaling there is.
    ordered = style.order_scalings(rows["skip_scaling"])
    ranked = rows.assign(_rank=rows["skip_scaling"].map(ordered.index))
    rows = ranked[ranked["_rank"] == ranked.groupby("line")["_rank"].transform("min")]
    lines = style.order_lines(rows["line"])
    sigmas = sorted(set(rows["sigma"]))
    fig, cells, first = line_grid(sigmas, lines, 0.95, 1.2, sharex=True, sharey=True)
    shown = style.order_scalings(rows["skip_scaling"])
    style.footer(
        fig,
        made_of(
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
            empty_panel(axes)
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
