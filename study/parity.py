"""Golden cases: recorded outputs of the official implementations, beside ours.

A folder of cases holds ``<case>.json`` + ``<case>.safetensors``; the kind of a case is its name
without the last ``-<letter>``. ``in/...`` and ``weights/...`` go to the room that knows the kind,
and every stored ``out/...`` is compared with what it returns. A room sees names and shapes of the
stored outputs, never their values.

**The comparison.** |ours - theirs| <= atol + rtol |theirs| for every number, with the case's own
``tolerance``; shapes must be equal, and where theirs is not finite, ours (as float32, in which
cases are stored) must be the same. ``tolerance.outputs`` maps a name, or a pattern with ``*``, to
what is different there: ``rtol`` and ``atol``; ``own_size``, which puts the largest |theirs| of a
sample (first axis) in the place of each number's |theirs|; ``counts``, by how many of n points a
share may differ (n: generated points for a precision, reference points for a recall); ``where:
{input, below}``, which narrows it to the entries at which that input is below. A ``remark`` is
for people and decides nothing.

**Settings.** Whatever in a case's JSON is no description (``DESCRIPTIONS``) is a setting, and a
case fails for one that its runner did not look at: the outputs might be those of another value.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.files import UserError, printable, read_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

Case = Mapping[str, Any]
Tensors = dict[str, "Tensor"]
Runner = Callable[[Case, Tensors], Tensors]

DESCRIPTIONS = frozenset(
    {
        "case",
        "environment",
        "formula",
        "inputs",
        "intermediate_tensors",
        "model",
        "max_abs_difference_float32_float64",
        "notes",
        "outputs",
        "remark",
        "seed",
        "source",
        "storage",
        "tolerance",
        "variant",
        "weights",
    }
)
"""Keys of a case's JSON that describe it, or are read here, and change no output."""


class Settings(Mapping[str, Any]):
    """A part of a case's JSON that remembers what was looked at; so do the parts inside it."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = {
            key: Settings(value) if isinstance(value, dict) and key not in DESCRIPTIONS else value
            for key, value in content.items()
        }
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._content[key]
        self._seen.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def unused(self) -> Iterator[str]:
        """Paths of the settings that nobody looked at."""
        for key, value in self._content.items():
            if key in DESCRIPTIONS:
                continue
            if key not in self._seen:
                yield key
            elif isinstance(value, Settings):
                yield from (f"{key}.{inner}" for inner in value.unused())


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
    if not path.exists():
        raise Damaged(f"{path.name} is missing")
    try:
        return read_json(path)
    except UserError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise Damaged(f"{path.name} cannot be read ({said})") from None


def _is_case(folder: Path, name: str) -> bool:
    """Whether a JSON file is half of a case, rather than facts without tensors."""
    if (folder / f"{name}.safetensors").exists():
        return True
    try:
        content = _json(folder / f"{name}.json")
    except Damaged:
        return True
    return isinstance(content, dict) and bool({"tolerance", "outputs"} & content.keys())


def read(folder: Path, name: str) -> tuple[dict[str, Any], Tensors]:
    """A case's JSON and tensors. Raises ``Damaged`` where they are incomplete or disagree."""
    from study.bounded import reason
    from study.tensors import read_safetensors

    case = _json(folder / f"{name}.json")
    if not isinstance(case, dict):
        raise Damaged(f"{name}.json is not an object")
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise Damaged(f"{path.name} is missing")
    try:
        tensors = read_safetensors(path)
    except Exception as error:  # decoders of damaged bytes raise almost anything
        raise Damaged(f"{path.name} cannot be read ({reason(error)})") from None
    for part in ("inputs", "outputs"):
        listed = case.get(part) or {}
        if not isinstance(listed, dict):
            raise Damaged(f"{name}.json: {part} is not an object")
        for key, facts in listed.items():
            if key not in tensors:
                raise Damaged(f"{path.name} lacks {key}")
            shape = facts.get("shape") if isinstance(facts, dict) else None
            if shape is not None and list(tensors[key].shape) != shape:
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


RULES = frozenset({"rtol", "atol", "own_size", "counts", "where"})
"""What ``tolerance.outputs`` may say of an output."""


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


def run_case(folder: str | Path, name: str, known: dict[str, Runner] | None = None) -> Verdict:
    """Run one case of a folder, as ``judge`` does."""
    runner = _runner(kind_of(name), runners() if known is None else known)
    if runner is None:
        return Verdict(name, problems=[f"unknown kind {kind_of(name)!r}"])
    try:
        case, tensors = read(Path(folder), name)
    except Damaged as error:
        return Verdict(name, problems=[str(error)])
    return judge(name, case, tensors, runner)


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
            Text(printable(one.case)),
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
        if one.problems:
            # Worst first: one wrong layer puts all outputs behind it out.
            ranked = sorted(one.problems, key=lambda text: not text.startswith(one.worst or "\0"))
            more = f" (and {len(ranked) - 1} more)" if len(ranked) > 1 else ""
            console.print(Text(printable(f"{one.case}: {ranked[0]}{more}"), style="red"))
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
