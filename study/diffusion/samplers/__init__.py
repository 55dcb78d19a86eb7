"""Samplers: from standard normal latents to images, on any denoiser D(x; sigma).

``sampler({"kind": "edm_heun", "steps": 18})`` builds one; the kinds and their options stand in
:mod:`study.diffusion.samplers.options`, which imports no torch. Samplers are loaded when asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from study.diffusion.samplers.options import OPTIONS, SamplerOptions, nfe, options

if TYPE_CHECKING:
    from study.diffusion.samplers.base import Sampler

REGISTRY: dict[str, str] = {
    "edm_heun": "study.diffusion.samplers.edm:EDMHeun",
    "edm_ablation": "study.diffusion.samplers.ablation:EDMAblation",
    "dpm_solver": "study.diffusion.samplers.dpm_solver:DPMSolver",
    "dpm_solver_pp": "study.diffusion.samplers.dpm_solver:DPMSolver",
    "euler_maruyama": "study.diffusion.samplers.euler_maruyama:EulerMaruyama",
    "ancestral": "study.diffusion.samplers.ancestral:Ancestral",
    "ddim": "study.diffusion.samplers.ancestral:DDIM",
}
"""Where the class of every kind lives, as ``module:Class``."""

__all__ = ["OPTIONS", "REGISTRY", "NoiseSource", "Sampler", "nfe", "options", "sampler"]


def sampler(spec: dict[str, Any] | SamplerOptions) -> "Sampler":
    """The sampler of ``{"kind": ..., ...}``. Raises ``UserError`` for unknown kinds and options."""
    chosen = options(spec)
    module, _, name = REGISTRY[chosen.kind].partition(":")
    return getattr(import_module(module), name)(chosen)


def __getattr__(name: str) -> Any:
    if name in ("NoiseSource", "Sampler"):
        return getattr(import_module("study.diffusion.samplers.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
