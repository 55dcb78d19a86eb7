"""What does a study show so far? The page of what is there, while a workflow may be running."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.analysis.figures import draw_all
from study.analysis.report.page import report
from study.analysis.tables.aggregate import aggregate
from study.arms import manifest, runs, selected
from study.files import UserError
from study.spec.study import load


def preview(
    config: str | Path | Mapping[str, Any], results: str | Path = "results"
) -> tuple[Path, int, int]:
    """Write tables, figures and the page of today's files into ``results/<study>/preview``.

    Nothing that the workflow makes is touched. Returns the page, and how many of the study's runs
    (those that its ``only`` leaves) are trained and how many there are. Raises ``UserError`` where
    none is.
    """
    study = load(config)
    chosen = selected(study, runs(study))
    folder = Path(results, study.study)
    out = folder / "preview"
    described = manifest(study, chosen)
    trained = sum((folder / "runs" / run / "train/status.json").is_file() for run in chosen)
    if not trained:
        raise UserError(f"{folder}: no run of this study is trained yet; there is nothing to show")
    aggregate(described, folder, out / "tables")
    draw_all(out / "tables", folder, out / "figures")
    return report(described, out, out), trained, len(chosen)
