"""Figures about training targets: their variance, and the optimal denoiser."""

import math
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from study.analysis import style
from study.analysis.figures.base import drawn, made_of, panel_grid, text_figure
from study.analysis.tables.read import Tables
from study.analysis.tables.targets import distributions, noticed

UNITS = {
    "x0": "target x₀",
    "noise": "target noise (÷ σ²)",
    "score": "target score (÷ σ⁴)",
}
SPLIT = 0.25
"""The SNR at which Patch Diffusion's schedule is split between two networks."""


def _plain(value: float, _position: int = 0) -> str:
    return f"{value:g}"


def _shades(values: list, palette: str) -> dict[Any, Any]:
    """A colour for each of some ordered values, light to dark; these are no scalings."""
    return dict(zip(values, sns.color_palette(palette, len(values))))


def _log_axis(axis: Any, ticks: list | None = None) -> None:
    """Labels at powers of ten, or at ``ticks``; no minor ticks, which are slow to draw."""
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(numticks=9) if ticks is None else FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(_plain))


def _how_measured(rows: pd.DataFrame) -> str:
    points, draws = int(rows["points"].max()), int(rows["draws"].max())
    return (
        f"DSM: exact posterior over the whole set, mean over {points} noisy points. STF: "
        f"{draws} references drawn for each of them, the source from the posterior, the others "
        "from the data."
    )


@drawn("targets", probe="target_variance")
def target_variance(tables: Tables) -> Figure:
    """Variance of the training target against the noise level: the DSM target, and the stable
    target with references of n points. Where it peaks depends on the units, hence three.
    """
    rows = tables.probe("target_variance")
    if rows.empty:
        return text_figure(
            "Variance of targets", "The probe target_variance has no rows.", made_of(tables)
        )
    names = distributions(rows)
    sizes = sorted(set(rows["reference"]) - {0})
    colours = _shades(sizes, "crest")
    fig = style.figure(height=0.95 + 1.75 * len(names))
    style.footer(fig, made_of(tables, more=f"{_how_measured(rows)} {_below(rows)}"))
    panels = iter(panel_grid(fig, len(UNITS) * len(names), len(UNITS)))
    for name in names:
        for unit, title in UNITS.items():
            axes = next(panels)
            panel = rows[(rows["distribution"] == name) & (rows["unit"] == unit)]
            _variance_panel(axes, panel, colours)
            axes.set_xlim(rows["sigma"].min() * 0.8, rows["sigma"].max() * 1.25)
            axes.set_title(f"{name}: {title}")
            if unit == "x0":
                axes.set_ylabel("variance (trace)")
    handles = [Line2D([], [], color="#222", lw=1.6, label="DSM")]
    handles += [Line2D([], [], color=colours[n], lw=1.4, label=f"STF, n = {n}") for n in sizes]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.8)
    return fig


def _variance_panel(axes: Any, panel: pd.DataFrame, colours: dict[int, Any]) -> None:
    for reference, curve in panel.sort_values("sigma").groupby("reference"):
        shown = curve[curve["variance"] > 0]
        exact = reference == 0
        colour = "#222" if exact else colours[reference]
        axes.plot(
            shown["sigma"],
            shown["variance"],
            color=colour,
            lw=1.6 if exact else 1.1,
            marker="o",
            ms=2.6 if exact else 1.8,
            zorder=4 if exact else 3,
        )
        if exact:
            error = shown["standard_error"].fillna(0.0)
            axes.fill_between(
                shown["sigma"],
                (shown["variance"] - error).clip(lower=shown["variance"] * 1e-3),
                shown["variance"] + error,
                color="#222",
                alpha=0.15,
                lw=0,
            )
    top = panel["variance"].max() or 1.0
    axes.set(xscale="log", yscale="log", ylim=(top * 1e-7, top * 3), xlabel="noise level σ")
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)


def _below(rows: pd.DataFrame) -> str:
    """In words: whether the stable target's variance is below that of DSM, as it should be."""
    cells = noticed(rows[rows["unit"] == "x0"])
    cells = cells[(cells["reference"] > 1) & cells["ratio"].notna()]
    if cells.empty:
        return "V_DSM is next to nothing at every noise level."
    above = (cells["ratio"] > 1 + 2 * cells["ratio_standard_error"].fillna(0)).sum()
    return (
        f"V_STF is below V_DSM at {int((cells['ratio'] < 1).sum())} of {len(cells)} combinations "
        f"of noise level and n with V_DSM above twice its standard error; above it by two "
        f"standard errors at {int(above)}. Band: standard error of V_DSM."
    )


