"""Files appear whole or not at all; users' mistakes are one line."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ABANDONED = 86400.0
"""Seconds without a change after which what another machine was writing counts as left behind."""
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


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""A full disk, a quota, a limit on the size of a file."""

NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
"""A folder that cannot be written to, or is none."""


def unwritable(path: str | Path, error: OSError) -> UserError:
    """What is wrong where the system does not let ``path`` be written."""
    return UserError(f"{path}: cannot be written ({os.strerror(error.errno).lower()})")


def writable(folder: str | Path) -> None:
    """Make a folder, and raise ``UserError`` where no file can be made in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(folder, error) from None


def _refusal(path: Path, error: Exception) -> OSError | None:
    """The system's own words where there is no room to write; of libraries, some hide them."""
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # as Rust's libraries say it
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    elif not isinstance(error, OSError):
        try:
            with path.open("ab") as file:
                file.write(bytes(1 << 16))
                file.flush()
                os.fsync(file.fileno())
            return None
        except OSError as refused:
            error = refused
    return error if error.errno in NO_ROOM else None


class Stopped(Exception):
    """A command that left before its end and lost nothing: the same command goes on."""


def _writing() -> str:
    """What the names of this machine's temporary folders have in common."""
    return f".writing-{zlib.crc32(socket.gethostname().encode()):08x}-"


def sweep(folder: str | Path) -> None:
    """Remove what killed writers left half-written in ``folder``.

    A living writer holds a lock on its temporary folder. Where that tells nothing (a writer on
    another machine, a file system without ``flock``), only what has not changed for a day goes.
    """
    for left in Path(folder).glob(".*.writing-*"):
        with suppress(OSError):  # its writer has just finished, or holds it
            handle = os.open(left, os.O_RDONLY)
            try:
                dead = _writing() in left.name
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                except OSError:
                    dead = False
                changed = max(path.stat().st_mtime for path in (left, *left.iterdir()))
                if dead or time.time() - changed > ABANDONED:
                    shutil.rmtree(left)
            finally:
                os.close(handle)


def _temporary_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside ``path`` that `sweep` leaves alone, and the descriptor that holds it."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{_writing()}"))
        with suppress(FileNotFoundError):  # swept before it was held
            handle = os.open(folder, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                return folder, handle
            os.close(handle)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a path of the same name to write to; on success it is fsynced and becomes ``path``.

    It lies in a temporary folder beside ``path``, so that what libraries write beside it goes with
    it. On an exception the folder is removed and ``path`` keeps its former content; what a killed
    process left is removed by the next one that writes there. Raises ``UserError`` where the folder
    cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary_folder, handle = _temporary_folder(path)
    except OSError as error:
        raise unwritable(path, error) from None
    temporary = temporary_folder / path.name
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # Some libraries make files private; the result follows the umask like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except Exception as error:
        if refusal := _refusal(temporary, error):
            raise unwritable(path, refusal) from None
        raise
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)
        os.close(handle)


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
