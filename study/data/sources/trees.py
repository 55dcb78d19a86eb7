"""Image trees: plain folders (zipped or not), and the layouts of published datasets."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from study.data.archive import IMAGE_SUFFIXES
from study.data.pixels import Unusable, decode
from study.data.reading import classes_of, dataset_json, json_size, labels_of, shown
from study.data.sources.base import Item, Problem, Source
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
# Names of folders that hold the images of one set, and no class.
PLAIN = {"images", "image", "imgs", "img", "pictures", "photos", "jpegimages", "data", "all"}
PREVIEWS = {"thumbs", "thumb", "thumbnails", "thumbnail", "previews", "preview"}
# Image files that are not read: each is named, since a class may consist of them.
UNREAD = frozenset(
    f".{suffix}"
    for suffix in (
        *("heic", "heif", "hif", "avifs", "avcs", "jxl", "jxr", "wdp", "jp2", "j2k", "j2c", "jpf"),
        *("jpx", "jpm", "jph", "apng", "qoi", "tga", "dds", "exr", "hdr", "pfm", "pam", "psd"),
        *("psb", "xcf", "pcx", "sgi", "svg", "eps", "ico", "dng", "cr2", "cr3", "nef", "arw"),
        *("orf", "rw2", "raf", "pef", "srw", "dcm", "nii", "fits", "fit", "fts"),
    )
)


def _suffix(member: str) -> str:
    return os.path.splitext(member)[1].lower()


def is_image(member: str) -> bool:
    """Whether the name ends like an image file's."""
    return _suffix(member) in IMAGE_SUFFIXES


def image_source(
    tree: Tree,
    items: list[Item],
    description: str,
    classes: list[str] | None = None,
    split: str | None = None,
    problems: Sequence[Problem] = (),
    cmyk: bool = False,
    root: str = "",
    labelling: str = "none: this source has none",
) -> Source:
    """A source of the image files ``items`` (``key`` = member) below ``root`` in a tree."""
    unread = [m for m in _below(tree.members, root) if _suffix(m) in UNREAD]
    problems = [*tree.problems, *problems] + [
        Problem(member, "unread format", "convert it to PNG or JPEG") for member in unread
    ]
    if not items and not problems:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{tree.path}: no images in it (looked for {suffixes})")
    return Source(
        items=items,
        read=lambda item: (decode(tree.read(item.key), cmyk), item.label),
        description=description,
        classes=classes,
        split=split,
        problems=problems,
        ignored=sum(not is_image(member) for member in tree.members) - len(unread),
        close=tree.close,
        labelling=labelling,
    )


def _below(members: Iterable[str], root: str) -> list[str]:
    return [member for member in members if not root or member.startswith(f"{root}/")]


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
        beside = siblings[os.path.dirname(folder)]
        several = len({PARTS[name] for name in beside & PARTS.keys()}) > 1
        if part and (
            beside <= PARTS.keys() or split not in ((None,) if several else (None, "train"))
        ):
            found.setdefault(part, []).append(folder)
        elif part and several and not found:
            raise UserError(
                f"{tree.path}: {shown(folder)} and other splits lie beside the folder "
                f"{shown(min(beside - PARTS.keys()))!r}: if they are splits, set split: {part}; if "
                "they are classes, give them other names"
            )

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
        listed = shown(", ".join(roots[:3]))
        raise UserError(
            f"{tree.path}: several folders hold the split {wanted!r} ({listed}): point the path at "
            "one data set; where these are classes, put the split above them (train/cat, not "
            "cat/train)"
        )
    return roots[0], wanted


class Sorted(NamedTuple):
    """Members with their labels, the names of the classes, and where both come from.

    ``described`` is the ``dataset.json`` that was followed.
    """

    items: list[Item]
    classes: list[str] | None
    labelling: str
    problems: Sequence[Problem] = ()
    described: dict[str, Any] | None = None


