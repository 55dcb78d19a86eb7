"""Latents of an autoencoder: ``.npy`` or ``.npz`` files in a folder, zip or tar."""

import io
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from study.data.pixels import Unusable
from study.data.reading import Zip, bounded, npy_fits, npy_header, one_line, read_npy, shown
from study.data.sources import pickles
from study.data.sources.base import Item, Problem, Source, label_of
from study.data.sources.tree import Tree, open_tree
from study.data.sources.trees import by_class, split_root
from study.files import UserError

VALUES = ("latents", "moments", "arr_0")
LABELS = ("labels", "arr_1")
MOST = 2**20
"""Latents in an npz that has fewer bytes."""

# What reading a damaged file raises.
_BROKEN = (
    *(OSError, EOFError, RuntimeError, NotImplementedError, ValueError, KeyError, IndexError),
    *(zipfile.BadZipFile, zlib.error, pickles.PickleError),
)


def _load_npy(data: bytes) -> tuple[np.ndarray, int | None]:
    """A latent; U-ViT's feature files pair it with its label in one pickled object array."""
    shape, _, dtype, start = npy_header(io.BytesIO(data))
    if dtype.kind != "O" or shape != (2,):
        return read_npy(data), None
    content = pickles.load(data[start:])
    if not isinstance(content, list) or len(content) != 2 or not isinstance(content[0], np.ndarray):
        raise ValueError("its pickle is not a pair of a latent and a label")
    return content[0], label_of(content[1])


def _standard(value: np.ndarray) -> np.ndarray:
    """float32 [C, H, W]; a leading axis of one is dropped. Raises `Unusable`."""
    if value.ndim == 4 and len(value) == 1:
        value = value[0]
    if value.ndim != 3 or value.dtype.kind != "f":
        raise Unusable("not a latent", f"{value.dtype} {list(value.shape)}, not float [C, H, W]")
    if value.shape[1] != value.shape[2]:
        raise Unusable("not square", " x ".join(map(str, value.shape)))
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise Unusable("not a latent", "has values that are not finite")
    return value


class _Npz:
    """Batches ``[N, C, H, W]`` in npz files; the last file read stays in memory."""

    def __init__(self, tree: Tree, labels: bool) -> None:
        self._tree = tree
        self._labels = labels
        self._lock = threading.Lock()
        self._last: tuple[str, np.ndarray] | None = None

    def contents(self, member: str) -> tuple[int, list[int] | None]:
        """Number of latents in a file, and their labels if it has them. Raises `Unusable`."""
        try:
            with self._tree.file(member) as file, Zip(file) as npz:
                entries = npz.by_name()
                info = entries[self._key(entries, VALUES) + ".npy"]
                with npz.open(info) as entry:
                    shape, _, dtype, start = npy_header(entry)
                npy_fits(shape, dtype, bounded(info.file_size, info.compress_size) - start)
                count = shape[0] if len(shape) == 4 else 1
                if not 1 <= count <= max(MOST, info.compress_size):
                    raise ValueError(f"{count} latents in {info.compress_size} bytes")
                key = next((key for key in LABELS if f"{key}.npy" in entries), None)
                if key is None:
                    self._look_for_labels(npz, entries, count)
                    return count, None
                labels = np.atleast_1d(read_npy(npz.content(entries[f"{key}.npy"])))
        except _BROKEN as error:
            raise Unusable("broken file", one_line(error)) from None
        if labels.dtype.kind not in "iu" or labels.shape != (count,):
            raise Unusable("broken file", f"labels must be {count} integers from 0")
        return count, [label_of(label) for label in labels.tolist()]

    def _look_for_labels(self, npz: Zip, entries: dict[str, zipfile.ZipInfo], count: int) -> None:
        """Raise ``ValueError`` where an array of another name could be the labels."""
        for name, info in entries.items():
            with npz.open(info) as entry:
                shape, _, dtype, _ = npy_header(entry)
            if self._labels and shape == (count,) and dtype.kind in "iu":
                raise ValueError(
                    f"its array {shown(name)} looks like labels: call it labels, or set labels: "
                    "false"
                )

    @staticmethod
    def _key(names: Iterable[str], keys: tuple[str, ...]) -> str:
        names = list(names)
        found = next((key for key in keys if f"{key}.npy" in names), None)
        if found is None and len(names) == 1 and names[0].endswith(".npy"):
            found = names[0][: -len(".npy")]
        if found is None:
            raise ValueError(f"no array called {' or '.join(keys)}")
        return found

    def get(self, member: str, row: int) -> np.ndarray:
        with self._lock:
            if self._last is None or self._last[0] != member:
                with self._tree.file(member) as file, Zip(file) as npz:
                    entries = npz.by_name()
                    value = read_npy(npz.content(entries[self._key(entries, VALUES) + ".npy"]))
                self._last = (member, value if value.ndim == 4 else value[None])
            return self._last[1][row]


