"""The page: one HTML file that opens without a network, made from finished tables and figures."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.analysis import style
from study.analysis.figures import FIGURES
from study.analysis.names import better
from study.analysis.pages import environment
from study.analysis.report import answers, curves, origins, rows
from study.analysis.report.study import Study
from study.analysis.tables.read import Tables
from study.analysis.verdicts.stability import stability_answer
from study.analysis.verdicts.stf import label_bias
from study.analysis.words import dataset_notes
from study.files import read_json, write_bytes, write_text

# A vector picture stays one up to this size; a larger one goes in as pixels.
SVG_BYTES = 50_000


def report(manifest: str | Path | Mapping[str, Any], results: str | Path, out: str | Path) -> Path:
    """Write ``out/index.html`` from ``results/tables`` and ``results/figures``.

    Copies of the figures as PNG go to ``out/figures``, to be linked or shown elsewhere.
    Runs without results are listed in a banner; a figure that was not drawn is left out. Notebooks
    rendered into ``out/notebooks`` are linked. Returns the page's path. Raises ``UserError`` where
    the tables are missing.
    """
    results, out = Path(results), Path(out)
    if not isinstance(manifest, Mapping):
        manifest = read_json(manifest)
    study = Study(manifest, Tables.read(results / "tables", results))
    drawn = figures(results / "figures")
    linked = notebooks(out / "notebooks", study.config.get("notebooks") or [])
    page = (
        environment()
        .get_template("report.html.j2")
        .render(**context(study), figures=drawn, notebooks=linked)
    )
    for figure in sorted((results / "figures").glob("*.png")):
        write_bytes(out / "figures" / figure.name, figure.read_bytes())
    write_text(out / "index.html", page)
    return out / "index.html"


def context(study: Study) -> dict[str, Any]:
    """What the template needs of the tables."""
    name, answer = study.manifest["study"], stability_answer(study.tables)
    return {
        "study": name,
        "title": study.config.get("title") or f"Study {name}",
        "notes": dataset_notes(study.runs),
        "total": len(study.runs),
        "metric_label": study.metric_label,
        "metrics": [
            {
                "name": metric,
                "label": style.metric_label(metric),
                "parts": style.metric_label(metric).split(", "),
                "better": better(metric),
            }
            for metric in study.metrics
        ],
        "partial": answers.partial(study),
        "missing": answers.missing(study),
        "blocks": curves.blocks(study),
        "outcome": answers.outcome(study),
        "reference_points": answers.reference_points(study),
        "tests": answers.tests(study),
        "best": answers.best(study),
        "doubts": answers.doubts(study),
        "verdicts": answers.verdicts(study),
        "label_bias": label_bias(study.tables),
        "stability": answer,
        "footnotes": rows.footnotes(study),
        "summary": rows.summary(study),
        "comparisons": rows.comparisons(study),
        "stability_tables": rows.stability_tables(study),
        "cost": rows.cost(study),
        "diverged": rows.diverged(study),
        "published": origins.published(study),
        "identities": origins.identities(study),
        "origins": origins.makers(study),
        "common": origins.common(study),
        "specs": origins.specs(study),
        "qc": study.tables.qc.to_dict("records"),
        "config": json.dumps(study.config, indent=1, sort_keys=True, ensure_ascii=False),
        "css": environment().get_template("page.css").render(),
    }


def figures(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Embedded figures by section of the page."""
    answer: dict[str, list[dict[str, str]]] = {}
    for name, function in FIGURES.items():
        source = embed(folder, name)
        if source is not None:
            caption = " ".join((function.__doc__ or name).split())
            figure = {"name": name, "source": source, "caption": caption}
            answer.setdefault(function.section, []).append(figure)
    return answer


def embed(folder: Path, name: str) -> str | None:
    """A figure as a data address: vector where that is small, else pixels; None if not drawn."""
    vector, pixels = folder / f"{name}.svg", folder / f"{name}.png"
    small = vector.is_file() and vector.stat().st_size <= SVG_BYTES and name != "sample_grids"
    path = vector if small or not pixels.is_file() else pixels
    if not path.is_file():
        return None
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def notebooks(folder: Path, order: list[str]) -> list[str]:
    """Rendered notebooks beside the page: those of the study first, in its order."""
    found = sorted(path.stem for path in folder.glob("*.html"))
    wanted = [name for name in order if name in found]
    return wanted + [name for name in found if name not in wanted]
