"""Guidance, and what it and a sampler cost in network evaluations."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from study.files import UserError
from study.spec.base import Model, of_kind, one_line
from study.spec.formulations import FormulationOptions
from study.spec.samplers import SAMPLERS, SamplerOptions


class GuidanceOptions(Model):
    """Classifier-free guidance as each paper defines it; ``s`` is the scale."""

    kind: Literal["edm", "uvit", "udit", "patch"] = Field(
        default="edm",
        description="edm: D_null + s (D_cond - D_null). uvit: e_cond + s (e_cond - e_null) on the "
        "noise e, so that 0 is no guidance. udit: e_null + s (e_cond - e_null) on the first three "
        "channels only. patch: the same on all channels, variance from the conditional pass.",
    )
    scale: float = Field(description="Strength s. No guidance is 0 for uvit and 1 for the others.")
    channels: int | None = Field(
        default=None,
        ge=1,
        description="How many of the first channels are guided; null: three for udit, else all.",
    )

    @property
    def weight(self) -> float:
        """w of null + w (cond - null), the common form of all four."""
        return self.scale + 1 if self.kind == "uvit" else self.scale

    @property
    def guided_channels(self) -> int | None:
        """Number of leading channels that are guided, ``None`` for all."""
        return 3 if self.kind == "udit" and self.channels is None else self.channels

    @property
    def evaluations(self) -> int:
        """Network evaluations per denoiser evaluation: one where guidance changes nothing."""
        return 1 if self.weight == 1 else 2


def guidance_options(
    content: float | Mapping[str, Any] | GuidanceOptions | None,
    formulation: FormulationOptions | None = None,
) -> GuidanceOptions | None:
    """The checked options of guidance, or ``None``. Raises ``UserError`` on one line.

    A number is a scale; its kind is that of the formulation.
    """
    if content is None or isinstance(content, GuidanceOptions):
        return content
    if isinstance(content, int | float):
        content = {"scale": content}
    kind = formulation.guidance if formulation else "edm"
    try:
        return GuidanceOptions.model_validate({"kind": kind, **content})
    except ValidationError as error:
        raise UserError(f"guidance: {one_line(error)}") from None


def nfe(
    sampler: Mapping[str, Any] | SamplerOptions,
    guidance: float | Mapping[str, Any] | GuidanceOptions | None = None,
    formulation: FormulationOptions | None = None,
) -> int:
    """Network evaluations per image of a sampler, guidance counted, without torch.

    ``formulation`` matters for guidance that is a bare scale, and for a discrete sampler without
    respacing on a discrete formulation.
    """
    guided = guidance_options(guidance, formulation)
    steps = formulation.discrete_steps if formulation else None
    walked = of_kind(SAMPLERS, sampler, "sampler").evaluations(steps)
    return walked * (guided.evaluations if guided else 1)
