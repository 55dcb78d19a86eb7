"""What do numbers mean? Rows of ``points.csv``: images that are no network's, on the same metrics.

One row per reference x number of images x kind of image x metric.
"""

from pathlib import Path
from typing import Any

from study.analysis.tables.runs import finite
from study.files import UserError, read_object
from study.spec.metrics import NUMBERS


def point_rows(results: Path) -> list[dict[str, Any]]:
    """Rows of all files in ``points/`` of a study's results."""
    rows = []
    for path in sorted((results / "points").glob("*.json")):
        try:
            record = read_object(path, "reference", "images", "points", "metrics")
        except UserError:  # being written
            continue
        reference = record["reference"]
        rows += [
            {
                "point": point,
                "metric": record["metrics"][base],
                "base": base,
                "better": NUMBERS[base].better,
                "reference": reference["dataset"],
                "reference_sha256": reference["dataset_sha256"],
                "extractor": reference["extractor"],
                "extractor_sha256": reference["extractor_sha256"] or "",
                "images": record["images"],
                "value": finite(value),
            }
            for point, numbers in record["points"].items()
            for base, value in numbers.items()
        ]
    return rows
