"""The variance-preserving member of the EDM family (Karras et al. 2022, table 1, column "VP")."""

from typing import Any

import torch
from torch import Tensor

from study.diffusion.edm import Coefficients, Preconditioned


class VP(Preconditioned):
    """Noise levels of a linear VP schedule at uniform times; the network predicts -noise.

    The formulas are evaluated in the precision of their argument (float32 in training), because
    published networks were trained on the numbers that come out of that. At the smallest noise
    levels these differ from the exact ones (sigma by 2 per cent at t = 1e-5), consistently in
    noise, weight and noise number; the limits `sigma_min` and `sigma_max` are exact.
    """

    kind = "vp"

    def __init__(self, options: Any, noise_scale: float = 1.0) -> None:
        super().__init__(options, noise_scale)
        ends = torch.tensor([options.epsilon_t, 1.0], dtype=torch.float64)
        self.sigma_min, self.sigma_max = self.sigma_of_time(ends).tolist()

    def sigma_of_time(self, t: Tensor) -> Tensor:
        """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), t in (0, 1]."""
        integral = 0.5 * self.options.beta_d * t.square() + self.options.beta_min * t
        return (integral.exp() - 1).sqrt()

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma_of_time`."""
        beta_d, beta_min = self.options.beta_d, self.options.beta_min
        return ((beta_min**2 + 2 * beta_d * (1 + sigma.square()).log()).sqrt() - beta_min) / beta_d

    def levels(self, draw: Tensor) -> Tensor:
        """sigma at t = 1 + u (epsilon_t - 1), u uniform in [0, 1): u = 0 is the largest noise."""
        return self.sigma_of_time(1 + draw * (self.options.epsilon_t - 1))

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2."""
        return 1 / sigma.square()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip 1, c_out -sigma, c_in 1 / sqrt(sigma^2 + 1), c_noise (M - 1) t(sigma)."""
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=-sigma,
            input=1 / (sigma.square() + 1).sqrt(),
            noise=(self.options.M - 1) * self.time_of_sigma(sigma),
        )