@drawn("targets", probe="target_variance")
def stable_target_bias(tables: Tables) -> Figure:
    """The stable target against the size n of its reference, in shares of V_DSM: its variance,
    and its squared bias, which is zero in expectation at every n.
    """
    rows = tables.probe("target_variance")
    title = "Variance and bias of the stable target"
    if rows.empty:
        return text_figure(title, "The probe target_variance has no rows.", made_of(tables))
    rows = noticed(rows[rows["unit"] == "x0"])
    if not (rows["reference"] > 0).any():
        text = "The variance of the DSM target is next to nothing at every noise level."
        return text_figure(title, text, made_of(tables))
    names = distributions(rows)
    fig = style.figure(height=0.6 + 1.95 * len(names))
    words = (
        "Right: estimates and two standard errors, the Monte "
        "Carlo part V_STF / draws subtracted, so that estimates scatter about zero where there is "
        "no bias. Noise levels at which V_DSM is below twice its standard error are left out."
    )
    style.footer(fig, made_of(tables, more=f"{_how_measured(rows)} {words}"))
    panels = panel_grid(fig, 2 * len(names), 2)
    for name, left, right in zip(names, panels[::2], panels[1::2], strict=True):
        _bias_panels(left, right, rows[rows["distribution"] == name])
        left.set_title(f"{name}: variance, V_STF / V_DSM")
        right.set_title(f"{name}: squared bias / V_DSM")
    return fig


def _bias_panels(left: Any, right: Any, rows: pd.DataFrame) -> None:
    levels = sorted(set(rows["sigma"]))
    picked = [levels[i] for i in sorted({*np.linspace(0, len(levels) - 1, 5).round().astype(int)})]
    colours = _shades(picked, "flare")
    sizes = sorted(set(rows["reference"]) - {0})
    reach = np.geomspace(max(2, sizes[0]), max(sizes[-1], sizes[0] + 1, 3), 50)
    left.plot(reach, 1 / reach, color="#222", ls="--", lw=0.9, zorder=5, label="1/n")
    left.plot(reach, 1 / (reach - 1), color="#222", ls=":", lw=0.9, zorder=5, label="1/(n − 1)")
    for position, sigma in enumerate(picked):
        level = rows[rows["sigma"] == sigma].sort_values("reference")
        whole = level.loc[level["reference"] == 0, "variance"].iloc[0]
        stable = level[level["reference"] > 0]
        left.plot(
            stable["reference"],
            stable["ratio"].where(stable["ratio"] > 0),
            color=colours[sigma],
            marker="o",
            ms=3,
            label=f"σ = {sigma:g}",
        )
        # Side by side, so that bars do not hide each other.
        aside = 1.06 ** (position - (len(picked) - 1) / 2)
        right.errorbar(
            stable["reference"] * aside,
            stable["squared_bias"] / whole,
            2 * stable["bias_standard_error"].fillna(0) / whole,
            color=colours[sigma],
            ls="",
            marker="o",
            ms=3,
            elinewidth=0.9,
        )
    right.axhline(0, color="#777", lw=0.9, zorder=1)
    left.set_yscale("log")
    _log_axis(left.yaxis)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="references n")
        _log_axis(axes.xaxis, sizes)
    left.legend(loc="lower left", handlelength=1.8, fontsize=6, labelspacing=0.25)


