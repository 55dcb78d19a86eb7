"""Targets: what the denoiser learns to predict."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from study.spec.base import Shorthand, call, number, refuse_idle


class Target(Shorthand):
    """Target: dsm, stf or stf(size of the reference batch); or a mapping."""

    kind: Literal["dsm", "stf"] = Field(
        description="dsm: the clean image; stf: the posterior-weighted mean of a reference batch."
    )
    reference: int = Field(
        1024,
        ge=2,
        description="STF: images in the reference batch of a step, over all processes, the "
        "training batch included as its first rows.",
    )

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        kind, argument = call(text)
        if argument is None:
            return {"kind": kind}
        if kind != "stf":
            raise ValueError("only stf takes a number, as in stf(1024)")
        return {"kind": kind, "reference": int(number(argument, kind, int))}

    @model_validator(mode="after")
    def _acts(self) -> "Target":
        refuse_idle(self)
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        if self.kind == "dsm":
            yield "reference", "it belongs to stf"

    def __str__(self) -> str:
        return "dsm" if self.kind == "dsm" else f"stf({self.reference})"
