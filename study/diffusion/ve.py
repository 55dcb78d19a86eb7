"""The variance-exploding member of the EDM family (Karras et al. 2022, table 1, column "VE")."""

from typing import Any

import torch
from torch import Tensor

from study.diffusion.edm import Coefficients, Preconditioned


class VE(Preconditioned):
    """ln(sigma) uniform between the limits; the network sees the noisy image unscaled."""

    kind = "ve"

    def __init__(self, options: Any, noise_scale: float = 1.0) -> None:
        super().__init__(options, noise_scale)
        self.sigma_min = options.sigma_min
        self.sigma_max = options.sigma_max

    def levels(self, draw: Tensor) -> Tensor:
        """sigma_min (sigma_max / sigma_min)^u, u uniform in [0, 1)."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** draw

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2."""
        return 1 / sigma.square()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip 1, c_out sigma, c_in 1, c_noise ln(sigma / 2)."""
        one = torch.ones_like(sigma)
        return Coefficients(skip=one, out=sigma, input=one, noise=(0.5 * sigma).log())
