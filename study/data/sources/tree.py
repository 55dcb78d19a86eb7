"""Folders, zips and tars read alike: a sorted list of members, and bytes by member."""

import bz2
import gzip
import io
import lzma
import math
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from study.data.pixels import Unusable
from study.data.reading import ITEM, Zip, bounded, one_line, shown
from study.data.sources.base import Problem
from study.files import UserError
from study.leftovers import is_kept

# What reading a damaged or encrypted member raises.
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error),
    *(lzma.LZMAError, NotImplementedError),
)
LONGEST, DEEPEST = 4096, 64
"""Characters and folders of a path; a file may name paths that no disk would hold."""

UNPACKED, RATIO = 2**30, 128
"""A compressed tar may unpack to so many bytes on the disk, or to so many times its own."""

MEMBER = 2**20
"""Bytes that the headers of a member of a tar may have."""


class Tree:
    """Members of a folder or an archive file.

    Attributes
    ----------
    members : list of str
        Files by their path inside, with slashes, sorted folder by folder. Hidden files are left
        out.
    folders : set of str
        Folders by their path inside, empty ones included, the top ("") excluded.
    problems : list of Problem
        Members that were refused: paths that lead outside, duplicates, links.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members: list[str] = []
        self.folders: set[str] = set()
        self.problems: list[Problem] = []

    def read(self, name: str, most: int = ITEM) -> bytes:
        """The bytes of a member that has at most ``most``. Raises `Unusable`."""
        try:
            return self._read(self._own[name], most)
        except Unusable:
            raise
        except _UNREADABLE as error:
            raise Unusable("unreadable", one_line(error)) from None

    def file(self, name: str) -> BinaryIO:
        """A seekable binary file of a member of any size. Raises `Unusable`."""
        try:
            return io.BytesIO(self._read(self._own[name], math.inf))
        except _UNREADABLE as error:
            raise Unusable("unreadable", one_line(error)) from None

    def close(self) -> None:
        """Free what the tree holds open."""

    def _read(self, own: Any, most: float) -> bytes:
        raise NotImplementedError

    def _settle(self, files: Iterable[tuple[str, Any]], folders: Iterable[str]) -> None:
        """Check, clean and sort names as found: of files, with what finds them, and of folders."""
        self._own: dict[str, Any] = {}  # by clean path
        doubled = set()
        for name, own in files:
            path = self._clean(name)
            if path is None:
                long = len(name) > LONGEST or name.count("/") > DEEPEST
                why = "too long or too deep" if long else "absolute, or leads outside"
                self.problems.append(Problem(name, "unsafe path", why))
            elif path in self._own:
                doubled.add(path)
            elif path:
                self._own[path] = own
        for path in sorted(doubled):  # which one is meant is a guess, so none is taken
            self.problems.append(Problem(path, "duplicate name", "more than one such member"))
            del self._own[path]
        for path in {*map(self._clean, folders), *map(os.path.dirname, self._own)}:
            parts = path.split("/") if path else []
            self.folders.update("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        self.members = sorted(self._own, key=lambda path: path.split("/"))

    @staticmethod
    def _clean(name: str) -> str | None:
        """The path inside with plain slashes, "" if not kept, ``None`` if unsafe."""
        path = name.replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or re.match(r"[A-Za-z]:/", path) or ".." in parts:
            return None
        if len(path) > LONGEST or len(parts) > DEEPEST:
            return None
        return "/".join(parts) if is_kept(parts) else ""


class FolderTree(Tree):
    """A folder; symbolic links are followed, each folder is entered once per chain."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        files, folders = [], []
        pending = [("", frozenset([os.path.realpath(path)]))]
        while pending:
            inside, above = pending.pop()
            try:
                entries = list(os.scandir(path / inside))
            except OSError as error:
                raise UserError(f"{path / inside}: cannot list it ({error.strerror})") from None
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if not entry.is_dir():
                    if entry.is_file():
                        files.append((name, name))
                    elif is_kept([entry.name]):  # opening a pipe would wait for ever
                        self.problems.append(
                            Problem(name, "not a plain file", "a broken link, a device or a pipe")
                        )
                    continue
                folders.append(name)
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if is_kept([entry.name]) and real not in above:
                    pending.append((name, above | {os.path.realpath(entry.path)}))
        self._settle(files, folders)

    def _read(self, own: str, most: float) -> bytes:
        try:
            size = (self.path / own).stat().st_size
            bounded(size, size, most)
            with (self.path / own).open("rb") as file:
                return file.read(size)
        except OSError as error:
            raise Unusable("unreadable", error.strerror or "input/output error") from None

    def file(self, name: str) -> BinaryIO:
        try:
            return (self.path / self._own[name]).open("rb")
        except OSError as error:
            raise Unusable("unreadable", error.strerror or "input/output error") from None


