"""Reading what others made: sizes are bounded before anything is read or reserved.

Everything here raises ``ValueError``, of one line, for content that is damaged or larger than it
may be.
"""

import io
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ITEM = 2**29
"""Bytes of one image, latent or batch; larger ones are refused."""

UNPACKED, RATIO = 2**26, 16
"""What is packed may unpack to so many bytes, or to so many times its own: images and latents
hardly shrink, and what shrinks to a thousandth would fill the memory from a small file."""

LABELS = 100_000
"""Classes of a data set; networks have an input or a row of weights for each."""

MESSAGE = 200


def shown(text: object, most: int = MESSAGE) -> str:
    """Text of a file for a message: printable, on one line, and not too long."""
    text = str(text)
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """An exception as one line without addresses."""
    return shown(" ".join(str(error).split())) or type(error).__name__


def bounded(size: int, packed: int, most: float = math.inf) -> int:
    """``size``, where ``packed`` bytes may unpack to it. Raises ``ValueError``."""
    limit = min(most, max(UNPACKED, RATIO * packed))
    if size > limit:
        raise ValueError(f"it declares {size} bytes, and at most {limit} are read")
    return size


# --- zip -----------------------------------------------------------------------------------------


def _name(info: zipfile.ZipInfo) -> str:
    """The name of an entry with slashes, in the encoding that its writer meant.

    Windows has written backslashes. Without the flag for UTF-8 the standard says code page 437,
    which is what zipfile assumes; many tools wrote UTF-8 all the same, some beside the name.
    """
    name, extra = info.filename, info.extra
    if not info.flag_bits & 0x800 and not name.isascii():
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            while len(extra) >= 4:
                kind, size = struct.unpack_from("<HH", extra)
                if kind == 0x7075 and extra[4:5] == b"\x01":
                    name = extra[9 : 4 + size].decode("utf-8", "replace")
                extra = extra[4 + size :]
    return name.replace("\\", "/")


class Zip(zipfile.ZipFile):
    """A zip file whose list of entries fits the file, read within bounds.

    ``entries`` are pairs of name and ``ZipInfo``, folders among them (their names end with a
    slash). Raises ``ValueError`` for a list that is damaged, or names entries that share bytes or
    lie outside the file.
    """

    def __init__(self, source: Path | BinaryIO) -> None:
        try:
            super().__init__(source)
            counted = self._counted()
        except MemoryError:
            raise
        except Exception as error:  # a damaged list raises almost anything
            raise ValueError(one_line(error)) from None
        self.entries = [(_name(info), info) for info in self.infolist()]
        if (len(self.entries) - counted) % 2**16:  # zipfile stops where the list is damaged
            raise ValueError("the list of its entries is damaged")
        end = 0
        for info in sorted(self.infolist(), key=lambda info: info.header_offset):
            if info.header_offset < end:
                raise ValueError("entries overlap, or lie outside the file")
            end = info.header_offset + 30 + info.compress_size
        if end > self.start_dir:
            raise ValueError("entries overlap, or lie outside the file")

    def _counted(self) -> int:
        """The entries that the end of the file counts (before zip64: modulo 2**16)."""
        self.fp.seek(max(0, self.fp.seek(0, io.SEEK_END) - 2**16 - 98))
        tail = self.fp.read()
        (count,) = struct.unpack_from("<H", tail, tail.rfind(b"PK\5\6") + 10)
        larger = tail.rfind(b"PK\6\6")
        if count == 2**16 - 1 and larger >= 0:
            (count,) = struct.unpack_from("<Q", tail, larger + 32)
        return count

    def by_name(self) -> dict[str, zipfile.ZipInfo]:
        """Files by their name. Raises ``ValueError`` where one is there twice."""
        files = [(name, info) for name, info in self.entries if not name.endswith("/")]
        found = dict(files)
        if len(found) < len(files):
            raise ValueError(f"{len(files) - len(found)} of {len(files)} names are there already")
        return found

    def content(self, info: zipfile.ZipInfo, most: float = math.inf) -> bytes:
        """The bytes of an entry, where they are at most ``most``."""
        size = bounded(info.file_size, info.compress_size, most)
        # zipfile's readers of other methods unpack a few bytes to gigabytes in one step.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("compressed by another method than deflate")
        if info.flag_bits & 1:
            raise ValueError(f"File {shown(info.filename)!r} is encrypted")
        with self.open(info) as file:
            data = file.read(size + 1)
        if len(data) != size:
            raise ValueError(f"it declares {size} bytes, but holds {len(data)}")
        return data


