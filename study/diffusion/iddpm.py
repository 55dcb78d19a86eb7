"""The improved-DDPM member of the EDM family (Karras et al. 2022, table 1, column "iDDPM")."""

import math
from typing import Any

import torch
from torch import Tensor

from study.diffusion.edm import Coefficients, Preconditioned


def noise_table(M: int, C_1: float, C_2: float) -> Tensor:
    """Noise levels u_0 > u_1 > ... > u_M = 0, [M + 1] float64.

    u_{j-1} = sqrt((u_j^2 + 1) / max(abar(j-1) / abar(j), C_1) - 1) with the cosine schedule
    abar(j) = sin^2(pi/2 * j / (M (C_2 + 1))).
    """

    def abar(j: int) -> float:
        return math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2

    u = [0.0]
    for j in range(M, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(abar(j - 1) / abar(j), C_1) - 1))
    return torch.tensor(u[::-1], dtype=torch.float64)


class IDDPM(Preconditioned):
    """Noise levels from a table, uniform over its entries; the network predicts -noise.

    The network is told M - 1 - index of the nearest level. It has twice the image channels; the
    second half (a variance in improved DDPM) is not used. The EDM authors give this
    preconditioning for pretrained networks without a loss of its own: the loss here is that of
    their table 1, weight 1 / sigma^2 at uniform indices, without improved DDPM's variational term
    (the `ddpm` kind has that one).
    """

    kind = "iddpm"

    def __init__(self, options: Any, noise_scale: float = 1.0) -> None:
        super().__init__(options, noise_scale)
        self.u = noise_table(options.M, options.C_1, options.C_2).to(torch.float32)
        self.sigma_min = float(self.u[options.M - 1])
        self.sigma_max = float(self.u[0])

    def index(self, sigma: Tensor | float) -> Tensor:
        """Index 0..M of the nearest entry of the table, same shape, int64."""
        sigma = torch.as_tensor(sigma)
        if self.u.device != sigma.device:
            self.u = self.u.to(sigma.device)
        return (sigma.to(torch.float32)[..., None] - self.u).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest entry of the table, same shape and type."""
        sigma = torch.as_tensor(sigma)
        index = self.index(sigma)
        return self.u[index].to(sigma.dtype if sigma.is_floating_point() else torch.float32)

    def levels(self, draw: Tensor) -> Tensor:
        """u_j with j = floor(M u), u uniform in [0, 1)."""
        index = (draw * self.options.M).long().clamp(max=self.options.M - 1)
        return self.u.to(draw.device)[index].to(draw)

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2."""
        return 1 / sigma.square()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip 1, c_out -sigma, c_in 1 / sqrt(sigma^2 + 1), c_noise M - 1 - index."""
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=-sigma,
            input=1 / (sigma.square() + 1).sqrt(),
            noise=(self.options.M - 1 - self.index(sigma)).to(torch.float32),
        )
