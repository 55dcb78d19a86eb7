"""CIFAR-10's python archive (cifar-10-python.tar.gz), packed or unpacked."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from study.data.pixels import Unusable
from study.data.sources import pickles
from study.data.sources.base import Item, Source
from study.data.sources.tree import Tree, open_tree
from study.files import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
FILES = {"train": TRAIN, "test": ("test_batch",), "all": (*TRAIN, "test_batch")}


class _Batches:
    """Batch files by name; the last one read stays, since items come in order."""

    def __init__(self, tree: Tree, members: dict[str, str]) -> None:
        self._tree = tree
        self._members = members
        self._lock = threading.Lock()
        self._last: tuple[str, np.ndarray, list[int]] | None = None

    def get(self, name: str) -> tuple[np.ndarray, list[int]]:
        """uint8 [n, 32, 32, 3] and n labels. Raises ``UserError``."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = (name, *self._load(name))
            return self._last[1:]

    def _load(self, name: str) -> tuple[np.ndarray, list[int]]:
        where = f"{self._tree.path}: {name}"
        try:
            content = pickles.load(self._tree.read(self._members[name]))
        except pickles.PickleError as error:
            raise UserError(f"{where} was refused: {error}") from None
        except Unusable as error:
            raise UserError(f"{where} is not readable ({error.detail})") from None
        data = content.get("data") if isinstance(content, dict) else None
        labels = content.get("labels") if isinstance(content, dict) else None
        if (
            not isinstance(data, np.ndarray)
            or data.dtype != np.uint8
            or data.ndim != 2
            or data.shape[1] != 3072
            or not isinstance(labels, list)
            or len(labels) != len(data)
            or not all(type(label) is int and 0 <= label < 10 for label in labels)
        ):
            raise UserError(f"{where} is not a CIFAR-10 batch (uint8 data [n, 3072], n labels 0-9)")
        return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def cifar10(settings: dict[str, Any], path: Path) -> Source:
    """RGB images of 32 x 32 in the published order; ``split`` train (default), test or all."""
    split = settings["split"] or "train"
    if split not in FILES:
        raise UserError(f"CIFAR-10 has no split {split!r}: choose train, test or all")
    if path.is_dir() and (path / "cifar-10-python.tar.gz").is_file():
        path = path / "cifar-10-python.tar.gz"
    tree = open_tree(path)
    try:
        members = {member.rpartition("/")[2]: member for member in tree.members}
        doubled = [m for m in tree.members if members[m.rpartition("/")[2]] != m]
        doubled = [m for m in doubled if m.rpartition("/")[2] in FILES[split]]
        if doubled:
            raise UserError(f"{path}: {doubled[0].rpartition('/')[2]} is there more than once")
        missing = [name for name in FILES[split] if name not in members]
        if missing:
            raise UserError(
                f"{path}: {missing[0]} is missing; expected cifar-10-python.tar.gz or its "
                "unpacked folder cifar-10-batches-py (the binary and Matlab versions differ)"
            )
        batches = _Batches(tree, members)
        items = [
            Item(f"{name}[{row}]", label, (name, row))
            for name in FILES[split]
            for row, label in enumerate(batches.get(name)[1])
        ]
    except BaseException:
        tree.close()
        raise

    def read(item: Item) -> tuple[np.ndarray, int | None]:
        name, row = item.key
        return batches.get(name)[0][row], item.label

    return Source(
        items=items,
        read=read,
        description="CIFAR-10, python archive",
        classes=list(CLASSES),
        split=split,
        close=tree.close,
    )
