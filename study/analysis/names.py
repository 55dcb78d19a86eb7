"""What runs, arms and metrics are called, from the tables to the page."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from study.spec.metrics import NUMBERS

AXES = ["backbone", "skip_scaling", "target", "formulation"]
ARM = ["arm", *AXES, "variant", "line"]
# Why a finished run has no value in a column: none could be had, or another column holds it.
NOT_MEASURED, OTHERWISE = "not measured", "measured otherwise"
NOT_ASKED = "its main measurement has no such number"
ALL = "all"
"""Stands for a backbone where a number is a mean over all of them."""


@dataclass(frozen=True)
class MetricName:
    """The parts of a metric's name: ``fd_digits_1797``, ``fid_50000``, ``fid_50000_ab12cd34``.

    ``way`` is the identity, in the name where runs measured the metric in several ways.
    """

    base: str
    features: str
    images: int | None
    way: str

    @classmethod
    def parse(cls, metric: str) -> "MetricName":
        found = re.fullmatch(r"([^_]+)(?:_(.+?))??(?:_(\d+)(?:_([0-9a-f]{8}))?)?", metric)
        base, features, images, way = found.groups() if found else (metric, "", None, "")
        return cls(base, features or "", None if images is None else int(images), way or "")


def better(metric: str) -> str:
    """ "lower" or "higher": the side of a metric on which the better arms lie."""
    number = MetricName.parse(metric).base
    return NUMBERS[number].better if number in NUMBERS else "higher"


def leading(metrics: Iterable[str], counts: Mapping[str, int]) -> list[str]:
    """Metrics in the order in which they speak for a study, the leading one first.

    The Inception FID, else a Fréchet distance, and so on as in ``NUMBERS``; of several those that
    more runs have (``counts``), on more images; then by name. Those that no run has come last.
    """
    order = list(NUMBERS)

    def rank(metric: str) -> tuple:
        name = MetricName.parse(metric)
        place = order.index(name.base) if name.base in NUMBERS else len(order)
        count = int(counts.get(metric, 0))
        return count == 0, place, -count, -(name.images or 0), metric

    return sorted(set(metrics) - {""}, key=rank)


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(content, Mapping) and content:
        answer: dict[str, Any] = {}
        for key, value in content.items():
            answer.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
        return answer
    return {prefix: content}


def word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
