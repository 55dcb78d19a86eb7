"""What a checkpoint says of its network, what the user adds, and what is assumed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from study.files import UserError, plain

State = Mapping[str, Tensor]


@dataclass
class Description:
    """A network and how it was trained, in the words of a spec.

    ``official`` holds what the official constructor was or would be told; ``assumed`` what neither
    file nor user said.
    """

    family: str
    options: dict[str, Any]
    resolution: int
    channels: int
    num_classes: int
    formulation: dict[str, Any]
    scaling: dict[str, Any] = field(default_factory=lambda: {"method": "none"})
    training: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    official: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """Shape and classes of the images that a network is for."""

    resolution: int
    channels: int
    num_classes: int


class Settings:
    """Options of one network, gathered from the file, from the user, and from the published.

    ``given`` is what the user (or a preset) says. Raises ``UserError`` where it contradicts the
    file, and in ``rest`` where nothing asked for it.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.assumed: dict[str, Any] = {}

    def read(self, key: str, value: Any) -> Any:
        """``value``, which the file holds."""
        if key in self.given and not _equal(said := self.given.pop(key), value):
            raise UserError(f"{key}: {json.dumps(said)} was given, but the file has {_text(value)}")
        return value

    def take(self, key: str, published: Any, quiet: bool = False) -> Any:
        """What was given for ``key``, which the file cannot tell; otherwise ``published``."""
        if key in self.given:
            return self.given.pop(key)
        if not quiet:
            self.assumed[key] = published
        return published

    def ignore(self, *keys: str) -> None:
        """Accept keys that have no effect."""
        for key in keys:
            self.given.pop(key, None)

    def done(self, known: set[str]) -> None:
        """Raise where something was given that this network has no use for."""
        if self.given:
            raise UserError(
                f"--options: {', '.join(sorted(self.given))}: unknown for this network; "
                f"allowed: {', '.join(sorted(known))}"
            )


def _text(value: Any) -> str:
    return json.dumps(plain(value))


def _equal(one: Any, other: Any) -> bool:
    return json.loads(_text(one)) == json.loads(_text(other))


def rows(state: State, key: str, axis: int = 0) -> int:
    """Length of one axis of a weight. Raises ``UserError`` where it is missing."""
    if key not in state or state[key].dim() <= axis:
        raise UserError(f"the file lacks {key}; it is no whole network")
    return state[key].shape[axis]


def numbers(state: State, prefix: str) -> set[int]:
    """Which of the numbered sub-modules ``prefix``0, ``prefix``1, ... have weights."""
    pattern = re.compile(rf"{re.escape(prefix)}([0-9]{{1,9}})\.")
    return {int(found[1]) for key in state if (found := pattern.match(key))}


def count(state: State, prefix: str) -> int:
    """How many numbered sub-modules ``prefix``0, ``prefix``1, ... there are.

    Raises ``UserError`` where one is missing: a number says nothing by itself.
    """
    found = numbers(state, prefix)
    missing = next((number for number in range(len(found)) if number not in found), None)
    if missing is not None:
        raise UserError(f"the file lacks {prefix}{missing}; it is no whole network")
    return len(found)


def classes(
    settings: Settings, labels: int, images: Images | None, said: int | None = None
) -> tuple[int, bool]:
    """Classes, and whether there is a null label, of a label table with ``labels`` rows.

    What the user says decides; 1000 and 1001 rows are ImageNet without and with a null label;
    otherwise the data set decides, and without one the last row is taken to be the null label.
    """
    if not labels:
        return 0, False
    number = said if said is not None else {1000: 1000, 1001: 1000}.get(labels)
    if number is None and images is not None:
        number = images.num_classes
    if number is None:
        number = labels - 1
        settings.assumed["classes"] = number
    if labels - number not in (0, 1):
        raise UserError(
            f"the file's label table has {labels} rows, but there are {number} classes; a network "
            f"for them has {number} or {number + 1}"
        )
    return number, labels > number


def whole_root(number: int, what: str) -> int:
    """The square root of a square number. Raises ``UserError`` otherwise."""
    root = round(max(number, 0) ** 0.5)
    if root * root != number or not number:
        raise UserError(f"{what}: {number} is not the square of a whole number")
    return root


def ratio(numerator: int, denominator: int) -> float:
    """A quotient; a whole one as an integer."""
    whole, remainder = divmod(numerator, denominator)
    return numerator / denominator if remainder else whole
