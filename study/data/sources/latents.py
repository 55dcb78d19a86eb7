"""Latents of an autoencoder: ``.npy`` or ``.npz`` files in a folder, zip or tar."""

import io
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from study.data.sources import pickles
from study.data.sources.base import Item, Problem, Source, Unusable, one_line
from study.data.sources.tree import Tree, open_tree
from study.data.sources.trees import split_root
from study.files import UserError

VALUES = ("latents", "moments", "arr_0")
LABELS = ("labels", "arr_1")


def _header(file: BinaryIO) -> tuple[int, ...]:
    """The shape that an ``.npy`` declares, without reading its values."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format")
    return read(file)[0]


def _load_npy(data: bytes) -> tuple[np.ndarray, int | None]:
    """A latent; U-ViT's feature files pair it with its label in one pickled object array."""
    file = io.BytesIO(data)
    try:
        return np.load(file, allow_pickle=False), None
    except ValueError as error:
        file.seek(0)
        if _header(file) != (2,):
            raise error from None
    value, label = pickles.load(file)
    return np.asarray(value), int(label)


def _standard(value: np.ndarray) -> np.ndarray:
    """float32 [C, H, W]; a leading axis of one is dropped. Raises `Unusable`."""
    if value.ndim == 4 and len(value) == 1:
        value = value[0]
    if value.ndim != 3 or value.dtype.kind != "f":
        raise Unusable("not a latent", f"{value.dtype} {list(value.shape)}, not float [C, H, W]")
    if value.shape[1] != value.shape[2]:
        raise Unusable("not square", " x ".join(map(str, value.shape)))
    if not np.isfinite(value).all():
        raise Unusable("not a latent", "has values that are not finite")
    return value.astype(np.float32)


class _Npz:
    """Batches ``[N, C, H, W]`` in npz files; the last file read stays in memory."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._lock = threading.Lock()
        self._last: tuple[str, np.ndarray] | None = None

    def contents(self, member: str) -> tuple[int, list[int] | None]:
        """Number of latents in a file, and their labels if it has them. Raises `Unusable`."""
        try:
            with self._tree.file(member) as file, zipfile.ZipFile(file) as npz:
                names = npz.namelist()
                with npz.open(self._key(names, VALUES) + ".npy") as entry:
                    shape = _header(entry)
                count = shape[0] if len(shape) == 4 else 1
                key = next((key for key in LABELS if f"{key}.npy" in names), None)
                if key is None:
                    return count, None
                labels = np.load(io.BytesIO(npz.read(f"{key}.npy")), allow_pickle=False)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise Unusable("broken file", one_line(error)) from None
        labels = np.atleast_1d(labels)
        if labels.dtype.kind not in "iu" or labels.shape != (count,) or labels.min() < 0:
            raise Unusable("broken file", f"labels must be {count} integers from 0")
        return count, [int(label) for label in labels]

    @staticmethod
    def _key(names: list[str], keys: tuple[str, ...]) -> str:
        found = next((key for key in keys if f"{key}.npy" in names), None)
        if found is None and len(names) == 1 and names[0].endswith(".npy"):
            found = names[0][: -len(".npy")]
        if found is None:
            raise KeyError(f"no array called {' or '.join(keys)}")
        return found

    def get(self, member: str, row: int) -> np.ndarray:
        with self._lock:
            if self._last is None or self._last[0] != member:
                with np.load(io.BytesIO(self._tree.read(member)), allow_pickle=False) as npz:
                    value = npz[self._key([f"{key}.npy" for key in npz.files], VALUES)]
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
    start = len(root) + 1 if root else 0
    members = [m for m in tree.members if is_latent(m) and m.startswith(f"{root}/" if root else "")]
    if not members and not tree.problems:
        raise UserError(f"{tree.path}: no latents in it (looked for .npy and .npz)")

    folders = {m: m.rpartition("/")[0] for m in members}
    features = [m for m in members if folders[m].endswith("_features")]
    paired = any(folder.endswith("_labels") for folder in folders.values()) and all(
        folder.endswith(("_features", "_labels")) for folder in folders.values()
    )
    if paired:
        members = features
    below = {m: m[start:].rpartition("/")[0].split("/")[0] for m in members}
    classes = None
    # Folders of numbers (00000/img00000000.npy) hold parts, not classes.
    if not paired and len(set(below.values())) > 1 and not all(map(str.isdigit, below.values())):
        classes = sorted(set(below.values()))
    number = {name: label for label, name in enumerate(classes or [])}

    npz = _Npz(tree)
    items: list[Item] = []
    problems = list(tree.problems)
    for member in members:
        label = number.get(below[member])
        if member.endswith(".npy"):
            items.append(Item(member, label, (member, None)))
            continue
        try:
            count, labels = npz.contents(member)
        except Unusable as error:
            problems.append(Problem(member, error.kind, error.detail))
            continue
        items += [
            Item(f"{member}[{row}]", label if labels is None else labels[row], (member, row))
            for row in range(count)
        ]
        if labels is not None:
            classes = None  # the numbers in the file count, not the folder

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
                own = int(_load_npy(tree.read(pair))[0].reshape(()) if pair in folders else -1)
                if own < 0:
                    raise Unusable("no label", f"{pair} is missing or not a class")
        except (OSError, ValueError, TypeError, EOFError, KeyError) as error:
            raise Unusable("broken file", one_line(error)) from None
        except (pickles.PickleError, zipfile.BadZipFile) as error:
            raise Unusable("broken file", one_line(error)) from None
        return _standard(value), label if own is None else own

    return Source(
        items=items,
        read=read,
        description="latents",
        classes=classes,
        split=split,
        problems=problems,
        ignored=sum(not is_latent(member) for member in tree.members),
        latents=True,
        moments="mean_std" if any("-mean-std-" in member for member in members) else None,
        close=tree.close,
    )
