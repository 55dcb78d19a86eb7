"""Image trees: plain folders (zipped or not), and the layouts of published datasets."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study.data.archive import IMAGE_SUFFIXES
from study.data.sources.base import Item, Problem, Source, decode
from study.data.sources.tree import Tree, open_tree
from study.files import UserError

# The part of a dataset that a folder's name stands for.
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# Either is the held-out part where the other is missing (AFHQ v1, ImageNet).
STAND_IN = {"test": "val", "val": "test"}


def is_image(member: str) -> bool:
    """Whether the name ends like an image file's."""
    return os.path.splitext(member)[1].lower() in IMAGE_SUFFIXES


def image_source(
    tree: Tree,
    items: list[Item],
    description: str,
    classes: list[str] | None = None,
    split: str | None = None,
    problems: list[Problem] | None = None,
    cmyk: bool = False,
) -> Source:
    """A source of the image files ``items`` (``key`` = member) of a tree."""
    if not items and not tree.problems and not problems:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{tree.path}: no images in it (looked for {suffixes})")
    return Source(
        items=items,
        read=lambda item: (decode(tree.read(item.key), cmyk), item.label),
        description=description,
        classes=classes,
        split=split,
        problems=tree.problems + (problems or []),
        ignored=sum(not is_image(member) for member in tree.members),
        close=tree.close,
    )


def _ancestors(folder: str) -> list[str]:
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def split_root(
    tree: Tree, split: str | None, content: Callable[[str], bool] = is_image
) -> tuple[str, str | None]:
    """The folder that holds the wanted part ("" = the top), and the part's name.

    ``None`` and "train" also accept a tree without parts, which is one training set. A folder
    called "train" among others that are not parts is taken for a class. Raises ``UserError``
    where the tree has other parts only, or the part in several places.
    """
    if split == "all":
        raise UserError(f"{tree.path}: folders are read one split at a time, so not 'all'")
    folders = {os.path.dirname(member) for member in tree.members if content(member)}
    filled = {folder for path in folders for folder in _ancestors(path)}
    siblings: dict[str, set[str]] = {}
    for folder in filled:
        siblings.setdefault(os.path.dirname(folder), set()).add(os.path.basename(folder).lower())
    found: dict[str, list[str]] = {}
    for folder in sorted(filled, key=lambda folder: (folder.count("/"), folder)):
        part = PARTS.get(os.path.basename(folder).lower())
        among_parts = siblings[os.path.dirname(folder)] <= PARTS.keys()
        if part and (among_parts or split not in (None, "train")):
            found.setdefault(part, []).append(folder)

    wanted = split or "train"
    if wanted not in found and STAND_IN.get(wanted) in found:
        wanted = STAND_IN[wanted]
    if wanted not in found:
        if not found and wanted == "train":
            return "", None
        there = ", ".join(sorted(found)) or "none"
        raise UserError(f"{tree.path}: no folder of the split {wanted!r} (splits there: {there})")
    # The shallowest folder: below it a class may have the same name.
    roots = [f for f in found[wanted] if f.count("/") == found[wanted][0].count("/")]
    if len(roots) > 1:
        raise UserError(
            f"{tree.path}: several folders hold the split {wanted!r} ({', '.join(roots[:3])}): "
            "point the path at one dataset"
        )
    return roots[0], wanted


def by_class(
    tree: Tree, root: str, split: str | None, labels: bool
) -> tuple[list[Item], list[str] | None, list[Problem]]:
    """Images below ``root`` with the class that their folder gives them.

    Without a ``split`` the class folders may lie deeper, in one common folder (an archive that
    wraps everything in the dataset's name). Images in one folder only have no classes.
    """
    start = len(root) + 1 if root else 0
    images = [m for m in tree.members if is_image(m) and m.startswith(root + "/" if root else "")]
    if not labels or not images:
        return [Item(member, None, member) for member in images], None, []
    homes = {os.path.dirname(member) for member in images}
    filled = {folder for home in homes for folder in _ancestors(home)}
    if split is None:
        # A wholly empty folder beside a single class counts, or the class would pass for none.
        places = {os.path.dirname(member) for member in tree.members}
        used = {folder for place in places for folder in _ancestors(place)}
        empty = {f for f in tree.folders - used if os.path.dirname(f) in used | {""}}
        root = os.path.commonpath([f"/{folder}" for folder in homes | empty])[1:]
        start = len(root) + 1 if root else 0
    problems = [
        Problem(folder, "empty folder", "no images in it, so no such class")
        for folder in sorted(tree.folders - filled)
        if os.path.dirname(folder) == root
    ]
    names = [m[start:].split("/")[0] if "/" in m[start:] else None for m in images]
    classes = sorted({name for name in names if name is not None})
    if not classes:
        return [Item(member, None, member) for member in images], None, []
    loose = [m for m, name in zip(images, names, strict=True) if name is None]
    if loose:
        raise UserError(
            f"{tree.path}: {len(loose)} images lie beside the class folders, the first is "
            f"{loose[0]}: move them into one, or set labels: false"
        )
    number = {name: label for label, name in enumerate(classes)}
    pairs = zip(images, names, strict=True)
    return [Item(member, number[name], member) for member, name in pairs], classes, problems


