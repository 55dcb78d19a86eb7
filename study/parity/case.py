"""A golden case: its JSON, which remembers what of it was looked at, and its tensors.

The kind of a case is its name without the last ``-<letter>``. Whatever in its JSON is no
description (``DESCRIPTIONS``) is a setting, and a case fails for one that its runner did not look
at: the outputs might be those of another value.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.bounded import reason
from study.files import UserError, read_json

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


def expect(given: dict[str, Any], **wanted: Any) -> None:
    """Take settings out that have no other value here. Raises ``ValueError`` where they have."""
    for key, value in wanted.items():
        found = given.pop(key, value)
        if type(found) is not type(value) or found != value:
            raise ValueError(f"{key} {found!r} cannot be had here; it must be {value!r}")


def kind_of(case: str) -> str:
    """The kind of a case: its name without the last ``-<letter>``."""
    return re.sub(r"-[a-z]$", "", case)


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
