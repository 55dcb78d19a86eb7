"""Comparing what a case records with what we compute.

|ours - theirs| <= atol + rtol |theirs| for every number, with the tolerance of its output; shapes
must be equal, and where theirs is not finite, ours (as float32, in which cases are stored) must be
the same. A runner sees names and shapes of the stored outputs, never their values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from study.parity.case import Case, Damaged, Runner, Settings, Tensors, kind_of, names, read
from study.parity.kinds import KINDS, runner_of
from study.parity.tolerance import Tolerance, tolerances


@dataclass
class Verdict:
    """How one case came out. ``share`` is the worst part of a tolerance that was used (1 = all)."""

    case: str
    outputs: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    share: float = 0.0
    tolerance: str = ""
    worst: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def _compare(verdict: Verdict, name: str, ours: Any, theirs: Tensor, allowed: Tolerance) -> None:
    """Add one output to the case's verdict."""
    if ours is None:
        verdict.problems.append(f"{name} is not produced")
        return
    ours = torch.as_tensor(ours).detach().cpu()
    if ours.shape != theirs.shape:
        wrong = f"{list(ours.shape)} instead of {list(theirs.shape)}"
        verdict.problems.append(f"{name} is {wrong}")
        return
    verdict.outputs += 1
    finite = theirs.isfinite()
    stored = ours.to(torch.float32)
    same = (stored == theirs) | (stored.isnan() & theirs.isnan())
    if bool((~finite & ~same).any()):
        verdict.problems.append(f"{name}: non-finite values differ")
    if not bool(finite.any()):
        return
    ours, wanted = ours.double(), theirs.double().masked_fill(~finite, 0.0)
    error = (ours - wanted).abs().masked_fill(~finite, 0.0)
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    limit = allowed.limit(wanted)
    shares = torch.where(error > 0, error / limit, 0.0)
    absolute, share = error.max().item(), shares.max().item()
    size = wanted.abs().max().item()
    verdict.absolute = max(verdict.absolute, absolute)
    verdict.relative = max(verdict.relative, absolute / size if size else float(absolute > 0))
    if share >= verdict.share:
        verdict.share, verdict.worst, verdict.tolerance = share, name, str(allowed)
    if share > 1:
        verdict.problems.append(f"{name} differs by {absolute:.3g}, {share:.3g} of what is allowed")


def _hidden(output: Tensor) -> Tensor:
    """An output's shape and type without its values."""
    return output.new_full(output.shape, float("nan") if output.is_floating_point() else 0)


def judge(name: str, case: Case, tensors: Tensors, runner: Runner) -> Verdict:
    """Run one case and compare. Whatever goes wrong in it is in the verdict, not an exception."""
    verdict = Verdict(name)
    try:
        allowed = tolerances(case, tensors)
        settings = Settings(case)
        mode = settings.get("mode", "eval")
        if mode != "not applicable" and "eval" not in str(mode):
            raise Damaged(f"mode {mode!r}: networks are compared in evaluation")
        expected = {key: value for key, value in tensors.items() if key.startswith("out/")}
        hidden = {key: _hidden(value) for key, value in expected.items()}
        ours = runner(settings, tensors | hidden)
        verdict.problems += [f"setting {path} was not used" for path in settings.unused()]
        for key, theirs in sorted(expected.items()):
            _compare(verdict, key, ours.get(key), theirs, allowed[key])
    except Damaged as error:
        verdict.problems.append(str(error))
    except Exception as error:  # a case that cannot be run has failed; the others still count
        text = " ".join(str(error).split())
        verdict.problems.append(f"{type(error).__name__}: {text[:300]}")
    return verdict


def run_case(folder: str | Path, name: str, kinds: Mapping[str, Runner] = KINDS) -> Verdict:
    """Run one case of a folder, as ``judge`` does."""
    runner = runner_of(kind_of(name), kinds)
    if runner is None:
        return Verdict(name, problems=[f"unknown kind {kind_of(name)!r}"])
    try:
        case, tensors = read(Path(folder), name)
    except Damaged as error:
        return Verdict(name, problems=[str(error)])
    return judge(name, case, tensors, runner)


def run(folder: str | Path) -> Iterator[Verdict]:
    """Run every case of a folder, in the order of their names."""
    for name in names(folder)[0]:
        yield run_case(folder, name)