def _closing(function: Any) -> Any:
    """Close the tree where opening the source fails."""

    def opened(settings: dict[str, Any], path: Path) -> Source:
        kind = settings["source"]
        tree = open_tree(path, kind if kind in ("folder", "zip", "tar") else None)
        try:
            return function(settings, tree)
        except BaseException:
            tree.close()
            raise

    opened.__doc__ = function.__doc__
    return opened


@_closing
def folder(settings: dict[str, Any], tree: Tree) -> Source:
    """A folder, zip or tar of images; sub-folders are classes, in sorted order.

    ``split`` takes the sub-folder of that name; a tree without such folders is one training set.
    """
    root, split = split_root(tree, settings["split"])
    items, classes, problems = by_class(tree, root, split, settings["labels"])
    return image_source(tree, items, "image folder", classes, split, problems)


@_closing
def imagenet(settings: dict[str, Any], tree: Tree) -> Source:
    """ImageNet: ``train/n01440764/*.JPEG``; classes are the sorted synset folders.

    The set has some CMYK files; they are converted plainly, as the published pipelines do.
    """
    root, split = split_root(tree, settings["split"])
    items, classes, problems = by_class(tree, root, split, settings["labels"])
    if settings["labels"] and items:
        strange = [name for name in classes or [] if not re.fullmatch(r"n\d{8}", name)]
        if classes is None or strange:
            what = f"found the folder {strange[0]!r}" if strange else "found images in one folder"
            raise UserError(
                f"{tree.path}: ImageNet's classes are folders like n01440764, but {what}: sort "
                "the images into such folders, or set labels: false"
            )
    return image_source(tree, items, "ImageNet", classes, split, problems, cmyk=True)


@_closing
def afhq(settings: dict[str, Any], tree: Tree) -> Source:
    """AFHQ (v1 or v2): ``train/{cat,dog,wild}``; held-out part ``test`` (v2) or ``val`` (v1)."""
    root, split = split_root(tree, settings["split"])
    items, classes, problems = by_class(tree, root, split, settings["labels"])
    strange = sorted(set(classes or []) - {"cat", "dog", "wild"})
    if strange:
        raise UserError(f"{tree.path}: AFHQ's classes are cat, dog and wild; found {strange[0]!r}")
    return image_source(tree, items, "AFHQ", classes, split, problems)


def numbered(
    tree: Tree, split: str, ranges: dict[str, tuple[int, int]], description: str
) -> Source:
    """Unlabelled images whose file names are numbers; a split is a range of numbers."""
    if split not in ranges:
        raise UserError(f"{description} has no split {split!r}: choose {', '.join(ranges)}")
    low, high = ranges[split]
    items, problems = [], []
    for member in filter(is_image, tree.members):
        stem = os.path.splitext(member.rpartition("/")[2])[0]
        if not (stem.isascii() and stem.isdigit()):
            problems.append(Problem(member, "unknown name", "the file name is not a number"))
        elif low <= int(stem) <= high:
            items.append(Item(member, None, member))
    if not items and not problems and any(map(is_image, tree.members)):
        raise UserError(f"{tree.path}: no images of the split {split!r} (numbers {low} to {high})")
    return image_source(tree, items, description, None, split, problems)


@_closing
def celeba(settings: dict[str, Any], tree: Tree) -> Source:
    """CelebA, aligned and cropped (``img_align_celeba/000001.jpg``), without labels.

    Splits are the official partition, which is by number: train 1-162770, val 162771-182637,
    test 182638-202599. Use ``crop: celeba`` for the published crop.
    """
    ranges = {
        "train": (1, 162770),
        "val": (162771, 182637),
        "test": (182638, 202599),
        "all": (1, 202599),
    }
    aligned = [m for m in tree.members if "img_align_celeba" in m.split("/")[:-1]]
    if aligned:  # the folder may hold the images in the wild and other files too
        tree.members = aligned
    return numbered(tree, settings["split"] or "train", ranges, "CelebA")


@_closing
def ffhq(settings: dict[str, Any], tree: Tree) -> Source:
    """FFHQ (``00000/00000.png``), without labels.

    Splits are the official ones by number: train 0-59999, val (also called test) 60000-69999;
    all 70000, the default, is what published FIDs use.
    """
    ranges = {"all": (0, 69999), "train": (0, 59999), "val": (60000, 69999), "test": (60000, 69999)}
    return numbered(tree, settings["split"] or "all", ranges, "FFHQ")
