"""Golden cases: recorded outputs of the official implementations, beside ours.

A folder of cases holds ``<case>.json`` + ``<case>.safetensors``; the kind of a case is its name
without the last ``-<letter>``. ``in/...`` and ``weights/...`` go to the room that knows the kind,
and every stored ``out/...`` is compared with what it returns. A room sees names and shapes of the
stored outputs, never their values.

**The comparison.** |ours - theirs| <= atol + rtol |theirs| for every number, with the case's own
``tolerance``; shapes must be equal, and where theirs is not finite, ours (as float32, in which
cases are stored) must be the same. A ``remark`` beside the tolerance changes it for single outputs.
It is read clause by clause (split at ``;``), each with a scope and a rule:

- scope: a name that begins with ``out/`` (with all outputs that extend it by ``_...`` or ``/...``);
  or words that are parts of output names between ``/`` and ``_``; or "<word> runs", the runs that
  the JSON lists under ``<word>_runs``. A clause that names nothing speaks of what the clause
  before it named. "t below 1e-3" narrows it to the entries at which ``in/t`` or ``in/t_...`` is.
- rule: "rtol X" and "atol X" take the place of the case's own; "relative to its own size" puts the
  largest |theirs| of a sample (first axis) in the place of each number's |theirs|; "+-k count"
  means that a share of n points may differ by k/n and no more (n: generated points for a
  precision, reference points for a recall).

A clause without a rule is a comment. A rule whose scope is not found is reported and not applied.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.files import UserError, write_text

if TYPE_CHECKING:
    from torch import Tensor

Case = dict[str, Any]
Tensors = dict[str, "Tensor"]
Runner = Callable[[Case, Tensors], Tensors]

NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"


def runners() -> dict[str, Runner]:
    """Kind (``*`` stands for any ending) -> the function that computes a case's outputs."""
    from study.backbones import patch_unet, songunet, udit, uvit
    from study.diffusion import parity as diffusion
    from study.diffusion.samplers import parity as samplers
    from study.fidelity import metrics

    return {
        **dict.fromkeys(("uvit", "uvit-noskip", "uvit-t2i", "scalelong-*"), uvit.run_parity_case),
        **dict.fromkeys(("udit", "udit-alt"), udit.run_parity_case),
        "adm-*": patch_unet.run_parity_case,
        **dict.fromkeys(("ddpmpp", "ncsnpp"), songunet.run_parity_case),
        **diffusion.RUNNERS,
        **samplers.RUNNERS,
        "fid": metrics.run_parity_case,
    }


def kind_of(case: str) -> str:
    """The kind of a case: its name without the last ``-<letter>``."""
    return re.sub(r"-[a-z]$", "", case)


def _runner(kind: str, known: dict[str, Runner]) -> Runner | None:
    return next((known[pattern] for pattern in known if fnmatchcase(kind, pattern)), None)


# --- reading -----------------------------------------------------------------------------------


class Damaged(Exception):
    """A case that cannot be compared: one line that says why."""


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path.name} cannot be read ({error})") from None


def _is_case(folder: Path, name: str) -> bool:
    """Whether a JSON file is half of a case, rather than facts without tensors."""
    if (folder / f"{name}.safetensors").exists():
        return True
    try:
        content = _json(folder / f"{name}.json")
    except Damaged:
        return True
    return isinstance(content, dict) and bool({"tolerance", "outputs"} & content.keys())


def read(folder: Path, name: str) -> tuple[Case, Tensors]:
    """A case's JSON and tensors. Raises ``Damaged`` where they are incomplete or disagree."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    case = _json(folder / f"{name}.json")
    if not isinstance(case, dict):
        raise Damaged(f"{name}.json is not an object")
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise Damaged(f"{path.name} is missing")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path.name} cannot be read ({error})") from None
    for part in ("inputs", "outputs"):
        for key, facts in (case.get(part) or {}).items():
            if key not in tensors:
                raise Damaged(f"{path.name} lacks {key}")
            shape = facts.get("shape") if isinstance(facts, dict) else None
            if shape is not None and list(tensors[key].shape) != list(shape):
                raise Damaged(
                    f"{path.name}: {key} is {list(tensors[key].shape)}, its JSON says {shape}"
                )
    if not any(key.startswith("out/") for key in tensors):
        raise Damaged(f"{path.name} holds no outputs")
    return case, tensors


# --- tolerance ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """What one output may differ by; ``where`` [n] limits the change to entries of axis 0."""

    rtol: float
    atol: float
    own_size: bool = False
    where: "Tensor | None" = None
    base: "Tolerance | None" = None

    def limit(self, theirs: "Tensor") -> "Tensor":
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


def _words(clause: str) -> list[str]:
    words = re.findall(r"out/[\w/+.-]*\w|\w+", clause)
    explicit = [word for word in words if word.startswith("out/")]
    return explicit or [word for word in words if len(word) > 2]


def _parts(name: str) -> set[str]:
    """``out/grid/cum_beta`` -> grid, cum_beta, cum, beta; without a plural's s."""
    pieces = name.removeprefix("out/").split("/")
    return {p.lower().rstrip("s") for piece in pieces for p in (piece, *piece.split("_"))}


