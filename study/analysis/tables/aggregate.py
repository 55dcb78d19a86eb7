"""From the runs on disk to tables, written whole.

The same inputs give the same bytes: fixed columns, sorted rows, ten significant digits.
A diverged run is a row that says so; a run that left nothing is "missing", and never an error.
Two identities never share a metric name: that is an error which names both.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from study.analysis.tables.checks import quality_checks
from study.analysis.tables.columns import COLUMNS, INTEGERS, NUMBERS
from study.analysis.tables.curves import curve_rows
from study.analysis.tables.dynamics import dynamics
from study.analysis.tables.found import Found, labels
from study.analysis.tables.measurements import measurement_rows
from study.analysis.tables.measures import measure_rows
from study.analysis.tables.metrics import metric_rows
from study.analysis.tables.points import point_rows
from study.analysis.tables.probes import probes
from study.analysis.tables.quality import comparison_rows, summary_rows
from study.analysis.tables.runs import cost_row, run_row
from study.analysis.tables.stability import pair_rows, stability_rows
from study.files import atomic, canonical_json, read_json

Rows = list[dict[str, Any]]


def aggregate(
    manifest: str | Path | Mapping[str, Any], results: str | Path, out: str | Path
) -> dict[str, int]:
    """Write every table of a study into ``out``: the names of ``TABLES`` as CSV, the thinned
    training dynamics and the rows of every probe as ``.parquet`` and ``.csv``.

    ``manifest`` is ``study.json`` or its content; ``results`` is ``results/<study>``. Returns the
    number of runs by status. Raises ``UserError`` where runs measured one metric in two ways.
    """
    results, out = Path(results), Path(out)
    if not isinstance(manifest, Mapping):
        manifest = read_json(manifest)
    tables, frames = _gather(manifest, results)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        _write_csv(out / f"{name}.csv", _typed(name, rows))
    for name, frame in frames.items():
        _write_csv(out / f"{name}.csv", frame)
        _write_parquet(out / f"{name}.parquet", frame)
    for path in [*out.glob("probe_*.parquet"), *out.glob("probe_*.csv")]:
        if path.stem not in frames:  # the study no longer has it
            path.unlink()
    return dict(Counter(row["status"] for row in tables["runs"]))


def _gather(
    manifest: Mapping[str, Any], results: Path
) -> tuple[dict[str, Rows], dict[str, pd.DataFrame]]:
    """The rows of every table, and the long ones as frames."""
    problems: Rows = []
    found = [Found.read(entry, results, problems) for entry in manifest["runs"]]
    found.sort(key=lambda one: one.run)
    label = labels(found)
    config = manifest.get("config") or {}
    specs = {label[one.run]["arm"]: one.spec for one in found}
    seeds = {one.run: canonical_json(one.seeds) for one in found}

    runs = [run_row(one, label[one.run], config) for one in found]
    metrics, identities = metric_rows(found, label)
    measurements = measurement_rows(found, label)
    thinned, oscillation = dynamics(found, problems)
    probed = probes(manifest, found, results, problems)
    imported = {one.run for one in found if "imported" in one.train}
    split = {one.run for one in found if one.splits}
    measures = measure_rows(runs, oscillation, probed, imported, split)
    problems += quality_checks(found, runs, metrics, oscillation)
    order = {"error": 0, "warning": 1, "note": 2}
    problems.sort(key=lambda row: (order[row["severity"]], row["check"], row["run"], row["detail"]))
    tables = {
        "runs": runs,
        "metrics": metrics,
        "identities": identities,
        "summary": summary_rows(metrics),
        "comparisons": comparison_rows(specs, seeds, metrics),
        "measurements": measurements,
        "curves": curve_rows(measurements, found, probed.get("cost")),
        "points": point_rows(results),
        "cost": [cost_row(one, label[one.run]) for one in found],
        "oscillation": oscillation,
        "measures": measures,
        "stability": stability_rows(measures, specs, seeds),
        "stability_pairs": pair_rows(measures, specs, seeds),
        "qc": problems,
    }
    return tables, {"dynamics": thinned, **{f"probe_{kind}": rows for kind, rows in probed.items()}}


def _typed(name: str, rows: Rows) -> pd.DataFrame:
    """The rows with the columns of their table; identities have whatever fields there are."""
    fields = {key for row in rows for key in row} - {"identity", "metric"}
    columns = COLUMNS.get(name, ["identity", "metric", *sorted(fields)])
    frame = pd.DataFrame(rows, columns=columns)
    for column in columns:
        if column in INTEGERS:
            frame[column] = pd.to_numeric(frame[column]).astype("Int64")
        elif column in NUMBERS:
            frame[column] = pd.to_numeric(frame[column]).astype("float64")
    return frame


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.10g", lineterminator="\n")


def _write_parquet(path: Path, frame: pd.DataFrame) -> None:
    with atomic(path) as temporary:
        frame.to_parquet(temporary, index=False)
