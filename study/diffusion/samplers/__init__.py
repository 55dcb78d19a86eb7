"""Samplers: from standard normal latents to images, on any denoiser D(x; sigma).

``sampler({"kind": "edm_heun", "steps": 18})`` builds one; the kinds and their options stand in
:mod:`study.spec.samplers`, which imports no torch. Samplers are loaded when asked for.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from study.spec.base import implementation, of_kind
from study.spec.samplers import SAMPLERS, SamplerOptions

if TYPE_CHECKING:
    from study.diffusion.samplers.base import Sampler

__all__ = ["NoiseSource", "Sampler", "sampler"]


def sampler(options: Mapping[str, Any] | SamplerOptions) -> "Sampler":
    """The sampler of ``{"kind": ..., ...}``. Raises ``UserError`` for unknown kinds and options."""
    chosen = of_kind(SAMPLERS, options, "sampler")
    return implementation(chosen.implementation)(chosen)


def __getattr__(name: str) -> Any:
    if name in ("NoiseSource", "Sampler"):
        return getattr(import_module("study.diffusion.samplers.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
