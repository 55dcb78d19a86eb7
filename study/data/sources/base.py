"""What every source offers, and how foreign image bytes become pixels."""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from study.data.reading import LABELS, is_label, one_line, shown

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Decoders that are asked: those of the image files that sources look for. Pillow has more, some
# of which start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF")


class Unusable(Exception):
    """An item that cannot become an entry: what kind of problem, and the particulars."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


class Problem(NamedTuple):
    """An unusable item of a source, for messages and the list of skipped items."""

    name: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{shown(self.name)} ({self.kind}: {shown(self.detail)})"


class Item(NamedTuple):
    """One image or latent: its name in messages, its label, and what ``read`` needs to find it."""

    name: str
    label: int | None = None
    key: Any = None


@dataclass
class Source:
    """A listed source, ready to be read item by item.

    Attributes
    ----------
    items
        In archive order. Listing must be cheap: nothing is decoded.
    read
        Item -> (image, label). The image is a PIL image or a uint8 array [H, W, C]; of a source of
        latents a float32 array [C, H, W]. Raises `Unusable`. Called from several threads.
    description
        What was read, without paths; it goes into the archive.
    classes
        Class names by label, or ``None``.
    split
        The part that was taken, where the source has parts.
    problems
        Items that listing already found unusable.
    ignored
        Number of files that are neither images nor expected (a readme, say).
    color
        Colour mode where the conversion names none.
    moments
        Latents only: how two stacked halves of the channels are to be read, or ``None``.
    labelling
        Where the labels come from, or why there are none, for people to read.
    """

    items: Sequence[Item]
    read: Callable[[Item], tuple[Any, int | None]]
    description: str
    classes: list[str] | None = None
    split: str | None = None
    problems: list[Problem] = field(default_factory=list)
    ignored: int = 0
    color: str = "rgb"
    latents: bool = False
    moments: str | None = None
    labelling: str = "from the source"
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def label_of(value: Any) -> int:
    """A label that a file gives. Raises `Unusable` where it is not the number of a class."""
    if not is_label(value):
        what = value if isinstance(value, int | float) else type(value).__name__
        raise Unusable("no label", f"{shown(what, 40)} is no class from 0 to {LABELS - 1}")
    return value


def _said_deep(data: bytes) -> str | None:
    """More than 8 bits per channel that the first bytes of a PNG or an AVIF speak of."""
    if data[:8] == PNG_SIGNATURE and data[24:25] == b"\x10":
        return "16 bits per channel"
    at = data.find(b"av1C", 0, 2**16) + 6
    if data[4:12] == b"ftypavif" and 6 <= at < len(data) and data[at] & 0x40:
        return "10 or 12 bits per channel"
    return None


def _deep(image: Image.Image) -> str | None:
    """More than 8 bits per channel, of which Pillow takes 8 without a word."""
    bits = 8
    if image.format == "TIFF":
        bits = max(np.atleast_1d(image.tag_v2.get(258, 1)))
    if image.format == "PPM":
        told = image.tile[0].args  # a mode, or mode and highest value
        bits = 16 if ";16" in told or (not isinstance(told, str) and told[1] > 255) else 8
    return f"{bits} bits per channel" if bits > 8 else None


def open_image(data: bytes) -> Image.Image:
    """Decode image bytes wholly; one still image of at most 8 bits per channel.

    Raises `Unusable`.
    """
    deep = _said_deep(data)
    try:
        with warnings.catch_warnings():
            # A size at which Pillow suspects a decompression bomb is an error, not a warning.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            frames = getattr(image, "n_frames", 1) if image.format not in ("JPEG", "MPO") else 1
            deep = deep or _deep(image)
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders of foreign bytes raise almost anything
        if deep:
            raise Unusable("unsupported mode", deep) from None
        detail = one_line(error)
        if isinstance(error, UnidentifiedImageError):
            detail = "not an image of a known format"
            if data[4:8] == b"ftyp" and data[8:12] != b"avif":  # phones' files under any name
                detail = f"{shown(data[8:12].decode('latin-1'))}, which is not read: save as PNG"
        raise Unusable("broken image", detail) from None
    if deep:
        raise Unusable("unsupported mode", deep)
    if frames > 1:
        raise Unusable("unsupported mode", f"animation of {frames} frames")
    return image


def decode(data: bytes, cmyk: bool = False) -> Image.Image:
    """Decode image bytes wholly into an 8-bit grey (L) or RGB image.

    Orientation tags and colour profiles are not applied, as in the tools whose archives these
    resemble. ``cmyk`` admits CMYK by Pillow's plain conversion. Raises `Unusable`.
    """
    return _eight_bit(open_image(data), cmyk)


def _eight_bit(image: Image.Image, cmyk: bool) -> Image.Image:
    mode = image.mode
    if "transparency" in image.info:
        raise Unusable("unsupported mode", f"{mode} with transparency")
    if mode in ("L", "RGB"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode == "P":
        return image.convert("RGB")
    if mode in ("RGBA", "LA"):
        if image.getchannel("A").getextrema()[0] < 255:
            raise Unusable("unsupported mode", f"{mode} with transparent pixels")
        return image.convert(mode[:-1])
    if mode == "CMYK" and cmyk:
        return image.convert("RGB")
    bits = "16 or 32 bits per channel" if mode.startswith(("I", "F")) else "not grey or RGB"
    raise Unusable("unsupported mode", f"{mode}, {bits}")


def to_image(array: np.ndarray) -> Image.Image:
    """A PIL image of a uint8 array [H, W, 1 or 3]."""
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
