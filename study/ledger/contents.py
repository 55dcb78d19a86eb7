"""What sources and files hold, told cheaply: touched, copied or moved they are the same.

Where data or weights lie is no setting, what they hold is. To read everything at every start would
be dear, so sizes and times say first whether there is anything to read: a hash is remembered beside
them, and taken again only where they differ. No heavy imports: the Snakefile reads this.
"""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from study.files import UserError, read_json, sha256, write_json
from study.leftovers import is_kept

MANY = 50_000
"""Files of a source beyond which the times of its folders stand for those of its files.

Adding, removing, renaming and replacing a file changes its folder's time; writing into a file that
stays does not, and goes unnoticed in sources of more files than this.
"""

KNOWN_TIMES = 8
"""How many sets of times are remembered for one content: studies may hold copies of it."""


# --- sources -------------------------------------------------------------------------------------


class Survey(NamedTuple):
    """A source as its names, sizes and times tell of it.

    ``listing`` and ``times`` are digests of relative names with sizes, and of modification times;
    ``files`` is their number; ``folders`` has the times of all folders, where there are many files.
    """

    listing: str
    times: str
    files: int
    folders: dict[str, int]


Member = tuple[str, os.stat_result]
"""A file or folder of a source: its relative name (a folder's ends with a slash) and facts."""


def _walk(path: Path) -> Iterator[Member]:
    """Files and folders below ``path``, itself included, in no fixed order."""
    waiting = [("", frozenset([os.path.realpath(path)]))]
    while waiting:
        inside, above = waiting.pop()
        yield inside, os.stat(path / inside)
        with os.scandir(path / inside) as entries:
            for entry in entries:
                if not is_kept([entry.name]):
                    continue
                if entry.is_file():
                    yield inside + entry.name, entry.stat()
                if not entry.is_dir():
                    continue
                real = os.path.realpath(entry.path)
                if real not in above:  # a link may lead back up
                    waiting.append((f"{inside}{entry.name}/", above | {real}))


def _members(
    path: Path,
) -> tuple[list[tuple[str, os.stat_result]], list[tuple[str, os.stat_result]]]:
    """Files and folders of a source by relative name, each sorted; of a file, itself alone."""
    if not path.is_dir():
        stat = path.stat()
        return [("", stat)] if path.is_file() else [], []
    files, folders = [], []
    for name, stat in _walk(path):
        (folders if not name or name.endswith("/") else files).append((name, stat))
    return sorted(files, key=itemgetter(0)), sorted(folders, key=itemgetter(0))


def _hex(lines: Iterable[str]) -> str:
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode(errors="surrogateescape") + b"\n")
    return total.hexdigest()[:16]


def survey(path: Path) -> Survey:
    """Look at a source without reading it. Raises ``OSError`` where it cannot be listed."""
    files, folders = _members(path)
    sizes = (f"{name}\0{stat.st_size}" for name, stat in files)
    return Survey(
        _hex([*sizes, *(name for name, _ in folders)]),
        _hex(str(stat.st_mtime_ns) for _, stat in files),
        len(files),
        {name: stat.st_mtime_ns for name, stat in folders} if len(files) > MANY else {},
    )


def digest(path: Path) -> str:
    """Digest of everything that a source holds: relative names and bytes."""
    return _hex(f"{name}\0{sha256(path / name)}" for name, _ in _members(path)[0])


def located(path: str | Path | None) -> Path | None:
    """Where a source lies."""
    return None if path is None else Path(path).expanduser()


def note(archive: str | Path) -> Path:
    """The file in which a conversion says what source its archive was made from."""
    return Path(f"{archive}.source.json")


