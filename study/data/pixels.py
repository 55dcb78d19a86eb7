"""How foreign image bytes become pixels."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from study.data.reading import one_line, shown

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
