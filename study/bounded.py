"""Files from anywhere, read as data: pickles, ZIP files, arrays.

Nothing in a file is imported or executed, and no size that a file declares is believed before it
is compared with what the file holds, so that reading takes time and memory in proportion to it.

Pickles are interpreted here, instruction by instruction (``pickletools`` takes them apart), with
stand-ins for the names that the caller knows. Python's and torch's own unpicklers allocate what
a length or a memo index says, and hash whatever is a key.
"""

import math
import mmap
import pickletools
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from study.files import UserError

INSTRUCTIONS = 1_000_000
"""Instructions that any pickle may have; a checkpoint of thousands of tensors has 100,000 or so.

A long log in a checkpoint has more, of four bytes each: a large file may have one for every three.
"""

SMALL = 256 * 2**20
"""Bytes up to which an array may be compressed however well."""


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
"""Module and name -> a ``Name``, or what else stands for it. Raises ``Refused`` for any other."""

_VALUES = {
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg is not None
    and [kind.name for kind in opcode.stack_after]
    in (["int"], ["int_or_bool"], ["float"], ["str"], ["bytes"], ["bytes_or_str"], ["bytearray"])
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def check_key(value: Any) -> Any:
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
        self.room -= getattr(made, "nbytes", 0)
        if self.room < 0:
            raise Damaged("it uses the same content many times")
        return made

    def put(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged("an entry of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2]):
            if check_key(key) in target:
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
                    made = frozenset(map(check_key, items))
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
                    target.update(map(check_key, items))
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
    machine, most = _Machine(find, persistent, size), max(INSTRUCTIONS, size // 3)
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if number > most:
                raise Damaged(f"a pickle of more than {most:,} instructions")
            machine.step(code.name, argument)
        return machine.stack.pop()
    except (IndexError, KeyError, ValueError, AttributeError):
        raise Damaged("its pickle is broken or cut short") from None


# --- files --------------------------------------------------------------------------------------


def mapped(path: Path) -> tuple[mmap.mmap, memoryview]:
    """A file as memory, which lives as long as a tensor in it; what is written stays there."""
    with path.open("rb") as file:
        stream = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return stream, memoryview(stream)


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of a ZIP file by name. Raises ``Damaged`` where a name is there twice."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in found:
            raise Damaged(f"it has two members {info.filename}")
        found[info.filename] = info
    return found


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
    except (UserError, MemoryError):
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
