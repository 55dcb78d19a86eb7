"""The figures: one function each, from the tables of a study to a matplotlib figure.

A new figure is a function that takes ``Tables`` and has ``@drawn(...)`` above it, in the file of
its question; a new file has its place in ``FIGURES``. Every figure says in small print how many
runs, which metric and which seeds it shows.
"""

from collections.abc import Iterable
from pathlib import Path

from study.analysis import style
from study.analysis.figures import (
    curves,
    factors,
    perturbations,
    quality,
    rates,
    representation,
    resources,
    samples,
    scaling_laws,
    skips,
    targets,
    training,
)
from study.analysis.tables.read import Tables
from study.files import UserError

FORMATS = ("png", "svg", "pdf")
FIGURES = {
    name: function
    for module in (
        *(quality, curves, samples, training, skips, factors, perturbations, rates),
        *(scaling_laws, targets, representation, resources),
    )
    for name, function in vars(module).items()
    if hasattr(function, "section")
}
globals().update(FIGURES)  # each by its name


def draw_all(
    tables: str | Path,
    results: str | Path,
    out: str | Path,
    only: Iterable[str] | None = None,
    formats: Iterable[str] = FORMATS,
) -> list[str]:
    """Draw every figure (or those named in ``only``) into ``out``; returns the paths written."""
    data = Tables.read(tables, results)
    made = [name for name, one in FIGURES.items() if one.applies(data)]
    names = list(made if only is None else only)
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise UserError(f"figure {unknown[0]!r} is unknown; there are {', '.join(FIGURES)}")
    paths = []
    for name in names:
        paths += style.save(FIGURES[name](data), Path(out) / name, formats)
    return paths
