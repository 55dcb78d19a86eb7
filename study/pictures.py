"""Samples laid out as a picture, whatever they were made of. No heavy imports."""

import math
from collections.abc import Collection

import numpy as np
from PIL import Image


def crossed(height: int, width: int, channels: int) -> np.ndarray:
    """What stands where a sample is not finite: a grey square with both diagonals, uint8 [H, W, C].

    No image is made of such a sample, and no network draws this one.
    """
    square = np.full((height, width, channels), 200, np.uint8)
    across = np.arange(width)
    down = across * height // width
    ink = (193, 18, 31) if channels == 3 else 90
    square[down, across] = ink
    square[down, width - 1 - across] = ink
    return square


def in_order(images: np.ndarray, absent: Collection[int], count: int) -> np.ndarray:
    """The first ``count`` samples in the order of their seeds, uint8 [n, H, W, C].

    ``images`` are those that are finite; the places of all others (``absent``) are crossed out.
    """
    total = min(count, len(images) + len(absent))
    places = np.setdiff1d(np.arange(total), list(absent))
    sheet = np.repeat(crossed(*images.shape[1:])[None], total, 0)
    sheet[places] = images[: len(places)]
    return sheet


def tile(images: np.ndarray, columns: int = 10, side: int = 640) -> Image.Image:
    """Lay uint8 images [n, H, W, C] out in rows, magnified by a whole number to about ``side``.

    White lines part the images, one sixteenth of an image wide (2 pixels at least).
    """
    count, height, width, channels = images.shape
    rows = max(1, math.ceil(count / columns))
    factor = max(1, side // (columns * width))
    high, wide = height * factor, width * factor
    gap = _gap(wide)
    shape = (rows * (high + gap) - gap, columns * (wide + gap) - gap, channels)
    sheet = np.full(shape, 255, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = row * (high + gap), column * (wide + gap)
        large = image.repeat(factor, 0).repeat(factor, 1)
        sheet[top : top + high, left : left + wide] = large
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def _gap(wide: int) -> int:
    return max(2, wide // 16)


def untile(picture: Image.Image, columns: int = 10) -> np.ndarray:
    """The places of a picture that :func:`tile` laid out from square images, still magnified.

    uint8 [n, side, side, C]; the places that were left over are white. Raises ``ValueError`` for a
    picture of other proportions.
    """
    sheet = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
    sheet = sheet if sheet.ndim == 3 else sheet[..., None]
    height, width = sheet.shape[:2]
    sides = (wide for wide in range(width // columns, 0, -1))
    side = next((s for s in sides if columns * (s + _gap(s)) - _gap(s) == width), None)
    if side is None or (height + _gap(side)) % (side + _gap(side)):
        raise ValueError(f"{width} x {height} pixels are no {columns} columns of squares")
    pace = side + _gap(side)
    starts = [(top, left) for top in range(0, height, pace) for left in range(0, width, pace)]
    return np.stack([sheet[top : top + side, left : left + side] for top, left in starts])
