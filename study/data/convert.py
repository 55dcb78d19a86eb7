"""Convert a source of images or latents into a dataset archive.

The same source and settings give the same bytes: entries are in a fixed order with fixed dates,
images are PNG without compression, and nothing about machine, path or time is recorded.
"""

import json
import os
import sys
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from study.data.archive import Fingerprint, encode_npy, encode_png
from study.data.pixels import to_image
from study.data.sources import SOURCES, Item, Problem, Source, Unusable, open_source
from study.files import UserError, atomic, write_json

DEFAULTS: dict[str, Any] = {
    "name": None,
    "source": None,
    "path": None,
    "split": None,
    "resolution": None,
    "crop": "none",
    "resize": None,
    "color": None,
    "labels": True,
    "max_images": None,
    "on_error": "fail",
    "moments": None,
    "scale": 1.0,
    "channels": None,
    "classes": None,
    "note": "",
}
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
CHOICES = {
    "source": tuple(SOURCES),
    "split": (None, "train", "val", "test", "all"),
    "crop": ("none", "center", "center_dhariwal", "celeba"),
    "resize": (None, *FILTERS),
    "color": (None, "rgb", "grey", "keep"),
    "labels": (True, False),
    "on_error": ("fail", "skip"),
    "moments": (None, "mean_std", "mean_logvar"),
}
# What decides the archive's content, and is therefore recorded in it.
RECORDED = ("split", "resolution", "crop", "resize", "color", "labels", "max_images")
RECORDED_OF_LATENTS = ("split", "labels", "max_images", "moments", "scale")
# The published crop of aligned CelebA images (178 x 218): 128 x 128 around column 89, row 121.
CELEBA_SIZE = (178, 218)
CELEBA_BOX = (89 - 64, 121 - 64, 89 + 64, 121 + 64)
LISTED = 10
CHUNK = 16
WORTH_A_THREAD = 1e-3  # seconds per item


def resolve(spec: dict[str, Any]) -> dict[str, Any]:
    """The settings of a conversion with defaults filled in. Raises ``UserError``."""
    unknown = sorted(set(spec) - set(DEFAULTS))
    if unknown:
        known = ", ".join(DEFAULTS)
        raise UserError(f"dataset: unknown key {unknown[0]!r}; known are {known}")
    settings = DEFAULTS | {k: v for k, v in spec.items() if v is not None}
    for key, choices in CHOICES.items():
        if settings[key] not in choices:
            names = ", ".join("null" if c is None else str(c).lower() for c in choices)
            raise UserError(f"dataset: {key} is {settings[key]!r}, but must be one of {names}")
    for key in ("resolution", "max_images"):
        value = settings[key]
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"dataset: {key} is {value!r}, but must be a whole number from 1")
    if settings["crop"] == "center_dhariwal" and settings["resolution"] is None:
        raise UserError("dataset: crop center_dhariwal needs a resolution")
    if settings["resize"] is None:
        # U-ViT resizes its CelebA crops bilinearly.
        settings["resize"] = "bilinear" if settings["crop"] == "celeba" else "lanczos"
    settings["name"] = settings["name"] or settings["source"]
    return settings


