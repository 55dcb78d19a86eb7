"""Files of weights, read as data (``study.bounded``): what ``torch.save`` wrote, and safetensors.

Stand-ins for the few names that such files use take the place of torch's functions. Sparse,
quantised and meta tensors, and tensors that are more than their storage holds, are refused.
"""

import io
import math
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from study.bounded import (
    Damaged,
    Finder,
    Name,
    Object,
    Refused,
    check_key,
    mapped,
    members,
    reading,
    unpickle,
)
from study.files import parse_json

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch before 1.6 begin: a pickled magic number."""

HEADER = 16 * 2**20
"""Most bytes of the header of a safetensors file; it takes about 100 for a tensor."""


class Storage:
    """Bytes of tensors and how to read them."""

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype


class _StorageKind:
    """``torch.FloatStorage`` and the like, which only say the type of what lies in a storage."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None
) -> Tensor:
    """A tensor in a storage; gradients and hooks (``rest``) are dropped."""
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not isinstance(storage, Storage) or not shaped or len(size) > 64:
        raise Damaged("a tensor without storage or shape")
    if not all(isinstance(n, int) and 0 <= n < 2**62 for n in (offset, *size, *stride)):
        raise Damaged("a tensor without storage or shape")
    dtype = storage.dtype if dtype is None else dtype
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    # An expanded tensor takes little in a file, and any amount where it is copied.
    needed = max(last + 1, math.prod(size)) if math.prod(size) else 0
    if needed * dtype.itemsize > storage.data.nbytes():
        raise Damaged("a tensor reaches beyond its storage")
    empty = torch.empty(0, dtype=dtype, device=storage.data.device)
    return empty.set_(storage.data, offset, size, stride)


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


