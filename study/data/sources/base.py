"""What every source offers, and how foreign image bytes become pixels."""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


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
        return f"{self.name} ({self.kind}: {self.detail})"


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
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def one_line(error: Exception) -> str:
    """An exception as one line without addresses."""
    return " ".join(str(error).split()) or type(error).__name__


def decode(data: bytes, cmyk: bool = False) -> Image.Image:
    """Decode image bytes wholly into an 8-bit grey (L) or RGB image.

    Orientation tags and colour profiles are not applied, as in the tools whose archives these
    resemble. ``cmyk`` admits CMYK by Pillow's plain conversion. Raises `Unusable`.
    """
    if data[:8] == PNG_SIGNATURE and data[24:25] == b"\x10":  # Pillow halves these silently
        raise Unusable("unsupported mode", "16 bits per channel")
    try:
        with warnings.catch_warnings():
            # A size at which Pillow suspects a decompression bomb is an error, not a warning.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            still = not getattr(image, "is_animated", False) or image.format in ("JPEG", "MPO")
            image.load()
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise Unusable("broken image", "not an image of a known format") from None
    except Exception as error:  # decoders of foreign bytes raise almost anything
        raise Unusable("broken image", one_line(error)) from None
    if not still:
        raise Unusable("unsupported mode", f"animation of {image.n_frames} frames")
    return _eight_bit(image, cmyk)


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