def square(image: Image.Image, crop: str, resolution: int | None, resize: str) -> Image.Image:
    """Crop and resize an image to ``resolution`` x ``resolution`` (``None``: keep the size).

    ``center`` cuts the largest centred square, then resizes with the filter ``resize``;
    ``center_dhariwal`` is ADM's (Dhariwal & Nichol 2021): halve with a box filter while the
    shorter side stays at least ``resolution``, resize bicubically, then cut; ``celeba`` cuts the
    published window. Raises `Unusable` for images that do not come out square.
    """
    width, height = image.size
    if crop == "center_dhariwal":
        while min(image.size) >= 2 * resolution:
            image = image.resize((image.width // 2, image.height // 2), FILTERS["box"])
        factor = resolution / min(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        image = image.resize(size, FILTERS["bicubic"])
        left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
        return image.crop((left, top, left + resolution, top + resolution))
    if crop == "center" and width != height:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    elif crop == "celeba":
        if image.size != CELEBA_SIZE:
            raise Unusable("wrong size", f"{width} x {height}; aligned CelebA images are 178 x 218")
        image = image.crop(CELEBA_BOX)
    elif width != height:
        raise Unusable("not square", f"{width} x {height}; crop: center would cut a square")
    if resolution is not None and image.width != resolution:
        image = image.resize((resolution, resolution), FILTERS[resize])
    return image


def _image_maker(settings: dict[str, Any]) -> Callable[[Any], np.ndarray]:
    mode = {"rgb": "RGB", "grey": "L", "keep": None}[settings["color"]]

    def make(value: Any) -> np.ndarray:
        image = to_image(value) if isinstance(value, np.ndarray) else value
        if mode is not None and image.mode != mode:
            image = image.convert(mode)
        image = square(image, settings["crop"], settings["resolution"], settings["resize"])
        pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    return make


def _latent_maker(settings: dict[str, Any], moments: str | None) -> Callable[[Any], np.ndarray]:
    scale = np.float32(settings["scale"])

    def make(value: np.ndarray) -> np.ndarray:
        if moments is None:
            return value * scale
        if len(value) % 2:
            raise Unusable("not moments", f"{len(value)} channels cannot be halved")
        mean, spread = np.split(value, 2)
        if moments == "mean_logvar":
            # The range to which Stable Diffusion's autoencoder clips its log-variances.
            spread = np.exp(0.5 * np.clip(spread, -30.0, 20.0))
        return np.concatenate([mean * scale, spread * scale])

    return make


def _ordered(
    function: Callable[[Item], Any], items: Sequence[Item], workers: int | None
) -> Iterator[Any]:
    """``map`` on threads, in order, with a bounded number of results waiting.

    Decoding and resizing leave Python's lock, so threads suffice and nothing is copied. Small
    images gain nothing: without ``workers`` the first items tell whether threads would pay.
    """
    done, chunk = 0, CHUNK
    if workers is None:
        began = time.perf_counter()
        for item in items[:CHUNK]:
            yield function(item)
            done += 1
        spent = time.perf_counter() - began
        workers = min(16, _cores()) if spent > CHUNK * WORTH_A_THREAD else 1
        # The results that wait are few where they are large.
        chunk = min(CHUNK, max(1, int(CHUNK**2 * 20 * WORTH_A_THREAD / (spent + 1e-9))))
    if workers <= 1:
        yield from map(function, items[done:])
        return

    def run(start: int) -> list[Any]:
        return [function(item) for item in items[start : start + chunk]]

    starts = iter(range(done, len(items), chunk))
    with ThreadPoolExecutor(workers) as pool:
        try:
            waiting = deque(pool.submit(run, start) for start in islice(starts, 2 * workers))
            while waiting:
                results = waiting.popleft().result()
                waiting.extend(pool.submit(run, start) for start in islice(starts, 1))
                yield from results
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use."""
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available else os.cpu_count() or 1


def _summarise(problems: Sequence[Problem]) -> str:
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))


class _Problems:
    """Collects unusable items: up to a list's length where they are fatal, all where skipped."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.found: list[Problem] = []

    def add(self, problems: Iterable[Problem]) -> None:
        self.found += problems
        if not self.skip and len(self.found) > LISTED:
            self.fail("at least ")

    def fail(self, at_least: str = "") -> None:
        if self.found and not self.skip:
            listed = "; ".join(map(str, self.found[:LISTED]))
            rest = "; ..." if len(self.found) > LISTED else ""
            raise UserError(
                f"{at_least}{len(self.found)} item{'s' * (len(self.found) > 1)} cannot be used "
                f"({_summarise(self.found)}): {listed}{rest}. Repair or remove them, or set "
                "on_error: skip"
            )


def _spread(items: Sequence[Item], count: int | None) -> Sequence[Item]:
    """``count`` items evenly spaced in the order, so that no class of a sorted set is lost."""
    if count is None or count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]


def _zip_entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_STORED
    entry.create_system = 3  # the same on every system
    entry.external_attr = 0o100644 << 16
    return entry


def _write(
    file: zipfile.ZipFile,
    source: Source,
    settings: dict[str, Any],
    problems: _Problems,
    workers: int | None,
) -> dict[str, Any]:
    """Stream all usable items into ``file``; the content of ``dataset.json``."""
    moments = settings["moments"] or source.moments
    make = _latent_maker(settings, moments) if source.latents else _image_maker(settings)
    encode, suffix = (encode_npy, "npy") if source.latents else (encode_png, "png")

    def prepare(item: Item) -> tuple[Item, np.ndarray | None, int | None, Any]:
        try:
            value, label = source.read(item)
            value = make(value)
            if source.latents and not np.isfinite(value).all():
                raise Unusable("not a latent", "has values that are not finite once scaled")
        except Unusable as error:
            return item, None, None, Problem(item.name, error.kind, error.detail)
        if shape is not None and value.shape != shape:  # one item of a huge size is one too many
            return item, None, None, _mismatch(item, value.shape, shape, first, source.latents)
        return item, value, label, encode(value)

    fingerprint = Fingerprint()
    shape: tuple[int, ...] | None = None
    first = ""
    labels: list[tuple[str, int | None]] = []
    items = _spread(source.items, settings["max_images"])
    bar = tqdm(
        _ordered(prepare, items, workers),
        total=len(items),
        desc=f"convert {settings['name']}",
        unit=" images",
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )
    with bar:
        for item, value, label, encoded in bar:
            if value is None:
                problems.add([encoded])
                continue
            if shape is None:
                shape, first = value.shape, item.name
            if value.shape != shape:
                problems.add([_mismatch(item, value.shape, shape, first, source.latents)])
                continue
            if problems.found and not problems.skip:
                continue  # the rest is only read to name what else is unusable
            number = f"{len(labels):08d}"
            name = f"{number[:5]}/img{number}.{suffix}"
            file.writestr(_zip_entry(name), encoded)
            fingerprint.add(value)
            labels.append((name, label if settings["labels"] else None))
    problems.fail()
    if not labels:
        raise UserError(f"none of {len(items)} items can be used ({_summarise(problems.found)})")
    sizes = sum(problem.kind == "mixed size" for problem in problems.found)
    if sizes > len(labels):
        raise UserError(
            f"{sizes} images differ in size or channels from {first}, and only {len(labels)} "
            "agree: set resolution (and color)"
        )
    return _description(source, settings, shape, moments, labels, fingerprint)


def _labelling(source: Source, content: dict[str, Any]) -> str:
    """How many classes there are and where the labels come from, for people to read."""
    origin = source.labelling
    if content["labels"] is None:
        return origin if origin.startswith("none") else "none: labels is false"
    origin = "from the files" if origin.startswith("none") else origin
    return f"{len(content['classes'])} classes, {origin}"


def _mismatch(
    item: Item, shape: tuple[int, ...], expected: tuple[int, ...], first: str, latents: bool
) -> Problem:
    hint = "" if latents else "; resolution and color would make them agree"
    detail = " x ".join(map(str, shape)) + ", but " + first + " is "
    return Problem(item.name, "mixed size", detail + " x ".join(map(str, expected)) + hint)


def _description(
    source: Source,
    settings: dict[str, Any],
    shape: tuple[int, ...],
    moments: str | None,
    labels: list[tuple[str, int | None]],
    fingerprint: Fingerprint,
) -> dict[str, Any]:
    unlabelled = [name for name, label in labels if label is None]
    labelled = len(unlabelled) < len(labels)
    if labelled and unlabelled:
        raise UserError(
            f"{len(unlabelled)} of {len(labels)} entries have no label: label all, or set "
            "labels: false"
        )
    numbers = [label for _, label in labels] if labelled else None
    classes = source.classes if labelled else None
    if labelled and classes is None:
        classes = [str(number) for number in range(max(numbers) + 1)]
    channels = shape[0] if source.latents else shape[2]
    if settings["resolution"] not in (None, shape[1]):
        raise UserError(f"the latents are {shape[1]} wide, not {settings['resolution']}")
    recorded = {k: settings[k] for k in (RECORDED_OF_LATENTS if source.latents else RECORDED)}
    return {
        "name": settings["name"],
        "images": len(labels),
        "resolution": shape[1],
        "channels": channels // 2 if moments else channels,
        "kind": "latents" if source.latents else "images",
        "moments": moments is not None,
        "classes": classes,
        "source": {"kind": settings["source"], "description": source.description},
        "split": source.split,
        "conversion": recorded,
        "sha256": fingerprint.finish(numbers),
        "labels": [list(pair) for pair in labels] if labelled else None,
    }


def convert(
    spec: dict[str, Any],
    out: str | Path,
    source_path: str | Path | None = None,
    on_error: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Convert the source that ``spec`` (a study's dataset section) describes into ``out``.

    Parameters
    ----------
    spec
        ``source`` (one of `study.data.sources.SOURCES`) and, with these defaults: ``name``
        (source), ``path``, ``split`` (the source's), ``resolution`` (null: keep, all images must
        agree), ``crop`` (none, center, center_dhariwal, celeba), ``resize`` (lanczos, bicubic,
        bilinear, box; null: lanczos, or bilinear with crop celeba), ``color`` (rgb, grey, keep;
        null: rgb, or keep for digits and archives), ``labels`` (true), ``max_images`` (so many,
        evenly spaced in the source's order), ``on_error``. For latents ``moments`` (mean_std or
        mean_logvar: the channels are two stacked halves) and ``scale`` (a factor on the latents).
        ``channels`` and ``classes`` are what the result must have (null: whatever it has).
    source_path
        Where the source is; overrides ``spec["path"]``.
    on_error
        "fail": the first unusable items are named and nothing is written. "skip": they are left
        out and listed in ``<out>.skipped.json``. ``None``: as ``spec`` says.
    workers
        Threads that decode and resize; ``None`` for one per available core (at most 16), or one
        for images so small that threads cost more. The bytes do not depend on it.

    Returns the summary: name, images, skipped, skipped_file, ignored (files of other kinds),
    resolution, channels, kind, classes (their number), labels (where they come from, in words),
    sha256 (of the content), bytes, seconds.
    Raises ``UserError``.
    """
    began = time.monotonic()
    settings = resolve(dict(spec) | ({} if on_error is None else {"on_error": on_error}))
    path = source_path if source_path is not None else settings["path"]
    path = None if path is None else Path(path).expanduser()
    out = Path(out)
    problems = _Problems(settings["on_error"] == "skip")
    try:
        with open_source(settings, path) as source, atomic(out) as temporary:
            if settings["color"] is None:
                settings["color"] = source.color
            problems.add(source.problems)
            problems.fail()
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
                content = _write(file, source, settings, problems, workers)
                text = json.dumps(content, sort_keys=True, separators=(",", ":"))
                file.writestr(_zip_entry("dataset.json"), text)
            if settings["channels"] not in (None, content["channels"]):
                raise UserError(
                    f"the images have {content['channels']} channels, not "
                    f"{settings['channels']}: see color"
                )
            classes = len(content["classes"] or [])
            if settings["classes"] not in (None, classes):
                raise UserError(f"the labels have {classes} classes, not {settings['classes']}")
            skipped_file = _list_skipped(out, settings["name"], problems.found)
    except UserError as error:
        raise UserError(f"dataset {settings['name']}: {error}") from None
    return {
        **{key: content[key] for key in ("name", "images", "resolution", "channels", "kind")},
        "classes": len(content["classes"] or []),
        "labels": _labelling(source, content),
        "sha256": content["sha256"],
        "skipped": len(problems.found),
        "skipped_file": skipped_file,
        "ignored": source.ignored,
        "bytes": out.stat().st_size,
        "seconds": round(time.monotonic() - began, 3),
    }


def _list_skipped(out: Path, name: str, problems: Sequence[Problem]) -> str | None:
    """Write the list of skipped items beside the archive; remove an older one if there are none."""
    path = Path(f"{out}.skipped.json")
    if not problems:
        path.unlink(missing_ok=True)
        return None
    counts = Counter(problem.kind for problem in problems)
    items = [{"name": p.name, "problem": p.kind, "detail": p.detail} for p in problems]
    write_json(path, {"dataset": name, "skipped": len(items), "counts": counts, "items": items})
    return str(path)