def _of_class(make: Any, _class: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, which are dropped."""
    if not isinstance(make, Name) or not isinstance(arguments, tuple):
        raise Damaged("a tensor without storage or shape")
    return make.make(*arguments)


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """How old pickle protocols spell bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Damaged("bytes in an unknown encoding")
    return text.encode("latin1")


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise Damaged("a set of something that is no list")
    return set(map(check_key, items))


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    if not isinstance(items, list | tuple):
        raise Damaged("a dictionary of something that is no list")
    return OrderedDict((check_key(key), value) for key, value in items)


def _counter(items: Any = None) -> Counter[Any]:
    return Counter(items if isinstance(items, dict) else {})


def _size(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items) if isinstance(items, list | tuple) else ()


def _namespace(*_: Any) -> Object:
    made = Object()
    made.class_name = "Namespace"
    return made


NAMES: dict[tuple[str, str], Any] = {
    key: Name(function)
    for key, function in {
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _of_class,
        ("torch", "Tensor"): _parameter,
        ("torch.nn.parameter", "Parameter"): _parameter,
        ("torch", "Size"): _size,
        ("torch", "device"): lambda kind="cpu", *_: kind,
        ("_codecs", "encode"): _bytes,
        # How old pickle protocols, such as torch's, spell sets.
        ("builtins", "set"): _set,
        ("__builtin__", "set"): _set,
        ("collections", "OrderedDict"): _ordered,
        ("collections", "Counter"): _counter,
        ("argparse", "Namespace"): _namespace,
    }.items()
}
"""Names that files of weights use, and what is called instead."""


def find(module: str, name: str) -> Any:
    """What stands for a name in a file of weights: tensors, plain containers, command lines."""
    if (module, name) in NAMES:
        return NAMES[module, name]
    if module in ("torch", "torch.storage") and name.endswith("Storage"):
        kind = STORAGES.get(name.removesuffix("Storage"))
        if kind is not None:
            return _StorageKind(kind)
    if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
        return vars(torch)[name]
    raise Refused(f"{module.replace('__builtin__', 'builtins')}.{name}")


def _reference(identity: Any) -> tuple[str, torch.dtype, int]:
    """Key, type and number of entries of a storage that lies beside a pickle."""
    whole = isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage"
    if not whole or identity[5:] not in ((), (None,)) or not isinstance(identity[4], int):
        raise Damaged("a reference to something outside the file")
    if not isinstance(identity[1], _StorageKind) or not isinstance(identity[2], str | int):
        raise Damaged("a reference to something outside the file")
    return str(identity[2]), identity[1].dtype, identity[4]


def _storage(view: memoryview, copy: bool) -> torch.UntypedStorage:
    """A storage in the memory of ``view``, or a copy, also where numbers would lie badly there."""
    if not len(view):
        return torch.UntypedStorage(0)
    data = torch.frombuffer(view, dtype=torch.uint8)
    return (data.clone() if copy or data.data_ptr() % 16 else data).untyped_storage()


def _member(view: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The content of a member of a ZIP file that lies in ``view``; nothing is copied."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Damaged(f"{info.filename} is compressed, which torch never does")
    head = bytes(view[info.header_offset : info.header_offset + 30])
    if len(head) < 30 or not head.startswith(b"PK\x03\x04"):
        raise Damaged(f"{info.filename} is not where the file says")
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", head, 26))
    content = view[start : start + info.file_size]
    if len(content) != info.file_size:
        raise Damaged(f"{info.filename} is cut short")
    # Where checksums were switched off torch writes 0.
    if info.CRC and zlib.crc32(content) != info.CRC:
        raise Damaged(f"{info.filename} has a wrong checksum")
    return content


def _read_zip(stream: Any, view: memoryview, find: Finder, copy: bool) -> Any:
    """A file of ``torch.save``: a ZIP of a pickle and of storages."""
    with zipfile.ZipFile(stream) as archive:
        entries = members(archive)
    if any(name.endswith("/constants.pkl") for name in entries):
        raise Refused("to run a TorchScript program")
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Damaged("a ZIP file, but not one of torch.save; if weights are inside, unpack it")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and bytes(_member(view, order)) != b"little":
        raise Damaged("its numbers are stored big end first")
    known: dict[str, torch.UntypedStorage] = {}

    def persistent(identity: Any) -> Storage:
        key, dtype, _ = _reference(identity)
        if key not in known:
            info = entries.get(f"{root}data/{key}")
            if info is None:
                raise Damaged(f"storage {key[:80]!r} is missing")
            known[key] = _storage(_member(view, info), copy)
        return Storage(known[key], dtype)

    return unpickle(io.BytesIO(_member(view, entries[pickles[0]])), len(view), find, persistent)


def _read_legacy(stream: Any, view: memoryview, find: Finder, copy: bool) -> Any:
    """A file of torch before 1.6: pickles, the last of which names the storages behind it."""
    _magic, _version, system = (unpickle(stream, len(view), find) for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Damaged("its numbers are stored big end first")
    start, kinds = stream.tell(), {}

    def noted(identity: Any) -> Storage:
        key, dtype, count = _reference(identity)
        kinds[key] = dtype
        if not 0 <= count * dtype.itemsize <= len(view):
            raise Damaged(f"storage {key[:80]!r} is cut short")
        return Storage(torch.UntypedStorage(count * dtype.itemsize, device="meta"), dtype)

    unpickle(stream, len(view), find, noted)
    keys, known = unpickle(stream, len(view), find), {}
    for key in keys if isinstance(keys, list) else ():
        if key not in kinds:
            raise Damaged("a storage that no tensor has")
        (count,) = struct.unpack("<q", stream.read(8))
        begin = stream.tell()
        end = begin + count * kinds[key].itemsize
        if not begin <= end <= len(view):
            raise Damaged(f"storage {key[:80]!r} is cut short")
        known[key] = _storage(view[begin:end], copy)
        stream.seek(end)

    def persistent(identity: Any) -> Storage:
        key, dtype, _ = _reference(identity)
        if key not in known:
            raise Damaged(f"storage {key[:80]!r} is missing")
        return Storage(known[key], dtype)

    stream.seek(start)
    return unpickle(stream, len(view), find, persistent)


def read_saved(stream: Any, view: memoryview, find: Finder = find, *, copy: bool = True) -> Any:
    """What ``torch.save`` wrote into ``stream``, whose memory is ``view``.

    Without ``copy`` the tensors stay there, and need the file for as long as they live.
    Raises ``Damaged`` where it is none of torch's two forms.
    """
    if bytes(view[: len(LEGACY_MAGIC)]) == LEGACY_MAGIC:
        return _read_legacy(stream, view, find, copy)
    if bytes(view[:4]) == b"PK\x03\x04":
        return _read_zip(stream, view, find, copy)
    raise Damaged("nothing that torch.save wrote")


def storage_of_bytes(content: Any) -> Storage:
    """A storage that was pickled on its own: a file of ``torch.save`` inside the file."""
    if not isinstance(content, bytes):
        raise Damaged("a tensor's content is no bytes")
    stream = io.BytesIO(content)
    loaded = read_saved(stream, stream.getbuffer(), copy=False)
    if not isinstance(loaded, Storage):
        raise Damaged("a tensor's content is no storage")
    return loaded


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ``Damaged`` where a name is there twice."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(HEADER, path.stat().st_size - 8):
            raise Damaged("its header is cut short or too long")
        # The library keeps the last of several entries of a name.
        parse_json(file.read(length), f"{path}: header")
    return load_file(path)


def read_weights(path: str | Path, what: str = "a file of weights") -> Any:
    """What a file of weights holds, in torch's form or as safetensors: tensors, on the CPU, and
    plain containers.

    Raises ``UserError`` for a file that is missing, damaged, of another kind, or wants more.
    """
    path = Path(path)
    with reading(path, what):
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return read_saved(*mapped(path))


def tensors_in(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The entries of a mapping that are tensors."""
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
