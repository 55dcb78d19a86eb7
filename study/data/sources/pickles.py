"""Pickled data read without trust: a machine of its own that builds data, and nothing else.

Python's unpickler imports and calls what a file names, and reserves the memory that a file
declares; NumPy's functions for it make objects out of addresses that a file gives. Here a pickle is
a list of instructions (`pickletools`). Those that build containers, numbers, text and NumPy arrays
are followed, names are compared as text, and any other instruction or name is refused.
"""

import math
import pickletools
import re
from typing import Any, NamedTuple

import numpy as np

from study.data.reading import one_line, shown

MOST = 2**20
"""Instructions of a pickle; a batch of CIFAR-10 has about 45,000."""

CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
"""Instructions whose argument is the value."""

_ARRAY, _TYPE, _BYTES = "numpy.ndarray", "numpy.dtype", "_codecs.encode"
_EMPTY, _SCALAR = "_reconstruct", "scalar"
NAMES = {_ARRAY: _ARRAY, _TYPE: _TYPE, _BYTES: _BYTES} | {
    f"numpy.{core}.multiarray.{name}": name
    for core in ("core", "_core")
    for name in (_EMPTY, _SCALAR)
}
"""What a pickled array refers to, by every module name that NumPy has used for it."""


class PickleError(Exception):
    """A pickle that is broken, or refers to what it has no use for; the message says which."""


class _Name(NamedTuple):
    """A function or class by its name; there is nothing behind it."""

    name: str


class _Type:
    """The ``numpy.dtype`` of numbers, or of objects."""

    def __init__(self, code: Any, *_: Any) -> None:
        code = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not re.fullmatch(
            r"[<>=|]?(f[248]|[iu][1248]|b1|O8?)", code
        ):
            raise PickleError("it has an array of neither numbers nor objects")
        self.code = code.lstrip("<>=|")
        self.order = ">" if code[0] == ">" else "<"

    def build(self, state: Any) -> "_Type":
        # Version, byte order, and what only types with parts have. Flags say nothing here.
        if not isinstance(state, tuple) or len(state) not in (8, 9) or state[2:5] != (None,) * 3:
            raise PickleError("it has an array of an unknown type")
        order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise PickleError("it has an array of an unknown byte order")
        self.order = ">" if order == ">" else "<"
        return self

    def numbers(self, content: Any, count: int) -> np.ndarray:
        if self.code[0] == "O" or not isinstance(content, bytes):
            raise PickleError("it has an array without numbers")
        dtype = np.dtype(self.order + self.code)
        if not 0 < count * dtype.itemsize == len(content):
            raise PickleError("it has an array whose shape does not fit its content")
        return np.frombuffer(content, dtype)


class _Unbuilt:
    """An array whose shape and content come later; ``places`` are where it was remembered."""

    def __init__(self) -> None:
        self.places: list[int] = []

    @staticmethod
    def build(state: Any) -> Any:
        """An array of numbers, or the list that an array of objects holds."""
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Type):
            raise PickleError("it has an array without shape and content")
        _, shape, kind, by_columns, content = state
        whole = isinstance(shape, tuple) and len(shape) <= 8
        if not whole or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise PickleError("it has an array without a shape")
        count = math.prod(shape)
        if kind.code[0] == "O" and isinstance(content, list) and shape == (len(content),):
            return content
        return kind.numbers(content, count).reshape(shape, order="F" if by_columns else "C")


class _Machine:
    """A stack, its marks, and what the pickle of ``size`` bytes asked to remember."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.to_encode = size  # text that is encoded once cannot be longer than the file

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        if not 0 <= start <= len(self.stack):
            raise PickleError("it is not a readable pickle (it takes more than there is)")
        items, self.stack[start:] = self.stack[start:], []
        return items

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]
        if isinstance(self.stack[-1], _Unbuilt):
            self.stack[-1].places.append(place)

    def refer(self, name: str) -> None:
        if name not in NAMES:
            raise PickleError(f"it refers to {shown(name)}, which such a file has no use for")
        self.stack.append(_Name(name))

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise PickleError("it adds to what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        # Plain keys only: the hash of a nested tuple can take for ever.
        if not isinstance(self.stack[-1], dict) or not all(
            isinstance(key, str | bytes | int) for key in items[::2]
        ):
            raise PickleError("it has a dictionary with keys other than text and numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise PickleError("it calls what is no function")
        match NAMES[name.name], arguments:
            case "numpy.dtype", (code, *_):
                made = _Type(code)
            case "_reconstruct", (_Name("numpy.ndarray"), *_):
                made = _Unbuilt()
            case "scalar", (_Type() as kind, content):
                made = kind.numbers(content, 1)[0].item()
            case "_codecs.encode", (str() as text, "latin1" | "latin-1"):
                self.to_encode -= len(text)
                if self.to_encode < 0:
                    raise PickleError("it encodes more text than it holds")
                made = text.encode("latin-1")
            case _:
                raise PickleError(f"it calls {name.name} with arguments of another kind")
        self.stack.append(made)

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Type | _Unbuilt):
            raise PickleError("it changes what is no array")
        value = made.build(state)
        self.stack.append(value)
        for place in getattr(made, "places", ()):
            self.memo[place] = value

    def step(self, code: str, argument: Any) -> None:
        stack = self.stack
        if code in VALUES:
            stack.append(argument)
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code in ("SHORT_BINSTRING", "BINSTRING"):  # text of Python 2
            stack.append(argument.encode("latin-1"))
        elif code in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"D": {}, "L": [], "T": ()}[code[6]])
        elif code == "MARK":
            self.marks.append(len(stack))
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.marks.append(len(stack) - int(code[5]))
            stack.append(tuple(self.since_mark()))
        elif code == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif code == "LIST":
            stack.append(self.since_mark())
        elif code == "DICT":
            items = self.since_mark()
            stack.append({})
            self.update(items)
        elif code == "APPEND":
            item = stack.pop()
            self.extend([item])
        elif code == "APPENDS":
            self.extend(self.since_mark())
        elif code == "SETITEM":
            self.marks.append(len(stack) - 2)
            self.update(self.since_mark())
        elif code == "SETITEMS":
            self.update(self.since_mark())
        elif code in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.remember(len(self.memo) if argument is None else argument)
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif code == "GLOBAL":
            self.refer(argument.replace(" ", "."))
        elif code == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not isinstance(module, str) or not isinstance(name, str):
                raise PickleError("it refers to what is no name")
            self.refer(f"{module}.{name}")
        elif code == "REDUCE":
            self.call()
        elif code == "BUILD":
            self.build()
        elif code not in ("PROTO", "FRAME", "STOP"):
            raise PickleError(f"it has the instruction {code}, for which such a file has no use")


def load(data: bytes) -> Any:
    """Containers, numbers, text and NumPy arrays of a pickle; text of Python 2 becomes bytes.

    Arrays of objects become lists, NumPy's numbers Python's. Raises `PickleError` that names
    anything else the pickle refers to, or says that it is broken.
    """
    machine = _Machine(len(data))
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MOST:
                raise PickleError(f"it has more than {MOST} instructions")
            machine.step(code.name, argument)
        return machine.stack.pop()
    except PickleError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise PickleError(f"it is not a readable pickle ({one_line(error)})") from None
