"""Figures for notebooks, which not every study can draw."""

from typing import Any

from study.analysis.display import say, show
from study.analysis.figures import FIGURES
from study.analysis.tables.read import Tables


def picture(tables: Tables, name: str) -> Any:
    """A figure, or the sentence that this study does not have what it shows."""
    needed = FIGURES[name].probe
    if needed is not None and needed not in tables.probes:
        return say(
            f"*This study does not make the probe `{needed}`; `probes: [{needed}]` in its file "
            "adds it.*"
        )
    if not FIGURES[name].applies(tables):
        return say(f"*This study has fewer than two values to draw `{name}` over.*")
    return show(FIGURES[name](tables))