@drawn("targets", probe="optimal_denoiser")
def optimal_denoiser(tables: Tables) -> Figure:
    """Posterior-mean images: what the best possible denoiser of the data set makes of one noisy
    image, at rising signal-to-noise ratio; one sample with one noise per row.
    """
    rows = tables.probe("optimal_denoiser")
    if not rows.empty:
        rows = rows[rows["quantity"] == "image"]
    if rows.empty:
        return text_figure(
            "Optimal denoiser", "The probe optimal_denoiser has no images.", made_of(tables)
        )
    levels = sorted(set(rows["snr"]))
    samples = sorted(set(rows["sample"].astype(int)))[:8]
    rows = rows[rows["sample"].isin(samples)]
    sheet, step, side = _sheet(rows, levels, samples)
    cell = min((style.WIDTH - 0.1) / len(levels), 0.9)
    fig = style.figure(height=0.85 + cell * len(samples))
    words = (
        "Posterior mean over the whole data set, which has the image itself in it, so that with "
        "rising SNR the prediction becomes that image. The noise of a row is the same in every "
        "column. Images are clipped to their range."
    )
    style.footer(fig, made_of(tables, more=words))
    axes = fig.add_subplot()
    axes.imshow(sheet, interpolation="nearest")
    axes.grid(False)
    axes.set_frame_on(False)
    heads = ["original" if math.isinf(snr) else f"{snr:g}" for snr in levels]
    axes.set_xticks([step * i + (side - 1) / 2 for i in range(len(levels))], heads)
    axes.set_yticks([])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    fig.suptitle("signal-to-noise ratio ᾱ / (1 − ᾱ)", fontsize=7.5)
    return fig


def _sheet(rows: pd.DataFrame, levels: list[float], samples: list[int]) -> tuple:
    """All images on one white sheet, uint8 [h, w, 3], the step between them and their side."""
    side, channels = int(rows["side"].iloc[0]), int(rows["channels"].iloc[0])
    gap = max(1, side // 12)
    step = side + gap
    shape = (step * len(samples) - gap, step * len(levels) - gap, 3)
    sheet = np.full(shape, 255, np.uint8)
    for row in rows.itertuples():
        image = np.asarray(row.pixels, np.uint8).reshape(side, side, channels)
        top, left = samples.index(int(row.sample)) * step, levels.index(row.snr) * step
        sheet[top : top + side, left : left + side] = image if channels == 3 else image[..., :1]
    return sheet, step, side


@drawn("targets", probe="optimal_denoiser")
def spectral_energy(tables: Tables) -> Figure:
    """Detail in the optimal prediction: its spectral energy above the Nyquist limit of each patch
    size, against the signal-to-noise ratio, with Patch Diffusion's split of the schedule.
    """
    rows = tables.probe("optimal_denoiser")
    if not rows.empty:
        own = rows[rows["quantity"] == "own_weight"].sort_values("snr")
        rows = rows[(rows["quantity"] == "energy_above") & rows["value"].notna()]
    if rows.empty:
        return text_figure(
            "Spectral energy", "The probe optimal_denoiser has no energies.", made_of(tables)
        )
    fig = style.figure(height=2.9)
    words = (
        "Posterior mean over the whole data set, which has the image itself in it; grey: how much "
        "posterior weight that image has (1 = the prediction is the image). Energy of frequencies "
        "above 1/(2P) cycles per pixel in either axis, images less their mean"
    )
    if rows["samples"].notna().any():
        words += f"; means over {int(rows['samples'].max())} samples, bands: standard error"
    style.footer(fig, made_of(tables, more=words + "."))
    left, right = panel_grid(fig, 2, 2)
    colours = _shades(sorted(set(rows["patch"].astype(int))), "crest")
    for patch, curve in rows.sort_values("snr").groupby("patch"):
        colour, label = colours[int(patch)], f"P = {int(patch)}"
        left.plot(curve["snr"], curve["value"], color=colour, marker="o", ms=3, label=label)
        error = curve["standard_error"].fillna(0.0)
        left.fill_between(
            curve["snr"],
            curve["value"] - error,
            curve["value"] + error,
            color=colour,
            alpha=0.25,
            lw=0,
        )
        right.plot(curve["snr"], curve["share"], color=colour, marker="o", ms=3, label=label)
        right.axhline(curve["share_of_original"].iloc[0], color=colour, ls=":", lw=1)
    if len(own):
        words = "posterior weight of the image"
        left.plot(own["snr"], own["value"], color="#888", ls="--", lw=1, label=words)
    left.set_title("energy above Nyquist / P, relative to the image's")
    right.set_title("share of all energy (dotted: of the images)")
    for axes in (left, right):
        axes.axvline(SPLIT, color="#c1121f", lw=0.8, zorder=1)
        axes.set(xscale="log", xlabel="signal-to-noise ratio ᾱ / (1 − ᾱ)", ylim=(0, 1.08))
        _log_axis(axes.xaxis)
    left.text(SPLIT * 0.9, 1.07, "split at 0.25", ha="right", va="top", fontsize=6, color="#c1121f")
    handles = left.get_legend_handles_labels()[0]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig
