"""How good are the samples of every run? Rows of ``metrics.csv`` and ``identities.csv``.

Two identities never share a metric name.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from study.analysis.names import NOT_MEASURED, OTHERWISE, MetricName, flat, word
from study.analysis.tables.found import Found
from study.analysis.tables.runs import finite
from study.files import UserError, canonical_json


def metric_rows(found: list[Found], labels: dict) -> tuple[list[dict], list[dict]]:
    """Rows of ``metrics.csv`` and ``identities.csv``; every run has a row for every metric."""
    _part_identities(found)
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for one in found:
        for metric in one.metrics:
            first.setdefault(metric, (one.run, dict(one.fidelity["identity"][metric])))
    rows = []
    for one in found:
        for metric in sorted(first):
            identity = first[metric][1]
            state, note = _state(one, metric, identity)
            rows.append(
                {
                    **labels[one.run],
                    "run": one.run,
                    "seed": one.axis("seed"),
                    "status": state,
                    "metric": metric,
                    "base": MetricName.parse(metric).base,
                    "extractor": identity.get("extractor", ""),
                    "images": identity.get("images"),
                    "value": finite(one.metrics.get(metric)) if state == "done" else None,
                    "identity": _identity_id(identity) if metric in one.metrics else "",
                    "note": note,
                }
            )
    rows.sort(key=lambda row: (row["metric"], row["run"]))
    identities = [
        {
            "identity": _identity_id(identity),
            "metric": metric,
            **{key: word(value) for key, value in identity.items() if value is not None},
        }
        for metric, (_, identity) in sorted(first.items())
    ]
    return rows, identities


def _part_identities(found: list[Found]) -> None:
    """A metric that runs measured in unlike ways gets a name for each: <metric>_<identity>.

    So two identities never share a column, and no run is left out for having another. Raises
    ``UserError`` where a metric has no identity.
    """
    ways: dict[str, set[str]] = defaultdict(set)
    for one in found:
        for metric in one.metrics:
            identity = (one.fidelity.get("identity") or {}).get(metric)
            if not identity:
                raise UserError(
                    f"{one.folder / 'evaluate' / 'fidelity.json'}: metric {metric} has no identity"
                )
            ways[metric].add(_identity_id(identity))
    for one in found:
        for metric in one.metrics:
            if len(ways[metric]) == 1:
                continue
            name = f"{metric}_{_identity_id(one.fidelity['identity'][metric])}"
            for section in ("metrics", "identity", "notes", "spread"):
                values = one.fidelity.get(section) or {}
                if metric in values:
                    values[name] = values.pop(metric)


def _state(one: Found, metric: str, identity: Mapping[str, Any]) -> tuple[str, str]:
    """What a run is in the column of a metric, and why it has no value there."""
    if one.status != "done":
        return one.status, ""
    if metric in one.metrics:
        note = (one.fidelity.get("notes") or {}).get(metric, "")
        return "done" if finite(one.metrics[metric]) is not None else NOT_MEASURED, note
    wanted = replace(MetricName.parse(metric), way="")
    for name in sorted(one.metrics):
        if replace(MetricName.parse(name), way="") == wanted:
            unlike = _unlike(one.fidelity["identity"][name], identity)
            return OTHERWISE, f"measured as {name}: {unlike}"
    reason = one.fidelity.get("reason")
    return (NOT_MEASURED, reason) if reason else ("missing", "")


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what the first of two identities differs from the second."""
    mine, theirs = flat(one), flat(other)
    return ", ".join(
        f"{key} {word(mine.get(key))} instead of {word(theirs.get(key))}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    )


def _identity_id(identity: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:8]
