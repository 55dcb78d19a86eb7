"""Classifier-free guidance (Ho & Salimans 2022) as each paper of the study defines it.

========  ====================================================================================
kind      definition; s is the scale
========  ====================================================================================
edm       D_null + s (D_cond - D_null), on the clean image
uvit      e_cond + s (e_cond - e_null), on the noise: s = 0 is no guidance (U-ViT's scripts)
udit      e_null + s (e_cond - e_null) on the first three channels only; the fourth latent channel
          and the variance are those of the conditional pass (U-DiT's forward_with_cfg)
patch     e_null + s (e_cond - e_null) on all channels, variance from the conditional pass (Patch
          Diffusion, which converts x0 or v predictions to noise and back for it)
========  ====================================================================================

At a given x and noise level, noise, x0 and v are affine functions of one another with coefficients
that do not depend on the label, so mixing one mixes the others with the same weight: all four are
null + w (cond - null), whatever the network predicts. Patch Diffusion's conversion to noise and
back is made nevertheless, in the sampler's precision: in float32 it moves x0 by 1e-4 at the
noisiest steps (see the tests), in float64 it changes nothing.
"""

from typing import Any

import torch
from torch import Tensor

from study.diffusion.ddpm import eps_of_x0, v_of_x0, x0_of_eps
from study.files import UserError
from study.spec.formulations import FormulationOptions
from study.spec.guidance import GuidanceOptions, guidance_options


class Guided:
    """A guided denoiser D(x; sigma): two passes of ``denoiser``, with the label and without.

    Attributes other than the call are those of ``denoiser``. ``evaluations`` network evaluations
    make one of this.
    """

    evaluations = 2

    def __init__(self, denoiser: Any, options: GuidanceOptions, null_label: int) -> None:
        self.denoiser = denoiser
        self.options = options
        self.null_label = null_label

    def __getattr__(self, name: str) -> Any:
        if name == "denoiser":  # not yet set: while unpickling or copying
            raise AttributeError(name)
        return getattr(self.denoiser, name)

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """x = y + sigma n [B,C,H,W], sigma scalar or [B], label [B] -> clean image [B,C,H,W]."""
        null = self.null(label)
        with_label = self.denoiser(x, sigma, label, **conditioning)
        without = self.denoiser(x, sigma, null, **conditioning)
        return self.mix(with_label, without, x.shape[1])

    def null(self, label: Tensor | None) -> Tensor:
        """The null label for every image."""
        if label is None:
            raise UserError("guidance: needs class labels; the run was made without")
        return torch.full_like(label, self.null_label)

    def mix(self, with_label: Tensor, without: Tensor, channels: int) -> Tensor:
        """null + w (cond - null) on the guided ones of the first ``channels``; the rest is cond."""
        guided = min(self.options.guided_channels or channels, channels)
        null = without[:, :guided]
        mixed = null + self.options.weight * (with_label[:, :guided] - null)
        return torch.cat([mixed, with_label[:, guided:]], 1)


class GuidedSteps(Guided):
    """The same for a discrete denoiser, whose raw output at native steps is guided too."""

    def output(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """Raw output at x_t and steps t [B]: guided mean part, variance part of the label's."""
        null = self.null(label)
        with_label = self.denoiser.output(x, t, label, **conditioning).to(x.dtype)
        without = self.denoiser.output(x, t, null, **conditioning).to(x.dtype)
        made = self.denoiser.formulation
        if self.options.kind != "patch" or made.options.prediction == "eps":
            return self.mix(with_label, without, x.shape[1])

        def noise(output: Tensor) -> Tensor:
            clean = made.x0(output[:, : x.shape[1]], x, t)
            return eps_of_x0(made.schedule, x, t, clean)

        clean = x0_of_eps(
            made.schedule, x, t, self.mix(noise(with_label), noise(without), x.shape[1])
        )
        back = clean if made.options.prediction == "x0" else v_of_x0(made.schedule, x, t, clean)
        return torch.cat([back, with_label[:, x.shape[1] :]], 1)


def guided(denoiser: Any, guidance: float | dict | GuidanceOptions | None, null_label: int) -> Any:
    """The denoiser under guidance, or itself where guidance is ``None`` or changes nothing.

    ``guidance`` is ``{"kind": ..., "scale": ...}`` or a scale alone, which takes the kind of the
    denoiser's formulation; ``null_label`` is the number of classes.
    """
    options = guidance_options(guidance, formulation_of(denoiser))
    if options is None or options.evaluations == 1:
        return denoiser
    if null_label < 1:
        raise UserError("guidance: needs a class-conditional network; this one has no classes")
    kind = GuidedSteps if hasattr(denoiser, "output") else Guided
    return kind(denoiser, options, null_label)


def formulation_of(denoiser: Any) -> FormulationOptions | None:
    """The options of the denoiser's formulation, where it has one."""
    return getattr(getattr(denoiser, "formulation", None), "options", None)
