"""How good are the samples of every run? Rows of ``metrics.csv`` and ``identities.csv``.

Two identities never share a metric name.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from study.analysis.names import NOT_ASKED, NOT_MEASURED, OTHERWISE, MetricName, flat, word
from study.analysis.tables.found import Found, Score
from study.analysis.tables.runs import finite
from study.files import canonical_json


def metric_rows(found: list[Found], labels: dict) -> tuple[list[dict], list[dict]]:
    """Rows of ``metrics.csv`` and ``identities.csv``, which hold the main measurements.

    Every run has a row for every metric.
    """
    scores = _parted(found)
    first: dict[str, dict[str, Any]] = {}
    for one in found:
        for metric, score in scores[one.run].items():
            first.setdefault(metric, score.identity)
    rows = []
    for one in found:
        own = scores[one.run]
        for metric, identity in sorted(first.items()):
            state, note = _state(one, own, metric, identity)
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
                    "value": finite(own[metric].value) if state == "done" else None,
                    "identity": identity_id(identity) if metric in own else "",
                    "note": note,
                }
            )
    rows.sort(key=lambda row: (row["metric"], row["run"]))
    return rows, _identity_rows(first, found)


def _identity_rows(main: Mapping[str, dict[str, Any]], found: list[Found]) -> list[dict[str, Any]]:
    """The identities of the main measurements by metric, then those of all others."""
    known = {(metric, identity_id(identity)): identity for metric, identity in main.items()}
    ids = {name for _, name in known}
    others = {}
    for one in found:
        for each in one.measurements:
            for extractor in each.wanted:
                for score in each.scores(extractor):
                    key = score.metric, identity_id(score.identity)
                    if key[1] not in ids:
                        others[key] = score.identity
    return [
        {
            "identity": name,
            "metric": metric,
            **{key: word(value) for key, value in identity.items() if value is not None},
        }
        for every in (known, others)
        for (metric, name), identity in sorted(every.items(), key=lambda item: item[0])
    ]


def _parted(found: list[Found]) -> dict[str, dict[str, Score]]:
    """By run and metric, the numbers of the main measurements.

    A metric that was measured in unlike ways gets a name for each: <metric>_<identity>. So two
    identities never share a column, and no run is left out for having another.
    """
    scores = {one.run: one.scores() for one in found}
    ways: dict[str, set[str]] = defaultdict(set)
    for own in scores.values():
        for score in own:
            ways[score.metric].add(identity_id(score.identity))

    def name(score: Score) -> str:
        alone = len(ways[score.metric]) == 1
        return score.metric if alone else f"{score.metric}_{identity_id(score.identity)}"

    return {run: {name(score): score for score in own} for run, own in scores.items()}


def _state(
    one: Found, scores: Mapping[str, Score], metric: str, identity: Mapping[str, Any]
) -> tuple[str, str]:
    """What a run is in the column of a metric, and why it has no value there."""
    if metric in scores:
        score = scores[metric]
        return "done" if finite(score.value) is not None else NOT_MEASURED, score.note
    if one.status != "done":
        return one.status, ""
    wanted = replace(MetricName.parse(metric), way="")
    for name, score in sorted(scores.items()):
        if replace(MetricName.parse(name), way="") == wanted:
            return OTHERWISE, f"measured as {name}: {_unlike(score.identity, identity)}"
    if one.main and one.main.reason:
        return NOT_MEASURED, one.main.reason
    return (NOT_MEASURED, NOT_ASKED) if one.main is None or not one.main.lack else ("missing", "")


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what the first of two identities differs from the second."""
    mine, theirs = flat(one), flat(other)
    return ", ".join(
        f"{key} {word(mine.get(key))} instead of {word(theirs.get(key))}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    )


def identity_id(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:8]
