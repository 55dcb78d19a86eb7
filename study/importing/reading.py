"""Reading checkpoints as data: nothing in a file is ever imported or executed.

``.pth`` and ``.pt`` files go through ``torch.load(weights_only=True)``. EDM's files hold pickled
network objects together with their Python source (its ``torch_utils.persistence``); they go through
an unpickler that knows a short list of names. Tensors and plain containers become what they are;
network objects become ``Object``: a class name and a dictionary of attributes. The source in the
file is skipped. Any other name is refused.
"""

import argparse
import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.files import UserError

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch before 1.6 begin: a pickled magic number."""

PERSISTENCE = "torch_utils.persistence"
"""Module whose function rebuilds the network objects in EDM's files."""

RULE = "a checkpoint may hold tensors and plain containers only"


class Refused(Exception):
    """A file wants something that is not admitted; the text is what it wanted."""


class Damaged(Exception):
    """A file does not hold what its form promises; the text says what."""


class Object:
    """A pickled object as data: the name of its class, and its attributes."""

    class_name = ""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Damaged("the attributes of a pickled object are no dictionary")
        self.state = state

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the constructor, where EDM's persistence recorded them."""
        return dict(self.state.get("_init_kwargs") or {})


class Attributes(dict):
    """A dictionary of EDM's ``EasyDict`` class."""

    def __setstate__(self, state: Any) -> None:
        if state:
            raise Damaged("a dictionary with attributes")


def _persistent(meta: Any) -> Object:
    """The object that EDM's persistence describes by ``meta``; its source code is dropped."""
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise Damaged("an object of an unknown persistence type")
    made = Object()
    made.class_name = str(meta.get("class_name"))
    made.__setstate__(meta.get("state"))
    return made


# --- tensors -----------------------------------------------------------------------------------


def _weights_only(source: Path | io.BytesIO, mmap: bool = False) -> Any:
    """A file of ``torch.save``: tensors, plain containers, and parsed command lines."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            text = str(error)
            found = re.search(r"GLOBAL (\S+)", text)
            if found:
                name = found[1].replace("__builtin__", "builtins")
                raise Refused(name if "." in name else f"builtins.{name}") from None
            found = re.search(r"WeightsUnpickler error: (.*)", text)
            raise Damaged(found[1] if found else text.splitlines()[0]) from None


class _Storage:
    """Bytes of tensors and how to read them."""

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype


def _storage_of_bytes(content: Any) -> _Storage:
    """A storage that was pickled on its own: a file of ``torch.save`` inside the file."""
    if not isinstance(content, bytes):
        raise Damaged("a tensor's content is no bytes")
    loaded = _weights_only(io.BytesIO(content))
    if isinstance(loaded, torch.UntypedStorage):
        return _Storage(loaded, torch.uint8)
    if not isinstance(loaded, torch.TypedStorage):
        raise Damaged("a tensor's content is no storage")
    return _Storage(loaded._untyped_storage, loaded.dtype)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None
) -> Tensor:
    """A tensor in a storage; gradients and hooks (``rest``) are dropped."""
    whole = all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride))
    if not isinstance(storage, _Storage) or not whole or len(size) != len(stride):
        raise Damaged("a tensor without storage or shape")
    dtype = storage.dtype if dtype is None else dtype
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    empty = any(n == 0 for n in size)
    if not empty and (last + 1) * dtype.itemsize > storage.data.nbytes():
        raise Damaged("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=dtype).set_(storage.data, offset, tuple(size), tuple(stride))


def _tensor_of_type(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    gradient: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise Damaged("a tensor without a type")
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Damaged("a parameter without a tensor")
    return data


# --- NumPy numbers, of which EDM's constructor arguments have some -----------------------------


class _NumberType:
    """``numpy.dtype`` of a number."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?[fiub][1248]", code):
            raise Damaged(f"a NumPy number of type {code!r}")
        self.code = code.lstrip("<>=|")
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = "<" if state[1] in ("|", "=") else state[1]


def _number(kind: Any, content: Any) -> Any:
    if not isinstance(kind, _NumberType) or not isinstance(content, bytes):
        raise Damaged("a NumPy number without type or content")
    dtype = np.dtype(kind.order + kind.code)
    if len(content) != dtype.itemsize:
        raise Damaged("a NumPy number of a wrong length")
    return np.frombuffer(content, dtype)[0].item()


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """How old pickle protocols spell bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Damaged("bytes in an unknown encoding")
    return text.encode("latin1")


# --- the unpickler -----------------------------------------------------------------------------


class _Call:
    """A function that a pickle may call, but not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"to set {name} of a function")

    def __setstate__(self, state: Any) -> None:
        raise Refused("to change a function")