class ZipTree(Tree):
    """A zip file. Reading is safe from several threads (``ZipFile`` locks its file)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = Zip(path)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not a readable zip file ({one_line(error)})") from None
        self._settle(
            ((name, info) for name, info in self._zip.entries if not name.endswith("/")),
            (name for name, _ in self._zip.entries if name.endswith("/")),
        )

    def _read(self, own: zipfile.ZipInfo, most: float) -> bytes:
        return self._zip.content(own, most)

    def close(self) -> None:
        self._zip.close()


class _Headers:
    """A file as tarfile may read it while it lists the members: headers, forwards."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MEMBER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class TarTree(Tree):
    """A tar file, read by position; a compressed one is unpacked into one temporary file first."""

    _openers = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = self._plain(path)
        try:
            self._list()
        except MemoryError:
            raise
        except Exception as error:  # tarfile raises almost anything for forged numbers
            self.close()
            raise UserError(f"{path}: not a readable tar file ({one_line(error)})") from None

    @classmethod
    def _plain(cls, path: Path) -> BinaryIO:
        file = path.open("rb")
        start = file.read(6)
        file.seek(0)
        opener = next((open_ for magic, open_ in cls._openers if start.startswith(magic)), None)
        if opener is None:
            return file
        unpacked = tempfile.TemporaryFile(prefix="longskip-")  # noqa: SIM115 (open as long as the tree)
        try:
            most = max(UNPACKED, RATIO * os.fstat(file.fileno()).st_size)
            with file, opener(file) as stream:
                while block := stream.read(2**20):
                    unpacked.write(block)
                    if unpacked.tell() > most:
                        raise ValueError(f"it unpacks to more than {most} bytes")
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            unpacked.close()
            raise UserError(f"{path}: not a readable tar file ({one_line(error)})") from None
        unpacked.flush()
        unpacked.seek(0)
        return unpacked

    def _list(self) -> None:
        files, folders = [], []
        size = os.fstat(self._file.fileno()).st_size
        with tarfile.open(fileobj=_Headers(self._file), mode="r:") as tar:
            before = -1
            for member in tar:
                tar.members = []  # the list that tarfile keeps grows with the archive
                if not before < member.offset < tar.offset:
                    raise tarfile.ReadError("its sizes lead backwards")
                before = member.offset
                if member.isdir():
                    folders.append(member.name)
                elif not member.isfile() or member.issparse():
                    self.problems.append(
                        Problem(member.name, "not a plain file", "a link, a device or sparse")
                    )
                elif member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it ends inside {shown(member.name)}")
                else:
                    files.append((member.name, (member.offset_data, member.size)))
            # tarfile takes the end of the file, and a damaged header, for the end of the list.
            self._file.seek(tar.offset)
            if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut short or damaged: its end mark is missing")
        self._settle(files, folders)

    def _read(self, own: tuple[int, int], most: float) -> bytes:
        offset, size = own
        data = os.pread(self._file.fileno(), bounded(size, size, most), offset)
        if len(data) != size:
            raise Unusable("unreadable", "the tar file ends inside it")
        return data

    def close(self) -> None:
        self._file.close()


def open_tree(path: Path, kind: str | None = None) -> Tree:
    """Open a folder, zip or tar; ``kind`` insists on one of the three.

    Raises ``UserError`` where the path is missing, unreadable, or of another kind.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    kinds = {"folder": FolderTree, "zip": ZipTree, "tar": TarTree}
    found = "folder" if path.is_dir() else None
    if found is None:
        name = path.name.lower()
        if zipfile.is_zipfile(path) or name.endswith(".zip"):
            found = "zip"
        elif re.search(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$", name) or tarfile.is_tarfile(path):
            found = "tar"
        elif kind in ("zip", "tar"):
            found = kind  # its reader says what is wrong with it
        else:
            raise UserError(f"{path}: neither a folder nor a zip or tar file")
    if kind in kinds and kind != found:
        raise UserError(f"{path}: is a {found}, not a {kind}: set source: {found}")
    return kinds[found](path)
