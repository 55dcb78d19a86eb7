"""Skip scalings: what is done to a long skip before it is fused.

A new one is a row here and, where its factors are constant, a function in ``study.skips``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from study.spec.base import Shorthand, call, number, refuse_idle


@dataclass(frozen=True)
class Scaling:
    """What is known of a skip scaling, whatever its numbers.

    ``label`` and ``colour`` are its look; ``keys`` belong to it alone, and a number in brackets is
    the first of them; ``learned``: its factors are gates that are trained, ``shared`` by long skips
    of equal shape or one for each.
    """

    label: str
    colour: str
    keys: tuple[str, ...] = ()
    learned: bool = False
    shared: bool = False


SCALINGS = {
    "none": Scaling("none", "#3d3d3d"),
    "inv_sqrt2": Scaling("1/√2", "#0072b2"),
    "cs": Scaling("CS", "#d55e00", ("kappa", "exponent", "innermost")),
    "ls": Scaling("LS", "#009e73", learned=True, shared=True),
    "ls_unshared": Scaling("LS unshared", "#cc79a7", learned=True),
}


class SkipScaling(Shorthand):
    """Skip scaling: none, inv_sqrt2, cs, cs(kappa), ls or ls_unshared; or a mapping."""

    method: Literal[tuple(SCALINGS)] = Field(  # type: ignore[valid-type]
        description="Factor on a long skip: 1, 2^(-1/2), kappa^(i-1), or a learned gate."
    )
    kappa: float = Field(
        0.7, gt=0, description="Base of constant scaling; ScaleLong's README advises 0.5 to 0.95."
    )
    exponent: Literal["per_skip", "per_level", "normalised"] = Field(
        "per_skip", description="What counts the power of kappa; per_skip is published."
    )
    innermost: float | None = Field(
        None, ge=0, description="With normalised: the power of kappa at the innermost skip."
    )

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        method, argument = call(text)
        if argument is None:
            return {"method": method}
        keys = SCALINGS[method].keys if method in SCALINGS else ()
        if not keys:
            raise ValueError("only cs takes a number, as in cs(0.7)")
        return {"method": method, keys[0]: number(argument, method, float)}

    @model_validator(mode="before")
    @classmethod
    def _named_alike(cls, value: Any) -> Any:
        """Factors of 1 are no scaling, however they are written: one setting has one name."""
        if isinstance(value, Mapping) and value.get("method") == "cs":
            flat = value.get("exponent") == "normalised" and value.get("innermost") == 0
            if value.get("kappa") == 1 or flat:
                return {"method": "none"}
        return value

    @model_validator(mode="after")
    def _complete(self) -> "SkipScaling":
        refuse_idle(self)
        if (self.exponent == "normalised") != (self.innermost is not None):
            raise ValueError("exponent: normalised and innermost go together")
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        for owner, row in SCALINGS.items():
            for key in row.keys if owner != self.method else ():
                yield key, f"it belongs to {owner}, not to {self.method}"

    @property
    def learned(self) -> bool:
        """Whether the factors are gates that are trained."""
        return SCALINGS[self.method].learned

    @property
    def shared(self) -> bool:
        """Whether long skips of equal shape have one gate."""
        return SCALINGS[self.method].shared

    def __str__(self) -> str:
        if not SCALINGS[self.method].keys:
            return self.method
        how = "" if self.exponent == "per_skip" else f", {self.exponent}"
        if self.innermost is not None:
            how += f" {self.innermost:g}"
        return f"{self.method}({self.kappa:g}{how})"


UNSCALED = SkipScaling(method="none")


def same_factors(scaling: SkipScaling, shapes: list[tuple[int, int]]) -> SkipScaling:
    """The plainest scaling that is the same on long skips of these widths and levels.

    On skips that all differ in shape ``ls`` shares no gate; of constant scalings the powers of
    kappa may all be 0, or 0, 1, 2, ... as those of ``per_skip``.
    """
    if scaling.method == "ls_unshared" and len(set(shapes)) == len(shapes):
        return SkipScaling(method="ls")
    if scaling.method != "cs":
        return scaling
    count = len(shapes)
    ranks = {level: rank for rank, level in enumerate(dict.fromkeys(level for _, level in shapes))}
    powers = {
        "per_skip": list(range(count)),
        "per_level": [ranks[level] for _, level in shapes],
        "normalised": [(scaling.innermost or 0) * i / max(count - 1, 1) for i in range(count)],
    }
    if not any(powers[scaling.exponent]):
        return UNSCALED
    if powers[scaling.exponent] == powers["per_skip"]:
        return SkipScaling(method="cs", kappa=scaling.kappa)
    return scaling
