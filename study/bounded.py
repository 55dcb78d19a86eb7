"""Tensors and arrays in files from anywhere, read as data.

Nothing in a file is imported or executed, and no size that a file declares is believed before it
is compared with what the file holds, so that reading takes time and memory in proportion to it.

Pickles are interpreted here, instruction by instruction (``pickletools`` takes them apart), with
stand-ins for the few names that files of weights use; any other name is ``Refused``. Python's and
torch's own unpicklers allocate what a length or a memo index says, and hash whatever is a key.
"""

import io
import json
import math
import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from study.files import UserError, once

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch before 1.6 begin: a pickled magic number."""

INSTRUCTIONS = 2_000_000
"""Most instructions of a pickle; a checkpoint of thousands of tensors has 100,000 or so."""

SMALL = 256 * 2**20
"""Bytes up to which an array may be compressed however well."""

HEADER = 16 * 2**20
"""Most bytes of the header of a safetensors file; it takes about 100 for a tensor."""


class Refused(Exception):
    """A file wants something that is not admitted; the text is what it wanted."""


class Damaged(Exception):
    """A file does not hold what its form promises; the text says what."""


# --- pickles -------------------------------------------------------------------------------------


class Name:
    """What a pickle may call by a name: ``make(*arguments)`` is called instead."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


class Stateful:
    """What a pickle may give attributes to."""

    def restore(self, state: Any) -> None:
        """Take the attributes. Raises ``Damaged`` where they are of a wrong kind."""
        raise NotImplementedError


