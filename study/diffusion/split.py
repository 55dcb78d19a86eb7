"""Several networks that share the noise levels of one denoiser (Luhman & Luhman 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from study.diffusion.schedules import Schedule, split_models
from study.files import UserError


class SplitDenoiser:
    """Several networks, each for its part of the steps: model 0 has the least noise.

    Model j takes the steps whose signal-to-noise ratio lies in (bound[j+1], bound[j]], with the
    bounds infinity, ``splits`` descending, 0 (Patch Diffusion).
    """

    def __init__(self, denoisers: Sequence[Any], splits: Sequence[float]) -> None:
        if len(denoisers) != len(splits) + 1:
            raise UserError(
                f"splits: {len(splits)} bounds make {len(splits) + 1} models, got {len(denoisers)}"
            )
        self.denoisers = list(denoisers)
        self.splits = list(splits)
        self.formulation = denoisers[0].formulation
        self.schedule: Schedule = denoisers[0].schedule
        self.sigma_data = None
        self.sigma_min = min(denoiser.sigma_min for denoiser in denoisers)
        self.sigma_max = max(denoiser.sigma_max for denoiser in denoisers)
        self.models = split_models(self.schedule.snr, self.splits)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the networks know."""
        return self.denoisers[0].round_sigma(sigma)

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """D(x; sigma) of the model in charge; sigma must be one number."""
        step = self.schedule.nearest(torch.as_tensor(sigma).flatten()[:1])
        return self._at(step)(x, sigma, label, **conditioning)

    def output(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """Raw output at x_t of the model in charge; all of t [B] must be one step."""
        return self._at(t[:1]).output(x, t, label, **conditioning)

    def _at(self, step: Tensor) -> Any:
        return self.denoisers[int(self.models[int(step)])]
