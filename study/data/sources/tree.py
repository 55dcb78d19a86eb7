"""Folders, zips and tars read alike: a sorted list of members, and bytes by member."""

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from study.data.sources.base import Problem, Unusable, one_line
from study.files import UserError

# What reading a damaged or encrypted member raises.
_UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


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

    def read(self, name: str) -> bytes:
        """The bytes of a member. Raises `Unusable`."""
        try:
            return self._read(name)
        except Unusable:
            raise
        except _UNREADABLE as error:
            raise Unusable("unreadable", one_line(error)) from None

    def file(self, name: str) -> BinaryIO:
        """A seekable binary file of a member. Raises `Unusable`."""
        return io.BytesIO(self.read(name))

    def close(self) -> None:
        """Free what the tree holds open."""

    def _read(self, name: str) -> bytes:
        raise NotImplementedError

    def _settle(self, files: Iterable[str], folders: Iterable[str]) -> None:
        """Check, clean and sort the names of files and folders as they were found."""
        self._own: dict[str, str] = {}  # name as found, by clean path
        doubled = set()
        for name in files:
            path = self._clean(name)
            if path is None:
                self.problems.append(Problem(name, "unsafe path", "absolute, or leads outside"))
            elif path and self._own.setdefault(path, name) is not name:
                doubled.add(path)
        for path in sorted(doubled):  # which one is meant is a guess, so none is taken
            self.problems.append(Problem(path, "duplicate name", "more than one such member"))
            del self._own[path]
        for path in {*map(self._clean, folders), *map(os.path.dirname, self._own)}:
            parts = path.split("/") if path else []
            self.folders.update("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        self.members = sorted(self._own, key=lambda path: path.split("/"))

    @staticmethod
    def _clean(name: str) -> str | None:
        """The path inside with plain slashes, "" if hidden, ``None`` if unsafe."""
        path = name.replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or re.match(r"[A-Za-z]:/", path) or ".." in parts:
            return None
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return ""
        return "/".join(parts)


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
                    files.append(name)
                    continue
                folders.append(name)
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if not entry.name.startswith(".") and real not in above:
                    pending.append((name, above | {os.path.realpath(entry.path)}))
        self._settle(files, folders)

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / self._own[name]).read_bytes()
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
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise UserError(f"{path}: not a readable zip file ({one_line(error)})") from None
        infos = self._zip.infolist()
        self._settle(
            (info.filename for info in infos if not info.is_dir()),
            (info.filename for info in infos if info.is_dir()),
        )

    def _read(self, name: str) -> bytes:
        return self._zip.read(self._own[name])

    def close(self) -> None:
        self._zip.close()


class TarTree(Tree):
    """A tar file, read by position; a compressed one is unpacked into one temporary file first."""

    _openers = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = self._plain(path)
        try:
            self._list()
        except (tarfile.TarError, OSError, EOFError) as error:
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
            with file, opener(file) as stream:
                shutil.copyfileobj(stream, unpacked, 2**20)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            unpacked.close()
            raise UserError(f"{path}: not a readable tar file ({one_line(error)})") from None
        unpacked.flush()
        unpacked.seek(0)
        return unpacked

    def _list(self) -> None:
        files, folders = [], []
        self._spans: dict[str, tuple[int, int]] = {}
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # the list that tarfile keeps grows with the archive
                if member.isdir():
                    folders.append(member.name)
                elif not member.isfile() or member.issparse():
                    self.problems.append(
                        Problem(member.name, "not a plain file", "a link, a device or sparse")
                    )
                else:
                    files.append(member.name)
                    self._spans.setdefault(member.name, (member.offset_data, member.size))
        self._settle(files, folders)

    def _read(self, name: str) -> bytes:
        offset, size = self._spans[self._own[name]]
        data = os.pread(self._file.fileno(), size, offset)
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
