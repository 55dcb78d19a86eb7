"""Files appear whole or not at all; users' mistakes are one line."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LINE = 1000
"""Most characters of a line that people read."""


def printable(text: str) -> str:
    """One line of text that a terminal shows as it is.

    Whatever else a name from a file holds (line ends, escape codes, half characters) is written
    as Python writes it, and a long line loses its middle.
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 100 * LINE])
    return line if len(line) <= LINE else f"{line[: LINE - 300]} ... {line[-295:]}"


class UserError(Exception):
    """A mistake of the user: one line that says what is wrong, where, and what would be right.

    Several mistakes are several arguments. The lines are ``printable``.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(map(printable, lines)))


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed to ``path``.

    On an exception the temporary file is removed and ``path`` keeps its former content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; the result follows the user's umask like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Write ``content`` to ``path`` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def plain(value: Any) -> Any:
    """The JSON form of ``value``: tuples become lists, paths text, non-finite floats ``None``."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # NumPy and torch scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as JSON atomically: sorted keys, non-finite numbers as ``null``."""
    write_text(path, json.dumps(plain(content), indent=1, sort_keys=True, allow_nan=False) + "\n")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text. Raises ``ValueError`` where it gives a key twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:80]!r} is given twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def parse_json(content: str | bytes, where: str | Path) -> Any:
    """The value of a JSON text, which is UTF-8.

    Raises ``UserError`` that begins with ``where`` for anything else, for a key that is given
    twice, and for numbers that are not finite.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=once, parse_float=_finite, parse_constant=_finite)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not valid JSON (it is not in UTF-8)") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        said = "a number of too many digits" if "integer string conversion" in str(error) else error
        raise UserError(f"{where}: not valid JSON ({said})") from None


JSON_BYTES = 2**28
"""Most bytes of a JSON file."""


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ``UserError`` where it is missing or broken."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(JSON_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > JSON_BYTES:
        raise UserError(f"{path}: more than {JSON_BYTES:,} bytes of JSON")
    return parse_json(content, path)


def read_object(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file that holds an object with these keys. Raises ``UserError`` otherwise."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object; got {type(content).__name__}")
    for key in keys:
        if key not in content:
            raise UserError(f"{path}: {key!r} is missing")
    return content


def canonical_json(content: Any) -> str:
    """One text per meaning: sorted keys, no spaces, ``2.0`` and ``2`` told apart by their type."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