class Object(Stateful):
    """A pickled object as data: the name of its class, and its attributes."""

    class_name = ""

    def __init__(self, *_: Any) -> None:
        self.state: dict[str, Any] = {}

    def restore(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Damaged("the attributes of a pickled object are no dictionary")
        self.state = state


Finder = Callable[[str, str], Any]
"""Module and name -> what stands for it. Raises ``Refused`` for what is not admitted."""

_VALUES = {
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg is not None
    and [kind.name for kind in opcode.stack_after]
    in (["int"], ["int_or_bool"], ["float"], ["str"], ["bytes"], ["bytes_or_str"], ["bytearray"])
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _key(value: Any) -> Any:
    """``value``, which becomes a key: nothing that takes long to hash or to print."""
    for part in value if isinstance(value, tuple) and len(value) <= 8 else (value,):
        # Chosen integers have equal hashes from 2**61 - 1 on.
        small = isinstance(part, int) and abs(part) < 2**60
        if not small and part is not None and not isinstance(part, str | bytes | float):
            raise Damaged("a key of a dictionary or set that is no text or number")
    return value


class _Machine:
    """Interprets one pickle in a file of ``size`` bytes.

    Its calls may take and make some multiple of that: content can be handed over again and
    again, and many tensors can lie in the same bytes, which are copied later.
    """

    def __init__(self, find: Finder, persistent: Callable[[Any], Any] | None, size: int) -> None:
        self.find, self.persistent = find, persistent
        self.room = 8 * size + 2**20
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def marked(self) -> list[Any]:
        """What lies above the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def name(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged("a name that is no text")
        return self.find(module, name)

    def call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise Damaged("a call of something that has no name")
        self.room -= sum(
            len(item) for item in arguments if isinstance(item, str | bytes | list | tuple | dict)
        )
        made = name.make(*arguments)
        self.room -= made.nbytes if isinstance(made, Tensor) else 0
        if self.room < 0:
            raise Damaged("it uses the same content many times")
        return made

    def put(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged("an entry of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2]):
            if _key(key) in target:
                raise Damaged(f"the key {str(key)[:80]!r} stands twice in a dictionary")
            target[key] = value

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Stateful):
            target.restore(state)
        elif isinstance(target, Name):
            raise Refused("to change a function")
        # PyTorch gives its state dictionaries an attribute, which is left out.
        elif not isinstance(target, OrderedDict | Counter) or not isinstance(state, dict):
            raise Damaged("attributes of something that has none")

    def step(self, code: str, argument: Any) -> None:
        stack = self.stack
        match code:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.outer.append(stack)
                self.stack = []
            case "POP":
                self.stack.pop() if stack else self.marked()
            case "POP_MARK":
                self.marked()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE" | "LIST" | "FROZENSET" | "DICT":
                items = self.marked()
                made: Any = tuple(items) if code == "TUPLE" else items
                if code == "FROZENSET":
                    made = frozenset(map(_key, items))
                elif code == "DICT":
                    self.put(made := {}, items)
                self.stack.append(made)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(set())
            case "APPEND" | "APPENDS" | "ADDITEMS" | "SETITEM" | "SETITEMS":
                if code in ("APPEND", "SETITEM"):
                    items = [stack.pop() for _ in range(1 + (code == "SETITEM"))][::-1]
                else:
                    items = self.marked()
                target = self.stack[-1]
                if code.startswith("SETITEM"):
                    self.put(target, items)
                elif code == "ADDITEMS" and isinstance(target, set):
                    target.update(map(_key, items))
                elif code.startswith("APPEND") and isinstance(target, list):
                    target.extend(items)
                else:
                    raise Damaged("an entry of something that is no list or set")
            case "GLOBAL":
                stack.append(self.name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.name(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, name = stack.pop(), stack.pop()
                stack.append(self.call(name, arguments))
            case "OBJ":
                name, *arguments = self.marked()
                self.stack.append(self.call(name, tuple(arguments)))
            case "INST":
                arguments = tuple(self.marked())
                self.stack.append(self.call(self.name(*argument.split(" ", 1)), arguments))
            case "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            case "PERSID" | "BINPERSID":
                identity = argument if code == "PERSID" else stack.pop()
                if self.persistent is None:
                    raise Damaged("a reference to something outside the file")
                stack.append(self.persistent(identity))
            case _ if code in _VALUES:
                stack.append(argument)
            case _ if code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            case _ if code in _TUPLES:
                items = [stack.pop() for _ in range(_TUPLES[code])]
                stack.append(tuple(items[::-1]))
            case _:
                raise Damaged(f"a pickle with the instruction {code}")


def unpickle(
    stream: BinaryIO | mmap.mmap,
    size: int,
    find: Finder,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of the pickle that begins where ``stream`` stands, which then stands behind it.

    ``size`` is the length of the whole file. Reads of ``stream`` must not prepare for more than it
    holds, as those of a mapped file or a buffer do not. ``persistent`` resolves references to
    other parts of the file. Raises ``Damaged`` or ``Refused``.
    """
    machine = _Machine(find, persistent, size)
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if number > INSTRUCTIONS:
                raise Damaged(f"a pickle of more than {INSTRUCTIONS:,} instructions")
            machine.step(code.name, argument)
        return machine.stack.pop()
    except (IndexError, KeyError, ValueError, AttributeError):
        raise Damaged("its pickle is broken or cut short") from None


# --- tensors -------------------------------------------------------------------------------------


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
    return set(map(_key, items))


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    if not isinstance(items, list | tuple):
        raise Damaged("a dictionary of something that is no list")
    return OrderedDict((_key(key), value) for key, value in items)


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
        ("torch", "device"): lambda kind="", *_: str(kind),
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


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of a ZIP file by name. Raises ``Damaged`` where a name is there twice."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in found:
            raise Damaged(f"it has two members {info.filename}")
        found[info.filename] = info
    return found


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


def mapped(path: Path) -> tuple[mmap.mmap, memoryview]:
    """A file as memory, which lives as long as a tensor in it; what is written stays there."""
    with path.open("rb") as file:
        stream = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return stream, memoryview(stream)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ``Damaged`` where a name is there twice."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(HEADER, path.stat().st_size - 8):
            raise Damaged("its header is cut short or too long")
        # The library keeps the last of several entries of a name.
        json.loads(file.read(length), object_pairs_hook=once)
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


# --- arrays --------------------------------------------------------------------------------------


def check_array(stream: Any, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of the array whose ``.npy`` form begins here.

    Raises ``Damaged`` where ``size`` bytes do not hold it, or it holds Python objects.
    """
    version = np.lib.format.read_magic(stream)
    # 3.0 is 2.0 in UTF-8, which only names of fields need.
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
    shape, fortran, dtype = (header or np.lib.format.read_array_header_2_0)(stream)
    if dtype.hasobject:
        raise Damaged("an array of Python objects")
    if math.prod(shape) * dtype.itemsize > size or any(n < 0 for n in shape):
        raise Damaged(f"an array of shape {list(shape)[:8]}, of which it holds only a part")
    return shape, fortran, dtype


def array_member(path: Path, archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The member of an ``.npz`` file that holds array ``name``. Raises ``Damaged`` where its size
    is not what it can hold."""
    info = members(archive).get(f"{name}.npy")
    if info is None:
        raise Damaged(f"it has no array {name}")
    # Deflate makes a thousandth of zeros at best; samples shrink by far less.
    stored = info.compress_type == zipfile.ZIP_STORED
    limit = info.compress_size if stored else max(SMALL, 50 * info.compress_size)
    if info.compress_size > path.stat().st_size or info.file_size > limit:
        raise Damaged(f"array {name} would take {info.file_size:,} bytes, far more than the file")
    return info


def read_npz(path: Path, name: str) -> np.ndarray:
    """An array of an ``.npz`` file. Raises ``Damaged`` and what ``zipfile`` and NumPy raise."""
    with zipfile.ZipFile(path) as archive:
        info = array_member(path, archive, name)
        with archive.open(info) as stream:
            check_array(stream, info.file_size)
        with archive.open(info) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


# --- words ---------------------------------------------------------------------------------------

_KINDS: tuple[tuple[bytes, str], ...] = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer instead of the file: fetch it with `git lfs pull`, or download it from "
        "the page of the repository",
    ),
    (
        rb"\s*<(?i:!doctype|html|\?xml|head)",
        "a web page instead of the file: open its address in a browser, where it may ask for a "
        "login or a confirmation, and download it from there",
    ),
    (rb"\s*\{\s*\"", "JSON, not weights"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "packed: unpack it"),
    (rb"\x89HDF", "an HDF5 file; weights are read as torch.save or safetensors write them"),
    (rb"(?s:.{257})ustar", "a tar archive: unpack it, and give the file with the weights in it"),
)
"""How files begin that are taken for weights, and what to do with them."""


def check_kind(path: Path) -> None:
    """Raise ``UserError`` for a path that plainly leads to no file of weights; it says to what."""
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file())[:4]
        held = f" ({', '.join(inside)})" if inside else ""
        raise UserError(f"{path}: a folder; give the file with the weights in it{held}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{path}: an empty file; was its download cut short?")
    for pattern, words in _KINDS:
        if re.match(pattern, head):
            raise UserError(f"{path}: {words}")


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said.strip()[:200]}" if said else type(error).__name__


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Make a ``UserError`` of whatever the reading of a file raises: it is not ``what``."""
    check_kind(path := Path(path))
    try:
        yield
    except UserError:
        raise
    except Refused as error:
        raise UserError(
            f"{path}: refused, because it wants {error}; {what} may hold dense tensors and plain "
            "containers only, as torch.save(network.state_dict(), FILE) writes them; nothing in "
            "it was executed"
        ) from None
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            cut = file.read(4) == b"PK\x03\x04" and "not a zip file" in str(error)
        said = "it has no end; was its download cut short?" if cut else reason(error)
        raise UserError(f"{path}: not {what} that can be read ({said})") from None
    except Damaged as error:
        raise UserError(f"{path}: not {what} that can be read ({error})") from None
    except Exception as error:  # decoders of foreign bytes raise almost anything
        raise UserError(f"{path}: not {what} that can be read ({reason(error)})") from None


def tensors_in(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The entries of a mapping that are tensors."""
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
