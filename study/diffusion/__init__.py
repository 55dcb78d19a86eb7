"""Formulations: how noise levels are drawn, how a network becomes a denoiser, how the loss is made.

Nothing here imports torch until a formulation is asked for.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from study.spec.base import implementation, of_kind
from study.spec.formulations import FORMULATIONS, FormulationOptions

if TYPE_CHECKING:
    from study.diffusion.base import Formulation


def formulation(
    options: Mapping[str, Any] | FormulationOptions, noise_scale: float = 1.0
) -> "Formulation":
    """The formulation of `options`, or of a mapping such as ``{"kind": "edm", "sigma_data": 0.5}``.

    Options left out take their published values (`study.spec.formulations`). `noise_scale`
    multiplies the noise number that the network receives. Raises `UserError` for an unknown kind
    or option.
    """
    options = of_kind(FORMULATIONS, options, "formulation")
    return implementation(options.implementation)(options, noise_scale=noise_scale)


def formulations(options: FormulationOptions, noise_scale: float = 1.0) -> "list[Formulation]":
    """The formulations of a run's networks: one, or with `splits` one for each, in their order."""
    return [formulation(part, noise_scale) for part in options.parts]
