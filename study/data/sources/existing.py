"""A dataset archive, ours or one made by EDM's or StyleGAN's tools, converted once more."""

from pathlib import Path
from typing import Any

import numpy as np

from study.data.archive import Archive
from study.data.pixels import Unusable
from study.data.sources.base import Item, Source
from study.files import UserError


def archive(settings: dict[str, Any], path: Path) -> Source:
    """Entries and labels of an existing archive, in its order."""
    if settings["split"] not in (None, "train"):
        raise UserError(f"{path}: an archive has no splits: leave split out")
    opened = Archive(path)
    labels = opened.labels

    def read(item: Item) -> tuple[np.ndarray, int | None]:
        try:
            return opened.images([item.key])[0], item.label
        except UserError as error:
            raise Unusable("broken image", str(error)) from None

    return Source(
        items=[
            Item(name, None if labels is None else int(labels[index]), index)
            for index, name in enumerate(opened.entries)
        ],
        read=read,
        description="dataset archive",
        classes=opened.classes,
        split=opened.meta.get("split"),
        color="keep",
        latents=opened.latents,
        moments="mean_std" if opened.moments else None,
        labelling="none: no dataset.json has any" if labels is None else "from dataset.json",
    )