def _listed(tree: Tree, root: str, split: str | None, members: list[str]) -> Sorted | None:
    """Labels from a ``dataset.json`` beside or above all members, as EDM's tools write and read it.

    ``None`` where there is no such file; one without the key "labels" is something else.
    """
    common = os.path.commonpath([f"/{os.path.dirname(member)}" for member in members])[1:]
    for path in (m for m in tree.members if m.rpartition("/")[2] == "dataset.json"):
        folder = os.path.dirname(path)
        inside = not root or folder.startswith(f"{root}/")
        if folder not in ("", *_ancestors(common)) and not inside:
            continue  # of another split
        try:
            content = dataset_json(tree.read(path, json_size(len(members))))
            if "labels" not in content:
                continue
            if folder not in ("", *_ancestors(common)):
                raise ValueError(f"beside some of the images only: point the path at {folder}")
            by_name = labels_of(content)
            if by_name is None:
                items = [Item(member, None, member) for member in members]
                return Sorted(items, None, f"none: {path} has none", described=content)
            start = len(folder) + 1 if folder else 0
            labels = [by_name.get(member[start:]) for member in members]
            if None in labels:
                raise ValueError(
                    f"{labels.count(None)} of {len(members)} images have no label in it, the "
                    f"first is {shown(members[labels.index(None)])}"
                )
            if split is None and len(by_name) > len(members) and not tree.problems:
                raise ValueError(f"it names {len(by_name)} images, but there are {len(members)}")
            classes = classes_of(content, max(labels))
        except Unusable as error:
            raise UserError(f"{tree.path}: {shown(path)}: {error.detail}") from None
        except ValueError as error:
            raise UserError(f"{tree.path}: {shown(path)}: {error}") from None
        items = [Item(m, label, m) for m, label in zip(members, labels, strict=True)]
        return Sorted(items, classes, f"from {path}", described=content)
    return None


def _running(members: list[str]) -> bool:
    """Whether folders are parts of a running number (00001/img00001234.png, 01000/01234.png)."""
    for member in members:
        *_, folder, name = member.split("/")
        number = re.fullmatch(r"\D*([0-9]{1,18})", os.path.splitext(name)[0])
        if number is None or not re.fullmatch(r"[0-9]{5}", folder):
            return False
        thousand = int(number[1]) // 1000
        if int(folder) not in (thousand, 1000 * thousand):
            return False
    return True


def _top(tree: Tree, root: str, split: str | None, homes: set[str]) -> str:
    """The folder whose sub-folders are the classes."""
    if len(homes) > 1:
        return os.path.commonpath([f"/{home}" for home in homes])[1:]
    (home,) = homes
    if split is not None:  # below a split even a single folder is a class
        top = root
        for part in home[len(root) + 1 :].split("/"):
            if part.lower() not in PLAIN:
                return top
            top = f"{top}/{part}"
        return top
    # A wholly empty folder beside a single class counts, or the class would pass for none.
    used = {f for member in tree.members for f in _ancestors(os.path.dirname(member))}
    empty = {f for f in tree.folders - used if os.path.dirname(f) in used | {""}}
    return os.path.commonpath([f"/{folder}" for folder in {home} | empty])[1:]


def by_class(
    tree: Tree,
    root: str,
    split: str | None,
    labels: bool,
    content: Callable[[str], bool] = is_image,
) -> Sorted:
    """Images below ``root`` with the class that a ``dataset.json`` or their folder gives them.

    The class folders may lie deeper, in one common folder (an archive that wraps everything in
    the dataset's name). Images in one folder only have no classes. Class names that are numbers
    are in the order of the numbers. Raises ``UserError`` where it is not clear what the classes
    are.
    """
    images = [member for member in _below(tree.members, root) if content(member)]
    unlabelled = [Item(member, None, member) for member in images]
    if not labels or not images:
        return Sorted(unlabelled, None, "none: labels is false" if images else "none")
    listed = _listed(tree, root, split, images)
    if listed is not None:
        return listed
    homes = {os.path.dirname(member) for member in images}
    top = _top(tree, root, split, homes)
    if homes == {top}:
        return Sorted(unlabelled, None, "none: all lie in one folder")
    start = len(top) + 1 if top else 0
    loose = sorted(member for member in images if "/" not in member[start:])
    if loose:
        raise UserError(
            f"{tree.path}: {len(loose)} images lie beside the class folders, the first is "
            f"{shown(loose[0])}: move them into one, or set labels: false"
        )
    names = [member[start:].split("/")[0] for member in images]
    _check_classes(tree, set(names), {home[start:] for home in homes})
    if _running(images):
        raise UserError(
            f"{tree.path}: the folders are parts of a running number ({shown(images[0])}), not "
            "classes, and there is no dataset.json with labels beside them: set labels: false"
        )
    plain = all(re.fullmatch("[0-9]{1,18}", name) for name in names)
    classes = sorted(set(names), key=lambda name: (int(name), name) if plain else (0, name))
    filled = {folder for home in homes for folder in _ancestors(home)}
    problems = [
        Problem(folder, "empty folder", "no images in it, so no such class")
        for folder in sorted(tree.folders - filled)
        if os.path.dirname(folder) == top
    ]
    number = {name: label for label, name in enumerate(classes)}
    pairs = zip(images, names, strict=True)
    items = [Item(member, number[name], member) for member, name in pairs]
    return Sorted(items, classes, f"from the folders in {top}" if top else "from folders", problems)