def _scope(clause: str, case: Case, names: Iterable[str]) -> set[str]:
    """The outputs that a clause of a remark names."""
    found: set[str] = set()
    for word in _words(clause):
        if word.startswith("out/"):
            found |= {n for n in names if n == word or n.startswith((f"{word}_", f"{word}/"))}
        else:
            found |= {n for n in names if word.lower().rstrip("s") in _parts(n)}
    for word in re.findall(r"(\w+) runs?\b", clause):
        for key, runs in case.items():
            # "sampling runs" are the sample_runs.
            if key.endswith("_runs") and isinstance(runs, dict) and word[:5] == key[:5]:
                found |= {n for n in names if n.removeprefix("out/").split("/")[0] in runs}
    return found


def _where(clause: str, tensors: Tensors, name: str) -> "tuple[bool, Tensor | None]":
    """Whether the clause's condition can be applied to an output, and the entries it selects."""
    condition = re.search(rf"\b(\w+) (below|above) {NUMBER}", clause)
    if condition is None:
        return True, None
    axis, side, bound = condition[1], condition[2], float(condition[3])
    for key in (f"in/{axis}", *(k for k in tensors if k.startswith(f"in/{axis}_"))):
        values = tensors.get(key)
        if values is None or values.dim() != 1 or tensors[name].shape[:1] != values.shape:
            continue
        return True, values < bound if side == "below" else values > bound
    return False, None


def _points(name: str, tensors: Tensors) -> int:
    """How many points a share is taken of."""
    over = "generated" if "precision" in name else "reference" if "recall" in name else ""
    rows = [len(v) for k, v in tensors.items() if k.startswith("in/") and v.dim() > 1 and over in k]
    return min(rows, default=1)


def tolerances(case: Case, tensors: Tensors) -> tuple[dict[str, Tolerance], list[str]]:
    """The tolerance of every stored output, and what of the remark was not understood."""
    given = case.get("tolerance")
    try:
        base = Tolerance(float(given["rtol"]), float(given["atol"]))
    except (TypeError, KeyError, ValueError):
        raise Damaged("the JSON gives no tolerance with rtol and atol") from None
    names = [name for name in tensors if name.startswith("out/")]
    result, unknown, subject = dict.fromkeys(names, base), [], set()
    for clause in re.split(r";|\.\s", str(given.get("remark") or "")):
        scope = _scope(clause, case, names)
        subject = scope or subject
        numbers = {key: float(value) for key, value in re.findall(rf"\b([ra]tol) {NUMBER}", clause)}
        own = re.search(r"relative to (its|their) own size", clause) is not None
        counts = re.search(r"(?:\+-|\+/-|±)\s*(\d+) counts?", clause)
        if not (numbers or own or counts):
            continue
        changed = 0
        for name in subject:
            applies, where = _where(clause, tensors, name)
            if not applies:
                continue
            changed += 1
            if counts:
                # The last digits of a share that is stored as float32 are room for rounding.
                slack = 1e-6 + int(counts[1]) / _points(name, tensors)
                result[name] = Tolerance(0.0, slack)
                continue
            result[name] = Tolerance(
                numbers.get("rtol", base.rtol), numbers.get("atol", base.atol), own, where, base
            )
        if not changed:
            unknown.append(clause.strip())
    return result, unknown


# --- comparing ---------------------------------------------------------------------------------


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
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def _compare(verdict: Verdict, name: str, ours: Any, theirs: "Tensor", allowed: Tolerance) -> None:
    """Add one output to the case's verdict."""
    import torch

    if ours is None:
        verdict.problems.append(f"{name} is not produced")
        return
    ours = torch.as_tensor(ours).detach().cpu()
    if ours.shape != theirs.shape:
        shapes = f"{list(ours.shape)} instead of {list(theirs.shape)}"
        verdict.problems.append(f"{name} is {shapes}")
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


