"""Metrics: what is known of each, whoever measures, judges or draws it.

A new one is a row here and a function in ``study.fidelity.evaluate``.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What is known of a metric of images, whatever the features.

    ``numbers`` are those that it gives, each with its word for people. A number below or above
    ``possible`` is a fault of arithmetic. ``logits``: it needs the extractor's class logits.
    """

    label: str
    better: str
    possible: tuple[float, float]
    numbers: dict[str, str]
    logits: bool = False


METRICS = {
    # On Inception's features, and on no others, a Fréchet distance is the FID. That of nearly
    # equal sets may fall below zero by rounding.
    "fd": Metric("Fréchet distance", "lower", (-1e-3, math.inf), {"fid": "FID", "fd": "FD"}),
    "kid": Metric("kernel distance", "lower", (-math.inf, math.inf), {"kid": "KID"}),
    "is": Metric("Inception score", "higher", (1 - 1e-6, math.inf), {"is": "IS"}, logits=True),
    "prc": Metric(
        "precision and recall",
        "higher",
        (0.0, 1.0),
        {"precision": "precision", "recall": "recall"},
    ),
}
NUMBERS = {number: metric for metric in METRICS.values() for number in metric.numbers}
"""By number, the metric that gives it. A study's leading number is the first of these it has."""


def numbers(metric: str, extractor: str) -> tuple[str, ...]:
    """The numbers of a metric on an extractor's features.

    >>> numbers("fd", "inception"), numbers("prc", "digits")
    (('fid',), ('precision', 'recall'))
    """
    if metric == "fd":
        return ("fid",) if extractor == "inception" else ("fd",)
    return tuple(METRICS[metric].numbers)
