"""Stable target field: the posterior-weighted mean of a reference batch as training target.

Xu, Tong & Jaakkola 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion
Models", equations 6 and 7, written for any formulation: for a noisy image x_t = a y + s n the
weights over the reference images r_j are softmax_j(-||x_t - a r_j||^2 / (2 s^2)) (sum of squares
over all pixels), and the stable clean image is sum_j w_j r_j.

Reference batch: the training images are its first rows (`reference_batch`), so that the image
that was noised is always among them.

Differences from the authors' code, on purpose:
- without augmentation their code writes the training images over the REST of the reference batch
  (an error, or silently a reference of copies); here the reference is used as it is given;
- a batch of one works (theirs collapses the noise level to a scalar and fails);
- distances come from one matrix product, so that memory is O(B n + n D) and not O(B n D).
"""

import torch
from torch import Tensor

CHUNK = 4096
"""Reference images handled at once: bounds the double-precision copy of the reference."""


def reference_batch(training: Tensor, rest: Tensor) -> Tensor:
    """The training images [B,C,H,W] followed by the other reference images [n-B,C,H,W]."""
    return torch.cat([training, rest.to(training)])


class StableTarget:
    """Stable clean images of noisy ones with respect to `reference` [n,C,H,W].

    Distances are ||x||^2 - 2 a x.r + a^2 ||r||^2 in double precision, about the mean of the
    reference: at sigma = 1e-3 the exponent divides the distance by 2e-6, which float32 sums over
    thousands of pixels cannot bear, whereas here the error of an exponent stays below 1e-5. No
    gradient flows. Calling it with x_t [B,C,H,W], a [B], s [B] (> 0) gives [B,C,H,W] in the type
    of x_t. References beyond `chunk` rows are handled in parts, with the same result up to
    rounding. Devices without double precision compute on the CPU.
    """

    def __init__(self, reference: Tensor, chunk: int = CHUNK) -> None:
        if reference.ndim < 2 or len(reference) == 0:
            raise ValueError("the reference must be [n, ...] with n >= 1")
        reference = reference.detach()
        self.device = torch.device("cpu") if reference.device.type == "mps" else reference.device
        self.reference = reference.flatten(1).to(self.device)
        self.chunk = chunk
        self.centre = self.reference.mean(0, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.reference)

    @torch.no_grad()
    def __call__(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Stable clean images [B,C,H,W] of x_t [B,C,H,W] with scale a [B] and noise s [B]."""
        query, a, s = self._query(x, a, s)
        # One pass: the maximum, the normaliser and the weighted sum are corrected chunk by chunk.
        peak = query.new_full((len(query), 1), -torch.inf)
        total = query.new_zeros(len(query), 1)
        mean = torch.zeros_like(query)
        for rows in self._chunks():
            log_weights = self._log_weights(query, rows, a, s)
            new_peak = torch.maximum(peak, log_weights.amax(1, keepdim=True))
            weights = (log_weights - new_peak).exp()
            shrink = (peak - new_peak).exp()
            total = total * shrink + weights.sum(1, keepdim=True)
            mean = mean * shrink + weights @ rows
            peak = new_peak
        return (mean / total + self.centre).reshape(x.shape).to(x)

    @torch.no_grad()
    def log_weights(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Exponents -||x_t - a r_j||^2 / (2 s^2), before normalisation, [B,n] float64."""
        query, a, s = self._query(x, a, s)
        return torch.cat([self._log_weights(query, rows, a, s) for rows in self._chunks()], 1)

    def weights(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Posterior weights over the reference, [B,n] float64; rows sum to one."""
        return self.log_weights(x, a, s).softmax(1)

    def _query(self, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.detach().flatten(1).to(self.device, torch.float64)
        a, s = (
            torch.as_tensor(value).detach().to(self.device, torch.float64).reshape(-1, 1)
            for value in (a, s)
        )
        return flat - a * self.centre, a, s

    def _chunks(self):
        for rows in self.reference.split(self.chunk):
            yield rows.to(torch.float64) - self.centre

    @staticmethod
    def _log_weights(query: Tensor, rows: Tensor, a: Tensor, s: Tensor) -> Tensor:
        distance = torch.addmm(a.square() * rows.square().sum(1), a * query, rows.T, alpha=-2)
        distance += query.square().sum(1, keepdim=True)
        return distance.clamp_(min=0).div_(-2 * s.square())
