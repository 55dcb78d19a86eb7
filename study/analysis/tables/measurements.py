"""What did every measurement of every run give? Rows of ``measurements.csv``.

One row per run x measurement x protocol that asks for it x extractor x metric. What is not there
is a row that says so, and is never read from another.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from study.analysis.names import NOT_MEASURED, MetricName
from study.analysis.tables.found import Found, Measurement, Score
from study.analysis.tables.metrics import identity_id
from study.analysis.tables.runs import finite
from study.files import UserError, canonical_json
from study.spec.base import of_kind
from study.spec.metrics import numbers
from study.spec.samplers import SAMPLERS

CELL = ("snapshot", "weights", "sampler", "nfe", "guidance", "labels", "images")
"""Fields of a metric's identity that a protocol may vary, and that have columns of their own."""


def measurement_rows(found: list[Found], labels: Mapping[str, dict]) -> list[dict[str, Any]]:
    """Rows of ``measurements.csv``, runs in the given order and measurements in the manifest's.

    A metric that was measured in unlike ways, the columns of a cell left aside, gets a name for
    each: <metric>_<way>. Rows have a further key ``cell``: how it was measured, but for the seed.
    """
    names = _Names(found)
    return [
        {
            **labels[one.run],
            **_cell(one, each),
            "run": one.run,
            "seed": one.axis("seed"),
            "protocol": protocol,
            "extractor": extractor,
            **row,
        }
        for one in found
        for each in one.measurements
        for protocol in each.protocols
        for extractor in each.wanted
        for row in _numbers(one, each, extractor, names)
    ]


class _Names:
    """What metrics are called: those that were measured, and those that are missing."""

    def __init__(self, found: list[Found]) -> None:
        self.ways: dict[str, set[str]] = defaultdict(set)
        self.peers: dict[tuple, str] = {}
        for one in found:
            for each in one.measurements:
                for extractor in each.wanted:
                    for score in each.scores(extractor):
                        self.ways[score.metric].add(_way(score))
                        number = MetricName.parse(score.metric).base
                        key = (extractor, number, _asked(one, each))
                        self.peers.setdefault(key, score.metric)

    def measured(self, score: Score) -> str:
        alone = len(self.ways[score.metric]) == 1
        return score.metric if alone else f"{score.metric}_{_way(score)}"

    def missing(self, one: Found, each: Measurement, extractor: str, number: str) -> str:
        """As in other runs that were asked for the same."""
        known = self.peers.get((extractor, number, _asked(one, each)))
        features = [] if number == "fid" or extractor == "inception" else [extractor]
        images = [] if each.images is None else [str(each.images)]
        return known or "_".join([number, *features, *images])


def _asked(one: Found, each: Measurement) -> str:
    return canonical_json([one.spec.get("dataset"), each.cell.get("images")])


def _way(score: Score) -> str:
    return identity_id({key: value for key, value in score.identity.items() if key not in CELL})


def _numbers(one: Found, each: Measurement, extractor: str, names: _Names) -> list[dict[str, Any]]:
    """What one extractor gave of one measurement, and what it should have given."""
    rows = []
    for score in each.scores(extractor):
        value = finite(score.value)
        rows.append(
            {
                "metric": names.measured(score),
                "base": MetricName.parse(score.metric).base,
                "status": NOT_MEASURED if value is None else "done",
                "value": value,
                "spread": finite(score.spread),
                "identity": identity_id(score.identity),
                "note": score.note or ("" if value is not None else "not finite"),
            }
        )
    there = {row["base"] for row in rows}
    wanted = [number for metric in each.wanted[extractor] for number in numbers(metric, extractor)]
    status, note = _absence(one, each, extractor)
    rows += [
        {
            "metric": names.missing(one, each, extractor, number),
            "base": number,
            "status": status,
            "identity": "",
            "note": note,
        }
        for number in wanted
        if number not in there
    ]
    return rows


def _absence(one: Found, each: Measurement, extractor: str) -> tuple[str, str]:
    """Why a number of an extractor is not there: the status of its row, and a remark."""
    record = each.records.get(extractor)
    stop = one.train.get("step")
    reached = each.step is not None and stop is not None and each.step <= stop and not each.last
    if one.status == "diverged" and not reached:
        return "diverged", f"training diverged at step {stop}"
    if record and record.get("reason"):
        return NOT_MEASURED, record["reason"]
    if one.status in ("running", "missing"):
        return one.status, ""
    return "missing", each.lack or "not in its file"


def _cell(one: Found, each: Measurement) -> dict[str, Any]:
    """The columns that say which measurement a row is of."""
    cell = each.cell
    sampler, guidance = cell["sampler"], cell.get("guidance") or {}
    best = f"best({each.best_of})" if each.best_of else ""
    asked = {key: value for key, value in cell.items() if key not in ("at", "seed")}
    return {
        "measurement": each.name,
        "step": each.step,
        "last": str(each.last).lower(),
        "best": best,
        "images_seen": _images_seen(one, each.step),
        "weights": cell["weights"],
        "sampler": sampler_text(sampler),
        "sampler_steps": sampler.get("steps"),
        "nfe": each.generate.get("nfe"),
        "guidance_kind": guidance.get("kind", ""),
        "guidance_scale": guidance.get("scale"),
        "labels": labels_text(cell["labels"]),
        "sampling_seed": cell["seed"],
        "images": each.images,
        "cell": canonical_json([best or each.step, asked]),
    }


def _images_seen(one: Found, step: int | None) -> int | None:
    """Images that training had seen at a step."""
    if step is None:
        return None
    done, seen = one.train.get("step"), one.train.get("images_seen")
    if done and seen is not None:
        return round(seen * step / done)
    batch = (one.spec.get("training") or {}).get("batch")
    return None if batch is None else step * batch


def sampler_text(sampler: Mapping[str, Any]) -> str:
    """A sampler in short, its number of steps left aside: "edm_heun", "edm_heun(S_churn=40)"."""
    try:
        chosen = of_kind(SAMPLERS, sampler, "sampler").model_dump(
            mode="json", exclude_defaults=True
        )
    except UserError:  # of another version
        chosen = dict(sampler)
    kind = chosen.pop("kind")
    chosen.pop("steps", None)
    options = ", ".join(f"{key}={value}" for key, value in sorted(chosen.items()))
    return f"{kind}({options})" if options else kind


def labels_text(labels: Any) -> str:
    """Which labels samples get: "data", "uniform", or "classes 3 5"."""
    if isinstance(labels, Mapping):
        return "classes " + " ".join(map(str, labels["classes"]))
    return str(labels)
