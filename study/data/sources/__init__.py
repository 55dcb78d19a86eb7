"""Sources that `study.data.convert` reads: one entry per kind, opened by one function each.

A new source is a function ``open(settings, path) -> Source`` and a line here. ``settings`` is the
resolved conversion (`study.data.convert.resolve`), ``path`` the source's path or ``None``.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from study.data.pixels import Unusable
from study.data.sources.base import Item, Problem, Source
from study.files import UserError

SOURCES = {
    "digits": "digits:digits",
    "folder": "trees:folder",
    "zip": "trees:folder",
    "tar": "trees:folder",
    "cifar10": "cifar10:cifar10",
    "imagenet": "trees:imagenet",
    "lsun": "lsun:lsun",
    "celeba": "trees:celeba",
    "ffhq": "trees:ffhq",
    "afhq": "trees:afhq",
    "latents": "latents:latents",
    "archive": "existing:archive",
}

__all__ = ["SOURCES", "Item", "Problem", "Source", "Unusable", "open_source"]


def open_source(settings: dict[str, Any], path: Path | None) -> Source:
    """Open the source that ``settings["source"]`` names; use it as a context manager."""
    module, function = SOURCES[settings["source"]].split(":")
    if path is None and settings["source"] != "digits":
        raise UserError(f"source {settings['source']} needs a path")
    return getattr(import_module(f"{__name__}.{module}"), function)(settings, path)
