"""The bundled digits: 1797 real handwritten digits of 8 x 8 pixels, part of scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np

from study.data.sources.base import Item, Source
from study.files import UserError


def digits(settings: dict[str, Any], path: Path | None) -> Source:
    """Grey images whose levels 0..16 are scaled to 0..255 and rounded; labels 0 to 9."""
    if settings["split"] not in (None, "train", "all"):
        raise UserError(f"digits has no split {settings['split']!r}: it is one set of 1797 images")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("source digits needs the package scikit-learn") from None
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    labels = [int(label) for label in bunch.target]
    return Source(
        items=[Item(f"digit {index}", label, index) for index, label in enumerate(labels)],
        read=lambda item: (images[item.key], item.label),
        description="handwritten digits of scikit-learn (UCI optical recognition, test part)",
        classes=[str(name) for name in bunch.target_names],
        color="keep",
    )
