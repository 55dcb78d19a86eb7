"""Reading checkpoints as data: nothing in a file is ever imported or executed.

Files of ``torch.save`` and safetensors are read by ``study.tensors``. EDM's files hold pickled
network objects together with their Python source (its ``torch_utils.persistence``), for which this
module adds a few names. Tensors and plain containers become what they are; network objects become
``Object``: a class name and a dictionary of attributes. The source in the file is skipped. Any
other name is refused.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from study import bounded, tensors
from study.bounded import Damaged, Name, Object, Stateful
from study.files import UserError
from study.tensors import LEGACY_MAGIC

PERSISTENCE = "torch_utils.persistence"
"""Module whose function rebuilds the network objects in EDM's files."""


class Attributes(dict, Stateful):
    """A dictionary of EDM's ``EasyDict`` class."""

    def restore(self, state: Any) -> None:
        if state:
            raise Damaged("a dictionary with attributes")


def _persistent(meta: Any) -> Object:
    """The object that EDM's persistence describes by ``meta``; its source code is dropped."""
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise Damaged("an object of an unknown persistence type")
    made = Object()
    name = meta.get("class_name")
    made.class_name = name if isinstance(name, str) else ""
    made.restore(meta.get("state"))
    return made


def arguments_of(made: Object) -> dict[str, Any]:
    """Keyword arguments of an object's constructor, where EDM's persistence recorded them.

    Raises ``UserError`` for an argument that is not a plain value.
    """
    recorded = made.state.get("_init_kwargs") or {}
    kept = simple(recorded)
    if not isinstance(recorded, dict) or len(kept) != len(recorded):
        raise UserError("the network's recorded arguments are not plain values")
    return kept


def simple(content: Any) -> dict[str, Any]:
    """The entries of a dictionary that are plain values: numbers, short texts, lists of them.

    What a file calls its settings may be anything, however large or deep.
    """

    def plain(value: Any) -> bool:
        if isinstance(value, str):
            return len(value) <= 10_000
        if isinstance(value, int):
            return abs(value) < 2**63
        return value is None or isinstance(value, float)

    found = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        items = value if isinstance(value, list | tuple) and len(value) <= 100 else (value,)
        if isinstance(key, str) and len(key) <= 100 and all(map(plain, items)):
            found[key] = value
    return found


# --- NumPy numbers, of which EDM's constructor arguments have some -----------------------------


class _NumberType(Stateful):
    """``numpy.dtype`` of a number."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?[fiub][1248]", code):
            shown = repr(code[:40]) if isinstance(code, str) else "without a name"
            raise Damaged(f"a NumPy number of type {shown}")
        self.code = code.lstrip("<>=|")
        self.order = "<"

    def restore(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = "<" if state[1] in ("|", "=") else state[1]


def _number(kind: Any, content: Any) -> Any:
    if not isinstance(kind, _NumberType) or not isinstance(content, bytes):
        raise Damaged("a NumPy number without type or content")
    dtype = np.dtype(kind.order + kind.code)
    if len(content) != dtype.itemsize:
        raise Damaged("a NumPy number of a wrong length")
    return np.frombuffer(content, dtype)[0].item()


# --- names -------------------------------------------------------------------------------------

NAMES: dict[tuple[str, str], Name] = {
    key: Name(function)
    for key, function in {
        ("torch.storage", "_load_from_bytes"): tensors.storage_of_bytes,
        (PERSISTENCE, "_reconstruct_persistent_obj"): _persistent,
        ("numpy", "dtype"): _NumberType,
        ("numpy.core.multiarray", "scalar"): _number,
        ("numpy._core.multiarray", "scalar"): _number,
        ("dnnlib.util", "EasyDict"): lambda *_: Attributes(),
        ("dnnlib", "EasyDict"): lambda *_: Attributes(),
    }.items()
}
"""Names that EDM's files use besides those of ``torch.save``, and what is called instead."""


def find(module: str, name: str) -> Any:
    """What stands for a name in a checkpoint. Raises ``bounded.Refused`` for any other."""
    if (module, name) in NAMES:
        return NAMES[module, name]
    if re.fullmatch(r"torch\.nn\.modules\.\w+", module) and name.isidentifier():
        return Name(Object)  # PyTorch's own layers, as data like EDM's
    return tensors.find(module, name)


# --- files -------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return tensors.read_safetensors(path)
    stream, view = bounded.mapped(path)
    if bytes(view[:4]) == b"PK\x03\x04":
        return tensors.read_saved(stream, view, find, copy=False)
    if bytes(view[: len(LEGACY_MAGIC)]) == LEGACY_MAGIC:
        return tensors.read_saved(stream, view, copy=False)
    return bounded.unpickle(stream, len(view), find)


def read(path: str | Path) -> Any:
    """What a checkpoint holds: tensors (on the CPU), plain containers, and ``Object``.

    Raises ``UserError`` for a file that is missing, damaged, of another kind, or wants anything
    else; the error names what it wanted.
    """
    with bounded.reading(path, "a checkpoint"):
        return _read(Path(path))


def tensors_of(module: Object) -> dict[str, Tensor]:
    """The state dictionary of a network object: its parameters and persistent buffers by name.

    Raises ``UserError`` where a part is in it twice, which a forged file could do without end.
    """
    found: dict[str, Tensor] = {}
    waiting, seen = [(module, "")], set()
    while waiting:
        part, prefix = waiting.pop()
        if id(part) in seen or len(prefix) > 1000:
            raise UserError("a network object that holds itself, or the same part twice")
        seen.add(id(part))
        transient = part.state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set | list | tuple) else ()
        for kind in ("_parameters", "_buffers"):
            for name, value in _entries(part, kind):
                if isinstance(value, Tensor) and not (kind == "_buffers" and name in transient):
                    found[f"{prefix}{name}"] = value
        children = [
            (child, f"{prefix}{name}.")
            for name, child in _entries(part, "_modules")
            if isinstance(child, Object)
        ]
        waiting += children[::-1]
    return found


def _entries(part: Object, kind: str) -> list[tuple[Any, Any]]:
    held = part.state.get(kind)
    return list(held.items()) if isinstance(held, dict) else []
