"""Pickled data read without trust: containers, numbers, text and NumPy arrays, nothing else.

``study.bounded`` follows the instructions of a pickle. Here is what takes the place of NumPy's
functions, which would make objects out of addresses that a file gives.
"""

import io
import math
import re
from typing import Any

import numpy as np

from study.bounded import Damaged, Name, Refused, Stateful, unpickle
from study.data.reading import one_line, shown


class PickleError(Exception):
    """A pickle that is broken, or refers to what it has no use for; the message says which."""


def _text(value: Any) -> Any:
    """Bytes as text: Python 2 made no difference."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Type(Stateful):
    """The ``numpy.dtype`` of numbers, or of objects."""

    def __init__(self, code: Any, *_: Any) -> None:
        code = _text(code)
        if not isinstance(code, str) or not re.fullmatch(
            r"[<>=|]?(f[248]|[iu][1248]|b1|O8?)", code
        ):
            raise Damaged("an array of neither numbers nor objects")
        self.code = code.lstrip("<>=|")
        self.order = ">" if code[0] == ">" else "<"

    def restore(self, state: Any) -> None:
        # Version, byte order, and what only types with parts have. Flags say nothing here.
        if not isinstance(state, tuple) or len(state) not in (8, 9) or state[2:5] != (None,) * 3:
            raise Damaged("an array of an unknown type")
        order = _text(state[1])
        if order not in ("<", ">", "|", "="):
            raise Damaged("an array of an unknown byte order")
        self.order = ">" if order == ">" else "<"

    def numbers(self, content: Any, count: int) -> np.ndarray:
        """``count`` numbers of this type in text or bytes."""
        content = content.encode("latin-1") if isinstance(content, str) else content
        if self.code[0] == "O" or not isinstance(content, bytes):
            raise Damaged("an array without numbers")
        dtype = np.dtype(self.order + self.code)
        if not 0 < count * dtype.itemsize == len(content):
            raise Damaged("an array whose shape does not fit its content")
        return np.frombuffer(content, dtype)


class _Array(Stateful):
    """An array whose shape and content come later: ``value``, of an array of objects a list."""

    value: Any = None

    def restore(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Type):
            raise Damaged("an array without shape and content")
        _, shape, kind, by_columns, content = state
        whole = isinstance(shape, tuple) and len(shape) <= 8
        if not whole or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise Damaged("an array without a shape")
        if kind.code[0] == "O" and isinstance(content, list) and shape == (len(content),):
            self.value = content
        else:
            numbers = kind.numbers(content, math.prod(shape))
            self.value = numbers.reshape(shape, order="F" if by_columns else "C")


def _scalar(kind: Any, content: Any) -> Any:
    if not isinstance(kind, _Type):
        raise Damaged("a number of no type")
    return kind.numbers(content, 1)[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Damaged("text in another encoding than latin-1")
    return text.encode("latin-1")


def _only_a_name(*_: Any) -> None:
    raise Damaged("an array that is made directly")


NAMES = {
    ("numpy", "ndarray"): Name(_only_a_name),
    ("numpy", "dtype"): Name(_Type),
    ("_codecs", "encode"): Name(_encode),
} | {
    (f"numpy.{core}.multiarray", name): made
    for core in ("core", "_core")
    for name, made in (("_reconstruct", Name(lambda *_: _Array())), ("scalar", Name(_scalar)))
}
"""What a pickled array refers to, by every module name that NumPy has used for it."""


def _find(module: str, name: str) -> Name:
    if (module, name) not in NAMES:
        raise Refused(shown(f"{module}.{name}"))
    return NAMES[module, name]


def _whole(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def load(data: bytes) -> Any:
    """The value of a pickle whose arrays are itself, or items of the list or dictionary it is.

    Keys are text, also those that Python 2 wrote. Arrays of objects become lists, NumPy's numbers
    Python's. Raises `PickleError` that names anything else the pickle refers to, or says that it is
    broken.
    """
    try:
        value = _whole(unpickle(io.BytesIO(data), len(data), _find))
    except MemoryError:
        raise
    except Refused as error:
        raise PickleError(f"it refers to {error}, which such a file has no use for") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise PickleError(f"it is not a readable pickle ({one_line(error)})") from None
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_text(key): _whole(item) for key, item in value.items()}
    return value
