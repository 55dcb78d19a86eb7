"""Figures for notebooks, of which not every study has the probe."""

from typing import Any

from study.analysis.display import say, show
from study.analysis.figures import FIGURES
from study.analysis.tables.read import Tables


def picture(tables: Tables, name: str) -> Any:
    """A figure of a probe, or the sentence that this study does not have the probe."""
    needed = FIGURES[name].probe
    if needed is not None and needed not in tables.probes:
        return say(
            f"*This study does not make the probe `{needed}`; `probes: [{needed}]` in its file "
            "adds it.*"
        )
    return show(FIGURES[name](tables))