# --- arrays --------------------------------------------------------------------------------------


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether by columns, type, and where the content begins, of an ``.npy``.

    Only the beginning is read. The type is one of numbers, or ``object``.
    """
    start = io.BytesIO(file.read(2**16))
    try:
        version = np.lib.format.read_magic(start)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, by_columns, dtype = read(start)
    except Exception as error:  # the header is a Python expression
        raise ValueError(f"not an .npy file of version 1 or 2 ({one_line(error)})") from None
    if dtype.kind not in "fiubO" or min(shape, default=0) < 0:
        raise ValueError(f"an array of {shown(dtype, 40)} with {len(shape)} axes, not of numbers")
    return shape, by_columns, dtype, start.tell()


def npy_fits(shape: tuple[int, ...], dtype: np.dtype, size: int) -> None:
    """Raise ``ValueError`` where ``size`` bytes are not what the header declares."""
    if dtype.kind == "O" or math.prod(shape) * dtype.itemsize != size:
        wanted = f"{shown(dtype, 40)} [{shown(', '.join(map(str, shape)), 80)}]"
        raise ValueError(f"its header declares {wanted}, but it holds {size} bytes")


def read_npy(data: bytes) -> np.ndarray:
    """The array of numbers in the bytes of an ``.npy``; it may be read-only."""
    shape, by_columns, dtype, start = npy_header(io.BytesIO(data))
    npy_fits(shape, dtype, len(data) - start)
    if 0 in shape:
        raise ValueError(f"an array of shape {list(shape)}, which is empty")
    values = np.frombuffer(data, dtype, offset=start)
    return values.reshape(shape, order="F" if by_columns else "C")


# --- JSON ----------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is given twice")
    return content


def read_json(data: bytes) -> Any:
    """The content of a JSON file, in which no key is given twice."""
    try:
        return json.loads(data, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({one_line(error)})") from None


def dataset_json(data: bytes) -> dict[str, Any]:
    """The content of a ``dataset.json``."""
    content = read_json(data)
    if not isinstance(content, dict):
        raise ValueError("it must be an object with the key 'labels'")
    return content


def json_size(entries: int) -> int:
    """Bytes that the ``dataset.json`` of so many entries may have."""
    return 2**20 + 2**10 * entries


def classes_of(content: dict[str, Any], highest: int) -> list[str] | None:
    """The names of classes in a ``dataset.json`` with labels to ``highest``, if it has any."""
    classes = content.get("classes")
    if classes is None:
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("'classes' must be a list of names")
    if len(classes) > LABELS:
        raise ValueError(f"it names {len(classes)} classes; there may be {LABELS}")
    if highest >= len(classes):
        raise ValueError(f"it names {len(classes)} classes, but there is a label {highest}")
    return classes


def labels_of(content: Any) -> dict[str, int] | None:
    """The label of each entry, by name, in a ``dataset.json``; ``None`` where it has none."""
    pairs = content.get("labels")
    if pairs is None or pairs == []:
        return None
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in pairs
    ):
        raise ValueError("'labels' must be a list of [entry, class]")
    labels: dict[str, int] = {}
    for name, label in pairs:
        name = name.replace("\\", "/")
        if name in labels:
            raise ValueError(f"{shown(name)} has two labels")
        if not is_label(label):
            what = label if isinstance(label, str | int | float) else type(label).__name__
            raise ValueError(
                f"the label of {shown(name)} is {shown(what, 40)}; classes are integers "
                f"from 0 to {LABELS - 1} (label vectors are not supported)"
            )
        labels[name] = label
    return labels


def is_label(value: Any) -> bool:
    """Whether a value is the number of a class."""
    return type(value) is int and 0 <= value < LABELS
