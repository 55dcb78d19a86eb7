"""By how much an output may differ: what a case's ``tolerance`` says.

``rtol`` and ``atol`` are those of the case. ``outputs`` maps a name, or a pattern with ``*``, to
what is different there: ``rtol`` and ``atol``; ``own_size``, which puts the largest |theirs| of a
sample (first axis) in the place of each number's |theirs|; ``counts``, by how many of n points a
share may differ (n: generated points for a precision, reference points for a recall); ``where:
{input, below}``, which narrows it to the entries at which that input is below. A ``remark`` is for
people and decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from typing import Any

from torch import Tensor

from study.parity.case import Case, Damaged, Tensors

RULES = frozenset({"rtol", "atol", "own_size", "counts", "where"})
"""What ``tolerance.outputs`` may say of an output."""


@dataclass(frozen=True)
class Tolerance:
    """What one output may differ by; ``where`` [n] limits the change to entries of axis 0."""

    rtol: float
    atol: float
    own_size: bool = False
    where: Tensor | None = None
    base: "Tolerance | None" = None

    def limit(self, theirs: Tensor) -> Tensor:
        """Largest allowed |ours - theirs| for every number of ``theirs`` (float64)."""
        size = theirs.abs()
        if self.own_size and theirs.dim() > 1:
            size = size.flatten(1).amax(1).reshape(-1, *[1] * (theirs.dim() - 1)).expand_as(theirs)
        limit = self.atol + self.rtol * size
        if self.where is None or self.base is None:
            return limit
        where = self.where.reshape(-1, *[1] * (theirs.dim() - 1))
        return limit.where(where, self.base.limit(theirs))

    def __str__(self) -> str:
        return f"{self.atol:.3g} + {self.rtol:.3g} |x|"


def _points(name: str, tensors: Tensors) -> int:
    """How many points a share is taken of."""
    over = "generated" if "precision" in name else "reference" if "recall" in name else ""
    rows = [len(v) for k, v in tensors.items() if k.startswith("in/") and v.dim() > 1 and over in k]
    return min(rows, default=1)


def _number(rule: Mapping[str, Any], key: str, where: str) -> float:
    value = rule.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise Damaged(f"the JSON gives no {where} with {key}")
    return float(value)


def _changed(base: Tolerance, name: str, rule: Any, tensors: Tensors, where: str) -> Tolerance:
    """The tolerance of an output to which a rule of ``tolerance.outputs`` applies."""
    if not isinstance(rule, dict) or rule.keys() - RULES:
        raise Damaged(f"{where}: a rule has {', '.join(sorted(RULES))}, and no more")
    if "counts" in rule:
        # The last digits of a share that is stored as float32 are room for rounding.
        return Tolerance(0.0, 1e-6 + _number(rule, "counts", where) / _points(name, tensors))
    changes: dict[str, Any] = {
        key: _number(rule, key, where) for key in ("rtol", "atol") if key in rule
    }
    if "own_size" in rule:
        changes["own_size"] = rule["own_size"] is True
    if "where" in rule:
        condition = rule["where"] if isinstance(rule["where"], dict) else {}
        values = tensors.get(str(condition.get("input")))
        if condition.keys() != {"input", "below"} or values is None or values.dim() != 1:
            raise Damaged(f"{where}: where has a one-dimensional input, and below")
        if tensors[name].shape[:1] != values.shape:
            raise Damaged(f"{where}: {name} has other entries than {condition['input']}")
        changes |= {"where": values < _number(condition, "below", where), "base": base}
    return replace(base, **changes)


def tolerances(case: Case, tensors: Tensors) -> dict[str, Tolerance]:
    """The tolerance of every stored output. Raises ``Damaged`` where the JSON gives none."""
    given = case.get("tolerance")
    if not isinstance(given, dict):
        raise Damaged("the JSON gives no tolerance with rtol and atol")
    unknown = given.keys() - {"rtol", "atol", "outputs", "remark"}
    if unknown:
        raise Damaged(f"tolerance.{min(unknown)} is unknown")
    base = Tolerance(*(_number(given, key, "tolerance") for key in ("rtol", "atol")))
    result = {name: base for name in tensors if name.startswith("out/")}
    for pattern, rule in (given.get("outputs") or {}).items():
        where = f"tolerance.outputs.{pattern}"
        names = matching(result, pattern)
        if not names:
            raise Damaged(f"{where}: no output has such a name")
        for name in names:
            result[name] = _changed(result[name], name, rule, tensors, where)
    return result