def _check_classes(tree: Tree, names: set[str], homes: set[str]) -> None:
    """Raise ``UserError`` where folders are no plain list of classes."""
    below = {home.partition("/")[2]: home for home in sorted(homes, reverse=True)}
    if len(below) > 1:  # the same folder in each class (n01443537/images) is clear
        first, second = (shown(home, 60) for home in sorted(below.values())[:2])
        raise UserError(
            f"{tree.path}: class folders hold different folders of their own ({first}, {second}), "
            "so which of them are the classes is not clear: put all images of a class into one "
            "folder, point the path at one of them, or set labels: false"
        )
    alike: dict[str, str] = {}
    for name in sorted(names):
        if name.lower() in PREVIEWS:
            raise UserError(
                f"{tree.path}: the folder {shown(name)} beside the classes looks like previews of "
                "images: remove it, or give the class another name"
            )
        other = alike.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other != name:
            raise UserError(
                f"{tree.path}: the class folders {other!a:.80} and {name!a:.80} differ only in "
                "case, space or the spelling of a letter: rename one, or merge them"
            )


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


def _by_class_source(
    settings: dict[str, Any], tree: Tree, description: str, cmyk: bool = False
) -> Source:
    root, split = split_root(tree, settings["split"])
    found = by_class(tree, root, split, settings["labels"])
    return image_source(
        *(tree, found.items, description, found.classes, split, found.problems),
        cmyk=cmyk,
        root=root,
        labelling=found.labelling,
    )


@_closing
def folder(settings: dict[str, Any], tree: Tree) -> Source:
    """A folder, zip or tar of images with the labels of `by_class`.

    ``split`` takes the sub-folder of that name; a tree without such folders is one training set.
    """
    return _by_class_source(settings, tree, "image folder")


@_closing
def imagenet(settings: dict[str, Any], tree: Tree) -> Source:
    """ImageNet: ``train/n01440764/*.JPEG``; classes are the sorted synset folders.

    The set has some CMYK files; they are converted plainly, as the published pipelines do.
    """
    source = _by_class_source(settings, tree, "ImageNet", cmyk=True)
    if settings["labels"] and source.items:
        strange = [name for name in source.classes or [] if not re.fullmatch(r"n\d{8}", name)]
        if source.labelling.endswith("dataset.json"):
            raise UserError(f"{tree.path}: its labels are in a dataset.json: set source: archive")
        if source.classes is None or strange:
            what = f"found the folder {strange[0]!r}" if strange else "found images in one folder"
            raise UserError(
                f"{tree.path}: ImageNet's classes are folders like n01440764, but {what}: sort "
                "the images into such folders, or set labels: false"
            )
    return source


@_closing
def afhq(settings: dict[str, Any], tree: Tree) -> Source:
    """AFHQ (v1 or v2): ``train/{cat,dog,wild}``; held-out part ``test`` (v2) or ``val`` (v1)."""
    source = _by_class_source(settings, tree, "AFHQ")
    strange = sorted(set(source.classes or []) - {"cat", "dog", "wild"})
    if strange:
        raise UserError(f"{tree.path}: AFHQ's classes are cat, dog and wild; found {strange[0]!r}")
    return source


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
        if not re.fullmatch("[0-9]{1,9}", stem):
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