class _StorageKind:
    """``torch.FloatStorage`` and the like, which only say the type of what lies in a storage."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}

CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage_of_bytes,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda kind, *_: str(kind),
    (PERSISTENCE, "_reconstruct_persistent_obj"): _persistent,
    ("numpy", "dtype"): _NumberType,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
    ("_codecs", "encode"): _bytes,
    # How old pickle protocols, such as torch's, spell sets.
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
"""Functions that a pickle may name, and what is called instead."""

CLASSES: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("dnnlib.util", "EasyDict"): Attributes,
    ("dnnlib", "EasyDict"): Attributes,
}


def _wanted(module: str, name: str) -> str:
    return f"{module.replace('__builtin__', 'builtins')}.{name}"


class Unpickler(pickle.Unpickler):
    """Unpickles data. Every name that is not listed above is ``Refused``.

    ``storage(key)`` gives the bytes of a storage that lies beside the pickle, as in the archives
    of ``torch.save``.
    """

    def __init__(
        self, file: io.BufferedIOBase, storage: Callable[[str], torch.UntypedStorage] | None = None
    ) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CALLS:
            return _Call(CALLS[module, name])
        if (module, name) in CLASSES:
            return CLASSES[module, name]
        if re.fullmatch(r"torch\.nn\.modules\.\w+", module) and name.isidentifier():
            return Object  # PyTorch's own layers, as data like EDM's
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            kind = STORAGES.get(name.removesuffix("Storage"))
            if kind is not None:
                return _StorageKind(kind)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise Refused(_wanted(module, name))

    def persistent_load(self, identity: Any) -> _Storage:
        whole = isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"
        if self._storage is None or not whole or not isinstance(identity[1], _StorageKind):
            raise Damaged("a reference to something outside the file")
        return _Storage(self._storage(str(identity[2])), identity[1].dtype)


# --- files -------------------------------------------------------------------------------------


def _read_archive(archive: zipfile.ZipFile) -> Any:
    """A file of ``torch.save`` that holds network objects: a ZIP of a pickle and of storages."""
    entries = {info.filename: info for info in archive.infolist()}
    root = next(name for name in entries if name.endswith("/data.pkl")).removesuffix("data.pkl")
    known: dict[str, torch.UntypedStorage] = {}

    def storage(key: str) -> torch.UntypedStorage:
        if key not in known:
            info = entries.get(f"{root}data/{key}")
            if info is None or info.compress_type != zipfile.ZIP_STORED:
                raise Damaged(f"storage {key!r} is missing or compressed")
            content = bytearray(archive.read(info))
            empty = torch.empty(0, dtype=torch.uint8)
            known[key] = torch.frombuffer(content, dtype=torch.uint8) if content else empty
        return known[key].untyped_storage()

    return Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(len(LEGACY_MAGIC))
        if head == LEGACY_MAGIC:
            return _weights_only(path)
        if not head.startswith(b"PK\x03\x04"):
            file.seek(0)
            return Unpickler(file).load()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise Refused("to run a TorchScript program")
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Damaged("no archive of torch.save")
        if PERSISTENCE.encode() in archive.read(pickles[0]):
            return _read_archive(archive)
    return _weights_only(path, mmap=True)


def read(path: str | Path) -> Any:
    """What a checkpoint holds: tensors (on the CPU), plain containers, and ``Object``.

    Raises ``UserError`` for a file that is missing, damaged, or wants anything else; the error
    names what it wanted.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return _read(path)
    except Refused as error:
        raise UserError(
            f"{path}: refused, because it wants {error}; {RULE}, and nothing in it was executed"
        ) from None
    except Damaged as error:
        raise UserError(f"{path}: not a checkpoint that can be read ({error})") from None
    except Exception as error:  # unpicklers raise any kind for a damaged file
        text = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{path}: not a checkpoint that can be read ({type(error).__name__}: {text})"
        ) from None


def tensors_of(module: Object, prefix: str = "") -> dict[str, Tensor]:
    """The state dictionary of a network object: its parameters and persistent buffers by name."""
    found: dict[str, Tensor] = {}
    transient = module.state.get("_non_persistent_buffers_set") or ()
    for part in ("_parameters", "_buffers"):
        for name, value in (module.state.get(part) or {}).items():
            if isinstance(value, Tensor) and not (part == "_buffers" and name in transient):
                found[f"{prefix}{name}"] = value
    for name, child in (module.state.get("_modules") or {}).items():
        if isinstance(child, Object):
            found |= tensors_of(child, f"{prefix}{name}.")
    return found
