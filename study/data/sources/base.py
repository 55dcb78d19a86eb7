"""What every source offers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from study.data.pixels import Unusable
from study.data.reading import LABELS, is_label, shown


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