def _hidden(output: "Tensor") -> "Tensor":
    """An output's shape and type without its values."""
    return output.new_full(output.shape, float("nan") if output.is_floating_point() else 0)


def run_case(folder: str | Path, name: str, known: dict[str, Runner] | None = None) -> Verdict:
    """Run one case and compare. Whatever goes wrong in it is in the verdict, not an exception."""
    verdict = Verdict(name)
    runner = _runner(kind_of(name), runners() if known is None else known)
    if runner is None:
        verdict.problems.append(f"unknown kind {kind_of(name)!r}")
        return verdict
    try:
        case, tensors = read(Path(folder), name)
        allowed, unknown = tolerances(case, tensors)
        verdict.notes += [f"remark not applied: {clause}" for clause in unknown]
        expected = {key: value for key, value in tensors.items() if key.startswith("out/")}
        ours = runner(case, tensors | {key: _hidden(value) for key, value in expected.items()})
        for key, theirs in sorted(expected.items()):
            _compare(verdict, key, ours.get(key), theirs, allowed[key])
    except Damaged as error:
        verdict.problems.append(str(error))
    except Exception as error:  # a case that cannot be run has failed; the others still count
        text = " ".join(str(error).split())
        verdict.problems.append(f"{type(error).__name__}: {text[:300]}")
    return verdict


def names(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the cases in a folder, and of JSON files that hold facts instead of a case.

    Raises ``UserError`` where there is no case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with <case>.json + <case>.safetensors")
    found = {p.stem for ending in ("json", "safetensors") for p in folder.glob(f"*.{ending}")}
    cases = [name for name in sorted(found) if _is_case(folder, name)]
    if not cases:
        raise UserError(f"{folder}: no cases here (<case>.json + <case>.safetensors)")
    return cases, sorted(found.difference(cases))


def run(folder: str | Path) -> Iterator[Verdict]:
    """Run every case of a folder, in the order of their names."""
    known = runners()
    for name in names(folder)[0]:
        yield run_case(folder, name, known)


# --- showing -----------------------------------------------------------------------------------


def _table(verdicts: Iterable[Verdict]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("case", "outputs", "abs. error", "rel. error", "tolerance", "used", ""):
        right = column in ("outputs", "abs. error", "rel. error", "used")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for one in verdicts:
        compared = one.outputs > 0
        table.add_row(
            one.case,
            str(one.outputs),
            f"{one.absolute:.2e}" if compared else "",
            f"{one.relative:.2e}" if compared else "",
            one.tolerance,
            f"{one.share:.1%}" if compared else "",
            Text("ok", style="green") if one.passed else Text("FAILED", style="bold red"),
        )
    return table


def show(folder: str | Path, markdown: str | Path | None = None) -> bool:
    """Run a folder's cases and print the table. Returns whether all passed.

    Errors are the largest over a case's outputs: "abs." of any number, "rel." relative to the
    largest number of the same output; "tolerance" belongs to the output that comes closest to its
    limit, and "used" says how close. ``markdown`` is a file for the table of what cases cover.
    """
    from rich.console import Console
    from rich.text import Text

    from study.provenance import Stopwatch

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    cases, facts = names(folder)
    watch = Stopwatch()
    with console.status(f"{len(cases)} cases") if console.is_terminal else nullcontext():
        verdicts = list(run(folder))
    console.print(_table(verdicts))
    for one in verdicts:
        for note in one.notes:
            console.print(Text(f"{one.case}: {note}", style="yellow"))
        if one.problems:
            # Worst first: one wrong layer puts all outputs behind it out.
            ranked = sorted(one.problems, key=lambda text: not text.startswith(one.worst or "\0"))
            more = f" (and {len(ranked) - 1} more)" if len(ranked) > 1 else ""
            console.print(Text(f"{one.case}: {ranked[0]}{more}", style="red"))
    if facts:
        console.print(f"Facts without tensors, not cases: {', '.join(facts)}")
    failed = sum(not one.passed for one in verdicts)
    result = f"{failed} failed" if failed else "all passed"
    console.print(f"{len(verdicts)} cases, {result}, {watch.seconds:.0f} s")
    if markdown is not None:
        from study.parity_table import coverage

        write_text(markdown, coverage(folder, verdicts))
        console.print(f"Coverage: {markdown}")
    return not failed


def show_kinds() -> None:
    """Print the kinds and what computes each."""
    for kind, runner in runners().items():
        about = (runner.__doc__ or "").strip().splitlines()[0] if runner.__doc__ else ""
        print(f"{kind:22} {runner.__module__.removeprefix('study.'):28} {about}")