def _noted(archive: str | Path) -> dict[str, Any]:
    try:
        found = read_json(note(archive))
    except (UserError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same_folders(path: Path, folders: dict[str, int]) -> bool:
    try:
        return all(os.stat(path / name).st_mtime_ns == time for name, time in folders.items())
    except OSError:
        return False


def source(path: str | None, archive: str | Path) -> str:
    """The identity of the source at ``path``: another one where it no longer holds the same.

    Sources of the same content have the same identity, wherever they lie and whatever their times.
    Content is read only where names and sizes are those from which ``archive`` was made, but times
    are not. A source that is gone, and one that cannot be read, are as they were then.
    """
    place, noted = located(path), _noted(archive)
    former = noted.get("identity", "")
    if place is None or (noted.get("folders") and _same_folders(place, noted["folders"])):
        return former
    try:
        now = survey(place)
        if now.listing != noted.get("listing"):
            return now.listing
        if now.times in noted.get("times", ()):
            return former
        print(f"study: {place}: reading it again, for its times have changed", file=sys.stderr)
        content = digest(place)
    except OSError as error:
        if place.exists():
            print(f"study: {place}: whether it has changed is not known ({error})", file=sys.stderr)
        return former
    if content != noted.get("content"):
        return f"{now.listing}-{content}"
    with suppress(OSError):
        times = [*noted.get("times", ()), now.times][-KNOWN_TIMES:]
        write_json(note(archive), noted | {"times": times, "folders": now.folders})
    return former


def made_from(archive: str | Path) -> str | None:
    """The identity of the source that an archive was made from; ``None`` where that is unknown."""
    return _noted(archive).get("identity")


def gone(path: str | None) -> bool:
    """Whether there is no source any more where a study says that it lies."""
    place = located(path)
    return place is not None and not place.exists()


def code(path: str | None, archive: str | Path, current: str) -> str:
    """The digest of the converting code: ``current``, or the former one if the source is gone.

    An archive that cannot be made again stays as it is.
    """
    return (gone(path) and _noted(archive).get("code")) or current


def look(path: str | Path | None, archive: str | Path) -> dict[str, Any]:
    """What `remember` will write down of a source: to be taken before it is converted."""
    place, noted = located(path), _noted(archive)
    if place is None:
        return {}
    try:
        now, content = survey(place), digest(place)
    except OSError:  # the conversion says what is wrong with it
        return {}
    identity = now.listing
    if now.listing == noted.get("listing"):
        same = content == noted.get("content")
        identity = noted["identity"] if same else f"{now.listing}-{content}"
    return {
        "path": str(place.absolute()),
        "identity": identity,
        "listing": now.listing,
        "times": [now.times],
        "folders": now.folders,
        "content": content,
    }


def described(archive: str | Path) -> Path:
    """The small file that stands for an archive's content: the jobs that read it wait for this.

    It says the same wherever and whenever the same content is converted.
    """
    return Path(f"{archive}.json")


def remember(
    seen: dict[str, Any], archive: str | Path, summary: dict[str, Any], code: str | None
) -> None:
    """After a conversion: write what the archive holds, and what it was made from."""
    kept = ("name", "kind", "images", "resolution", "channels", "classes", "sha256")
    write_json(note(archive), {**seen, "code": code, "archive": _stamp(archive)})
    write_json(described(archive), {key: summary[key] for key in kept})


# --- files ---------------------------------------------------------------------------------------


def _stamp(path: str | Path) -> list[int]:
    """Size and time of a file: while they stay, so does its content."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def archive_hash(path: str | Path) -> str | None:
    """The content's hash as an archive tells it; ``None`` where it does not."""
    try:
        with zipfile.ZipFile(path) as file:
            return json.loads(file.read("dataset.json"))["sha256"]
    except Exception:  # another file in its place may be damaged in any way
        return None


def check_archive(archive: str | Path) -> None:
    """Raise ``UserError`` if another archive lies where a conversion put its own."""
    noted = _noted(archive)
    try:
        wanted = read_json(described(archive))["sha256"]
        stamp = _stamp(archive)
    except (OSError, UserError, KeyError, TypeError):
        return  # not there, or not made yet
    if noted.get("archive") == stamp:
        return
    if archive_hash(archive) != wanted:
        raise UserError(
            f"{archive}: holds other images than its conversion put there; delete it, and it is "
            "converted again where it is needed (for other images choose another dataset.name)"
        )
    if noted:
        with suppress(OSError):
            write_json(note(archive), noted | {"archive": stamp})


class Hashes:
    """Hashes of users' files, by what they are for; kept in a file beside size and time.

    A file that is gone has the hash that it last had.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.known = dict(read_json(self.path))
        except (UserError, OSError, ValueError, TypeError):
            self.known = {}
        self._read: dict[tuple[Any, ...], str] = {}

    def __call__(self, role: str, path: str | Path) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of the file at ``path`` in this role."""
        place = Path(path).expanduser()
        known = self.known.get(role) or {}
        try:
            stat = place.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            if known.get("stamp") != stamp:
                one = (str(place), *stamp)
                if one not in self._read:
                    self._read[one] = sha256(place)[:16]
                known = {"stamp": stamp, "sha256": self._read[one]}
                self.known[role] = known
                with suppress(OSError):
                    write_json(self.path, self.known)
        except OSError:
            pass
        return known.get("sha256", "")


def settled(path: str | Path, record: str | Path, key: str, hashes: Hashes) -> bool:
    """Whether a file that a job wrote is still what that job's ``record`` says of it.

    Records are written last, so a file that is not younger than its record is.
    """
    try:
        if os.stat(path).st_mtime_ns <= os.stat(record).st_mtime_ns:
            return True
        wanted = read_json(record).get(key)
    except (OSError, UserError, AttributeError):
        return True
    return isinstance(wanted, str) and wanted.startswith(hashes(str(path), path))
