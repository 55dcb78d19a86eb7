"""Reading an LMDB, every page checked before it is believed.

The library maps the file and follows its page numbers: in a file cut short it ends the process
(SIGBUS), and in a damaged one it reads what lies there. LMDB has no check sums, so what can be
checked is structure: all pages are in the file, of the kind and number that lead to them, their
keys ascend, and pages and entries are as many as the database counts. Layout: LMDB 0.9's ``mdb.c``
on 64-bit little-endian machines.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from study.data.reading import ITEM

MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8
BIG = 1  # a node whose content lies in overflow pages
NONE = 2**64 - 1
HEADER = struct.Struct("<QHHHH")  # page number, -, flags, lower and upper end of the free space
NODE = struct.Struct("<HHHH")  # content size (or page, with flags), flags, key size
META_PAGE = struct.Struct("<IIQQ48s48sQQ")  # magic, version, -, -, free pages, main, last, id
TREE = struct.Struct("<IHHQQQQQ")  # -, flags, depth, branch, leaf, overflow pages, entries, root


class _Tree(NamedTuple):
    flags: int
    depth: int
    branches: int
    leaves: int
    overflow: int
    entries: int
    root: int


class Database:
    """The main database of a ``data.mdb``.

    ``places`` are its keys in order, each with where its content lies. Raises ``ValueError`` for a
    file that is damaged or cut short, or has keys with several values.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            self._size = os.fstat(self._descriptor).st_size
            self.page, self.last, tree = self._meta()
            self._seen = {BRANCH: 0, LEAF: 0, OVERFLOW: 0}
            self.places = [] if tree.root == NONE else list(self._walk(tree.root, tree.depth))
            self._compare(tree)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def read(self, place: tuple[int, int]) -> bytes:
        """The content at a place."""
        offset, size = place
        if size > ITEM:
            raise ValueError(f"an entry of {size} bytes, of which at most {ITEM} are read")
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise ValueError("it is cut short")
        return data

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset + size > self._size:
            raise ValueError(f"cut short: it has {self._size} bytes and uses {offset + size}")
        return os.pread(self._descriptor, size, offset)

    def _meta(self) -> tuple[int, int, _Tree]:
        """Page size, last page and main tree, by the newer of the two meta pages."""
        metas, page = [], 0
        for number in (0, 1):
            found, _, flags, _, _ = HEADER.unpack(self._bytes(number * page, HEADER.size))
            content = self._bytes(number * page + HEADER.size, META_PAGE.size)
            magic, version, _, _, free, main, last, identity = META_PAGE.unpack(content)
            size = int.from_bytes(free[:4], "little")
            if (magic, version, found, flags) != (MAGIC, VERSION, number, META):
                raise ValueError(
                    "its first pages are damaged, or it is no LMDB of a 64-bit machine"
                )
            if size not in (2**power for power in range(8, 17)) or page not in (0, size):
                raise ValueError("its first pages are damaged: the page size")
            page = size
            metas.append((identity, last, _Tree(*TREE.unpack(main)[1:])))
        (older, _, _), (newer, last, tree) = sorted(metas)
        if newer - older > 1 or (newer != older and metas[newer % 2][0] != newer):
            raise ValueError("its first pages are damaged: the order of writing")
        if tree.flags & ~0x08:  # integer keys are as good as any; several values for one are not
            raise ValueError("a database of another kind")
        return page, last, tree

    def _walk(self, root: int, depth: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
        waiting = [(root, depth, None)]
        before = None
        visited = set()
        while waiting:
            number, level, least = waiting.pop()
            if not 2 <= number <= self.last or number in visited or level < 1:
                raise ValueError(f"damaged: page {number} is out of place")
            visited.add(number)
            page = self._bytes(number * self.page, self.page)
            kind = LEAF if level == 1 else BRANCH
            nodes = self._nodes(page, number, kind)
            self._seen[kind] += 1
            if kind == BRANCH:
                if len(nodes) < 2:
                    raise ValueError(f"damaged: page {number} leads nowhere")
                for index, (low, high, flags, key, _) in reversed(list(enumerate(nodes))):
                    child = low | high << 16 | flags << 32
                    waiting.append((child, level - 1, key if index else least))
                continue
            for index, (low, high, flags, key, at) in enumerate(nodes):
                if (before is not None and key <= before) or (index == 0 and least and key < least):
                    raise ValueError(f"damaged: the keys of page {number} are out of order")
                before = key
                yield key, self._place(page, number, low | high << 16, flags, at)

    def _nodes(self, page: bytes, number: int, kind: int) -> list[tuple[int, int, int, bytes, int]]:
        """Low and high half, flags, key and end of each node of a page."""
        found, _, flags, lower, upper = HEADER.unpack_from(page)
        if (found, flags) != (number, kind) or not 16 < lower <= upper <= self.page or lower % 2:
            raise ValueError(f"damaged: page {number} is not what leads to it")
        nodes = []
        for at in struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16):
            if not upper <= at <= self.page - NODE.size:
                raise ValueError(f"damaged: page {number} has a node outside it")
            low, high, flags, size = NODE.unpack_from(page, at)
            end = at + NODE.size + size
            if end > self.page:
                raise ValueError(f"damaged: page {number} has a key that leaves it")
            nodes.append((low, high, flags, page[at + NODE.size : end], end))
        return nodes

    def _place(self, page: bytes, number: int, size: int, flags: int, at: int) -> tuple[int, int]:
        if flags not in (0, BIG):
            raise ValueError("a database of another kind")
        if not flags:
            if at + size > self.page:
                raise ValueError(f"damaged: page {number} has content that leaves it")
            return number * self.page + at, size
        if at + 8 > self.page:
            raise ValueError(f"damaged: page {number} has content that leaves it")
        first = int.from_bytes(page[at : at + 8], "little")
        found, _, kind, low, high = HEADER.unpack(self._bytes(first * self.page, HEADER.size))
        pages = low | high << 16  # content that was written anew may need fewer
        if (found, kind) != (first, OVERFLOW) or HEADER.size + size > pages * self.page:
            raise ValueError(f"damaged: page {first} is not what leads to it")
        if not 2 <= first <= self.last + 1 - pages:
            raise ValueError(f"damaged: page {first} is out of place")
        self._bytes(first * self.page + HEADER.size + size, 0)
        self._seen[OVERFLOW] += pages
        return first * self.page + HEADER.size, size

    def _compare(self, tree: _Tree) -> None:
        found = (self._seen[BRANCH], self._seen[LEAF], self._seen[OVERFLOW], len(self.places))
        counted = (tree.branches, tree.leaves, tree.overflow, tree.entries)
        if found != counted:
            raise ValueError("damaged: it has fewer or more pages or entries than it counts")
