"""How good is every arm, wherever a protocol looks? Rows of ``curves.csv``.

The unit is the training run: several sampling seeds of one are averaged first, and a run without
all of them counts as missing, for those that are there would speak for the others.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import statistics
from study.analysis.names import ARM, NOT_MEASURED, OTHERWISE, better
from study.analysis.tables.families import groups
from study.analysis.tables.found import Found

COLUMNS_OF_CELL = (
    *("step", "last", "best", "images_seen", "weights", "sampler", "sampler_steps", "nfe"),
    *("guidance_kind", "guidance_scale", "labels", "images"),
)


def curve_rows(
    measurements: list[dict], found: list[Found], cost: pd.DataFrame | None = None
) -> list[dict[str, Any]]:
    """One row per arm x protocol x cell x metric, from the rows of ``measurements.csv``.

    ``cost`` holds the rows of the probe, where it was made. Rows that were measured in unlike ways
    stand apart; a run that was measured in another way is counted in ``n_otherwise``.
    """
    axes = _axes(found, cost)
    answer = []
    keys = ("arm", "protocol", "cell", "extractor", "base")
    for rows in groups(measurements, *keys).values():
        ways = sorted({(row["metric"], row["identity"]) for row in rows if row["identity"]})
        for metric, identity in ways or [(rows[0]["metric"], "")]:
            answer.append(_curve_row(rows, metric, identity, axes))
    answer.sort(
        key=lambda row: (
            *(row["protocol"], row["metric"], row["arm"]),
            *(-1 if row["step"] is None else row["step"], row["cell"], row["identity"]),
        )
    )
    return answer


def _curve_row(
    rows: list[dict], metric: str, identity: str, axes: Mapping[str, dict]
) -> dict[str, Any]:
    """One row of ``curves.csv``: the rows of an arm's runs in one cell, in one way of measuring."""
    runs = list(groups(rows, "run").values())
    states = [_state(own, identity) for own in runs]
    pairs = zip(runs, states, strict=True)
    values = [float(np.mean([row["value"] for row in own])) for own, state in pairs if state == ""]
    low, high = statistics.bootstrap_interval(values)
    return {
        **{key: rows[0][key] for key in (*ARM, "dataset", "protocol", "extractor", "base", "cell")},
        **{key: _known(rows, key) for key in COLUMNS_OF_CELL},
        **axes[rows[0]["run"]],
        "metric": metric,
        "identity": identity,
        "better": better(metric),
        "sampling_seeds": max(len(own) for own in runs),
        "n": len(values),
        "mean": float(np.mean(values)) if values else None,
        "ci_low": low,
        "ci_high": high,
        "n_runs": len(runs),
        "n_diverged": states.count("diverged"),
        "n_missing": states.count("missing"),
        "n_not_measured": states.count(NOT_MEASURED),
        "n_otherwise": states.count(OTHERWISE),
    }


def _known(rows: list[dict], key: str) -> Any:
    """A column of a cell, from a run that knows it; of a best snapshot the step is each run's."""
    if rows[0]["best"] and key in ("step", "images_seen"):
        return None
    return next((row[key] for row in rows if row[key] is not None), None)


def _state(rows: list[dict], identity: str) -> str:
    """What a run is in a cell (``rows``: by sampling seed); empty where it has its number."""
    states = {row["status"] for row in rows}
    if "diverged" in states:
        return "diverged"
    if states & {"missing", "running"}:
        return "missing"
    if any(row["identity"] not in (identity, "") for row in rows):
        return OTHERWISE
    return NOT_MEASURED if NOT_MEASURED in states else ""


def _axes(found: list[Found], cost: pd.DataFrame | None) -> dict[str, dict[str, Any]]:
    """By run, the numbers of its arm that quality can be drawn over."""
    macs: dict[str, float] = {}
    if cost is not None and "quantity" in cost:
        rows = cost[(cost["quantity"] == "macs") & cost["value"].notna()]
        arms = rows["run"].map({one.run: one.arm for one in found})
        macs = rows["value"].astype(float).groupby(arms).mean().to_dict()
    parameters: dict[str, int] = {}
    for one in found:
        if one.train.get("parameters") is not None:
            parameters.setdefault(one.arm, one.train["parameters"])
    return {
        one.run: {
            "kappa": _kappa(one.spec.get("skip_scaling") or {}),
            "reference_batch": _reference(one.spec.get("target") or {}),
            "macs": macs.get(one.arm),
            "parameters": parameters.get(one.arm),
        }
        for one in found
    }


def _kappa(scaling: Mapping[str, Any]) -> float | None:
    """kappa of a constant scaling; without scaling it is 1."""
    method = scaling.get("method")
    return 1.0 if method == "none" else scaling.get("kappa") if method == "cs" else None


def _reference(target: Mapping[str, Any]) -> int | None:
    """Size of the stable target's reference batch."""
    return target.get("reference") if target.get("kind") == "stf" else None