def latents(settings: dict[str, Any], path: Path) -> Source:
    """Latents [C, H, W] (or [1, C, H, W]), one per ``.npy``; or [N, C, H, W] in ``.npz``.

    In an npz the array is called latents, moments or arr_0 (or is the only one), with integer
    labels in labels or arr_1. Other labels: the sub-folder of an ``.npy``; the number stored with
    it (U-ViT's features); or, for DiT's features, the file of the same name in ``*_labels``
    beside ``*_features``.
    """
    tree = open_tree(path)
    try:
        return _open(settings, tree)
    except BaseException:
        tree.close()
        raise


def _open(settings: dict[str, Any], tree: Tree) -> Source:
    def is_latent(member: str) -> bool:
        return member.endswith((".npy", ".npz"))

    root, split = split_root(tree, settings["split"], is_latent)
    members = [m for m in tree.members if is_latent(m) and m.startswith(f"{root}/" if root else "")]
    if not members and not tree.problems:
        raise UserError(f"{tree.path}: no latents in it (looked for .npy and .npz)")

    folders = {m: m.rpartition("/")[0] for m in members}
    paired = any(folder.endswith("_labels") for folder in folders.values()) and all(
        folder.endswith(("_features", "_labels")) for folder in folders.values()
    )
    npz = _Npz(tree, settings["labels"])
    contents: dict[str, tuple[int, list[int] | None]] = {}
    problems = list(tree.problems)
    for member in members:
        try:
            if member.endswith(".npz"):
                contents[member] = npz.contents(member)
        except Unusable as error:
            problems.append(Problem(member, error.kind, error.detail))
    broken = {problem.name for problem in problems}
    used = {
        m for m in members if m not in broken and not (paired and folders[m].endswith("_labels"))
    }
    # Labels in the files count, not the folders.
    inside = paired or any(labels is not None for _, labels in contents.values())
    found = by_class(tree, root, split, settings["labels"] and not inside, used.__contains__)

    items: list[Item] = []
    for item in found.items:
        if item.key not in contents:
            items.append(item._replace(key=(item.key, None)))
            continue
        count, own = contents[item.key]
        labels = [item.label] * count if own is None else own
        items += [Item(f"{item.name}[{row}]", labels[row], (item.key, row)) for row in range(count)]

    def read(item: Item) -> tuple[np.ndarray, int | None]:
        member, row = item.key
        label = item.label
        try:
            if row is not None:
                return _standard(npz.get(member, row)), label
            value, own = _load_npy(tree.read(member))
            if paired:
                folder, _, base = member.rpartition("/")
                pair = f"{folder.removesuffix('_features')}_labels/{base}"
                own = _load_npy(tree.read(pair))[0] if pair in folders else np.empty(0)
                if own.size != 1:
                    raise Unusable("no label", f"{pair} is missing or not a class")
                own = label_of(own.item())
        except _BROKEN as error:
            raise Unusable("broken file", one_line(error)) from None
        if label is not None and own not in (None, label):
            raise Unusable("two labels", f"its folder says {label}, the file {own}")
        return _standard(value), label if own is None else own

    moments = (found.described or {}).get("moments") or any("-mean-std-" in m for m in members)
    return Source(
        items=items,
        read=read,
        description="latents",
        classes=found.classes,
        split=split,
        problems=[*problems, *found.problems],
        ignored=sum(not is_latent(member) for member in tree.members),
        latents=True,
        moments="mean_std" if moments else None,
        close=tree.close,
        labelling="from the files" if inside else found.labelling,
    )
