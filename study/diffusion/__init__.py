"""Formulations: how noise levels are drawn, how a network becomes a denoiser, how the loss is made.

Nothing here imports torch until a formulation is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pydantic import ValidationError

from study.diffusion.options import OPTIONS
from study.files import UserError

if TYPE_CHECKING:
    from study.diffusion.base import Formulation

FORMULATIONS: dict[str, str] = {
    "edm": "study.diffusion.edm:EDM",
    "vp": "study.diffusion.vp:VP",
    "ve": "study.diffusion.ve:VE",
    "iddpm": "study.diffusion.iddpm:IDDPM",
    "vpsde": "study.diffusion.vpsde:VPSDE",
    "ddpm": "study.diffusion.ddpm:DDPM",
}


def formulation(spec: dict, noise_scale: float = 1.0) -> "Formulation":
    """The formulation of `spec`, e.g. ``{"kind": "edm", "sigma_data": 0.5}``.

    Options left out take their published values (`study.diffusion.options`). `noise_scale`
    multiplies the noise number that the network receives. Raises `UserError` for an unknown kind
    or option.
    """
    kind = spec.get("kind")
    if kind not in FORMULATIONS:
        known = ", ".join(FORMULATIONS)
        raise UserError(f"formulation: unknown kind {kind!r}; known kinds: {known}")
    try:
        options = OPTIONS[kind].model_validate(spec)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("formulation", *first["loc"]))
        got = f", got {first['input']!r}" if first["loc"] else ""
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}{got}") from None
    module, name = FORMULATIONS[kind].split(":")
    return getattr(import_module(module), name)(options, noise_scale=noise_scale)


def formulations(spec: dict, noise_scale: float = 1.0) -> "list[Formulation]":
    """The formulations of a run's networks: one, or with `splits` one for each, in their order."""
    if not spec.get("splits") or spec.get("split") is not None:
        return [formulation(spec, noise_scale)]
    parts = range(len(spec["splits"]) + 1)
    return [formulation({**spec, "split": part}, noise_scale) for part in parts]
