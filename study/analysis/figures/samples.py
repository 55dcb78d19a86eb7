"""What do the samples look like?"""

import math
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from study import bounded
from study.analysis import style
from study.analysis.figures.base import drawn, made_of, text_figure
from study.analysis.tables.read import Tables
from study.files import UserError, read_json
from study.pictures import in_order, untile


@drawn("samples")
def sample_grids(tables: Tables) -> Figure:
    """Samples of every arm from the same latents: backbones down, skip scalings across."""
    runs = tables.runs
    lines = style.order_lines(runs["line"])
    scalings = style.order_scalings(runs["skip_scaling"])
    targets = style.order_targets(runs["target"])
    if tables.results is None:
        return text_figure("Samples", "The results folder is not known.", made_of(tables))
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
    style.footer(fig, made_of(tables, more=words))
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
    folder = tables.results / "runs" / row["run"] / "measurements" / row["measurement"]
    images = _first_samples(folder) if row["status"] == "done" else np.zeros((0, 1, 1, 1))
    if len(images):
        side = math.isqrt(len(images) - 1) + 1
        axes.imshow(_tile(images, side, 1 + images.shape[1] // 32), interpolation="nearest")
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


def _first_samples(folder: Path) -> np.ndarray:
    """The first 16 samples of a measurement in the order of their seeds, of large images 9.

    Where the samples are gone they come from the grid, which keeps them magnified.
    """
    samples, grid, facts = (folder / f for f in ("samples.npz", "grid.png", "generate.json"))
    said = read_json(facts) if facts.is_file() else {}
    absent = [seed - said["seed"] for seed in said.get("not_finite_seeds") or ()]
    if samples.is_file():
        size = read_samples(samples, 1).shape[1:] or (1,)
        most = 16 if size[0] <= 16 else 9
        images = read_samples(samples, most)
        return in_order(images, absent, most) if len(images) else images
    if grid.is_file() and said.get("images"):
        with bounded.reading(grid, "a grid of samples"), Image.open(grid) as picture:
            return untile(picture)[: min(9, said["images"] + len(absent))]
    return np.zeros((0, 1, 1, 1), np.uint8)


def _tile(images: np.ndarray, side: int, gap: int) -> np.ndarray:
    """The images in a square of ``side`` x ``side``, with white gaps: uint8 [h, w, 3]."""
    _, height, width, channels = images.shape
    sheet = np.full((side * (height + gap) - gap, side * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images[: side * side]):
        top, left = index // side * (height + gap), index % side * (width + gap)
        sheet[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
    return sheet


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
