"""Which rows belong together, and what do tests of one question show together?"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from study.analysis import statistics


def groups(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    answer: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        answer[tuple(row[key] for key in keys)].append(row)
    return answer


def correct(
    rows: Iterable[dict[str, Any]], *question: str, words: tuple[str, str] = ("better", "worse")
) -> None:
    """Add Holm's p, the number of tests behind it and the verdict to compared rows, in place.

    Rows that agree in the columns ``question`` are the tests of one family. ``_side``, which is
    taken off them, is below zero where the arm is lower than what it is compared with.
    """
    for family in groups(rows, *question).values():
        adjusted = statistics.holm([row["p_value"] for row in family])
        tests = sum(math.isfinite(p) for p in adjusted)
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"], row["tests_in_family"] = p, tests
            worse = (row.pop("_side") < 0) != (row["better"] == "lower")
            if not math.isfinite(p):
                row["verdict"] = "no test"
            else:
                shown = p < 1 - statistics.LEVEL
                row["verdict"] = words[worse] if shown else "no difference shown"
