"""Discrete diffusion with fixed or learned variance: U-DiT's and Patch Diffusion's formulation.

Ho et al. 2020 ("DDPM"); Nichol & Dhariwal 2021 ("Improved DDPM") for learned variance and the
variational term; Luhman & Luhman 2022 ("Improving Diffusion Model Efficiency Through Patching")
for weights on the error of x_0 and signal-to-noise splits; Tian et al. 2024 ("U-DiTs") for plain
noise prediction. Timesteps are 0..T-1 and x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from study.diffusion.base import (
    Denoiser,
    Formulation,
    Loss,
    Network,
    Target,
    clean_target,
    column,
    noise_target,
    perturb,
)
from study.diffusion.schedules import Schedule, schedule, split_mask
from study.files import UserError


class Moments(NamedTuple):
    """p(x_{t-1} | x_t) as the network has it: mean, log variance, and the x_0 behind the mean.

    Each [B,C,H,W] (log_variance broadcastable to it where the variance is fixed).
    """

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


def x0_of_eps(table: Schedule, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_0 = x_t / sqrt(abar) - sqrt(1 / abar - 1) eps."""
    return table.at("inverse_signal", t, x) * x - table.at("sigma", t, x) * eps


def eps_of_x0(table: Schedule, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """eps = (x_t / sqrt(abar) - x_0) / sqrt(1 / abar - 1)."""
    return (table.at("inverse_signal", t, x) * x - x0) / table.at("sigma", t, x)


def x0_of_v(table: Schedule, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """x_0 = sqrt(abar) x_t - sqrt(1 - abar) v."""
    return table.at("signal", t, x) * x - table.at("noise", t, x) * v


def v_of_x0(table: Schedule, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """v = sqrt(abar) eps - sqrt(1 - abar) x_0, with the eps that belongs to x_0."""
    eps = eps_of_x0(table, x, t, x0)
    return table.at("signal", t, x) * eps - table.at("noise", t, x) * x0


def posterior_mean(table: Schedule, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0)."""
    first = table.at("posterior_mean_coef1", t, x)
    return first * x0 + table.at("posterior_mean_coef2", t, x) * x


def loss_weights(table: Schedule, weighting: str) -> Tensor:
    """Weight of the squared error of x_0 at each step, [T] float64 (Patch Diffusion)."""
    snr = table.snr
    return {
        "sqrt_snr": lambda: snr.sqrt(),
        "snr": lambda: snr,
        "snr+1": lambda: snr + 1,
        "truncated_snr": lambda: snr.clamp(min=1),
        "p2": lambda: snr * table.noise,
    }[weighting]()


def gaussian_kl(mean: Tensor, log_variance: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of N(mean, .) from N(mean2, .) per element, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance
        - 1
        + (log_variance - log_variance2).exp()
        + (mean - mean2).square() * (-log_variance2).exp()
    )


def decoder_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability, in nats, of the 8-bit bin around x0 in [-1, 1] under a Gaussian.

    Bins have half-width 1/255; the outermost ones extend to infinity. The normal distribution
    function is the tanh approximation of improved DDPM, whose numbers the losses follow.
    """

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + (math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)).tanh())

    inverse = (-0.5 * log_variance).exp()
    upper = cdf(inverse * (x0 - mean + 1 / 255))
    lower = cdf(inverse * (x0 - mean - 1 / 255))
    tiny = 1e-12
    inside = (upper - lower).clamp(min=tiny).log()
    lowest = upper.clamp(min=tiny).log()
    highest = (1 - lower).clamp(min=tiny).log()
    return torch.where(x0 < -0.999, lowest, torch.where(x0 > 0.999, highest, inside))


class DDPMDenoiser:
    """D(x; sigma) of a network trained on discrete steps, and its native views.

    A noise level is shown to the network as the nearest step; the image is scaled with the level
    itself, as in the EDM family's `iddpm`.
    """

    sigma_data = None

    def __init__(self, formulation: "DDPM", network: Network) -> None:
        self.formulation = formulation
        self.schedule = formulation.schedule
        self.network = network
        self.sigma_min = float(self.schedule.sigma[0])
        self.sigma_max = float(self.schedule.sigma[-1])

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """x = y + sigma n [B,C,H,W], sigma scalar or [B] -> clean image [B,C,H,W], float32."""
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma).to(x.device, torch.float32).reshape(-1)
        sigma = sigma.expand(len(x))
        signal = 1 / (1 + sigma.square()).sqrt()
        scaled = column(signal, x) * x
        output = self.output(scaled, self.schedule.nearest(sigma), label, **conditioning)
        mean = output[:, : x.shape[1]]
        prediction = self.formulation.options.prediction
        if prediction == "x0":
            return mean
        if prediction == "eps":
            return x - column(sigma, x) * mean
        return column(signal, x) * (scaled - column(sigma, x) * mean)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The noise level of the nearest step, same shape."""
        sigma = torch.as_tensor(sigma)
        kind = sigma.dtype if sigma.is_floating_point() else torch.float32
        return self.schedule.at("sigma", self.schedule.nearest(sigma)).to(kind)

    def output(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """The raw network output at x = x_t [B,C,H,W] and original steps t [B] int64, float32."""
        number = self.formulation.noise_number(t)
        return self.network(x.to(torch.float32), number, label, **conditioning).to(torch.float32)


class DDPM(Formulation):
    """Discrete diffusion; `options` as in `study.spec.formulations.DDPMOptions`.

    `schedule` holds the tables. With `splits`, only the steps of one split are drawn and the loss
    carries the share of those steps, as the importance weights of Patch Diffusion do.
    """

    kind = "ddpm"

    def __init__(
        self, options: Any, noise_scale: float = 1.0, table: Schedule | None = None
    ) -> None:
        super().__init__(options, noise_scale)
        if options.splits and options.split is None:
            raise UserError("formulation: splits needs split: the part that this loss is for")
        self.schedule = schedule(options.schedule, options.steps) if table is None else table
        self.timesteps = torch.arange(self.schedule.steps)
        if options.split is not None:
            mask = split_mask(self.schedule.snr, list(options.splits), options.split)
            self.timesteps = self.timesteps[mask]
            if len(self.timesteps) == 0:
                raise UserError(f"formulation: split {options.split} of {options.splits} is empty")
        self.share = len(self.timesteps) / self.schedule.steps
        if options.weighting != "uniform":
            self.weights = loss_weights(self.schedule, options.weighting).to(torch.float32)

    # Noise levels

    def levels(self, draw: Tensor) -> Tensor:
        """Steps t [B] int64, uniform over the (split's) steps, from u uniform in [0, 1)."""
        index = (draw * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)
        return self.timesteps.to(draw.device)[index]

    def sigma(self, level: Tensor) -> Tensor:
        """sqrt(1 / abar - 1), float32."""
        return self.schedule.at("sigma", level).to(torch.float32)

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(abar), sqrt(1 - abar)), float64."""
        return self.schedule.at("signal", level), self.schedule.at("noise", level)

    def noise_number(self, level: Tensor) -> Tensor:
        """The original step (times 1000 / T if asked) times noise_scale, float32."""
        number = self.schedule.at("timestep_map", level).to(torch.float32)
        if self.options.rescale_timesteps:
            number = number * (1000.0 / self.schedule.original_steps)
        return number * self.noise_scale

    def denoiser(self, network: Network) -> Denoiser:
        """The network as D(x; sigma), with its raw output at native steps."""
        return DDPMDenoiser(self, network)

    # What the network says (schedules other than the formulation's: respaced ones, in sampling)

    def split_output(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Mean part [B,C,H,W] and, with learned variance, the variance part [B,C,H,W]."""
        if self.options.variance == "learned":
            return output[:, :channels], output[:, channels : 2 * channels]
        return output[:, :channels], None

    def x0(
        self, mean_output: Tensor, x: Tensor, t: Tensor, table: Schedule | None = None
    ) -> Tensor:
        """x_0 from the mean part of the output at x_t; t are steps of `table`."""
        table = table or self.schedule
        if self.options.prediction == "eps":
            return x0_of_eps(table, x, t, mean_output)
        if self.options.prediction == "v":
            return x0_of_v(table, x, t, mean_output)
        return mean_output

    def log_variance(
        self, variance_output: Tensor | None, x: Tensor, t: Tensor, table: Schedule | None = None
    ) -> Tensor:
        """log variance of p(x_{t-1} | x_t), [B,C,H,W] if learned, else [B,1,1,1].

        Learned values interpolate log(posterior variance) and log(beta): "signed" ones v in
        [-1, 1] with +1 meaning beta (U-DiT), "unit" ones v in (0, 1) with 1 meaning the posterior
        variance (Patch Diffusion): opposite directions.
        """
        table = table or self.schedule
        small = table.at("posterior_log_variance_clipped", t, x)
        if self.options.variance == "fixed_small":
            return small
        if self.options.variance == "fixed_large":
            return table.at("large_log_variance", t, x)
        large = table.at("log_betas", t, x)
        if self.options.variance_values == "signed":
            fraction = (variance_output + 1) / 2
            return fraction * large + (1 - fraction) * small
        return variance_output * small + (1 - variance_output) * large

    def moments(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        table: Schedule | None = None,
        adjust: Callable[[Tensor], Tensor] | None = None,
    ) -> Moments:
        """p(x_{t-1} | x_t) from the raw output at x = x_t [B,C,H,W]; t [B] are steps of `table`.

        `adjust` maps the x_0 prediction (clipping, dynamic thresholding) before the mean.
        """
        table = table or self.schedule
        mean_output, variance_output = self.split_output(output, x.shape[1])
        x0 = self.x0(mean_output, x, t, table)
        if adjust is not None:
            x0 = adjust(x0)
        log_variance = self.log_variance(variance_output, x, t, table)
        return Moments(posterior_mean(table, x, t, x0), log_variance, x0)

    # Training

    def variational(
        self, images: Tensor, clean: Tensor, x: Tensor, t: Tensor, moments: Moments
    ) -> Tensor:
        """Variational term per element, in bits: the decoder's at t = 0, the KL elsewhere.

        It is the likelihood of the image itself, also with a stable target: a variance learned
        against the stable image would miss the spread of the images behind x_t. Where the mean
        learns from this term, its gradient is that of the stable image (`clean`).
        """
        table = self.schedule
        true_mean = posterior_mean(table, x, t, images)
        true_log_variance = table.at("posterior_log_variance_clipped", t, x)
        kl = gaussian_kl(true_mean, true_log_variance, moments.mean, moments.log_variance)
        if clean is not images and moments.mean.requires_grad:
            shift = true_mean - posterior_mean(table, x, t, clean)
            moved = moments.mean - moments.mean.detach()  # zero, with the gradient of the mean
            kl = kl + moved * shift * (-moments.log_variance).exp().detach()
        nll = -decoder_log_likelihood(images, moments.mean, moments.log_variance)
        return torch.where(column(t == 0, x) > 0, nll, kl) / math.log(2)

    def loss(
        self,
        network: Network,
        images: Tensor,
        draw: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        stable_target: Target | None = None,
        **conditioning: Any,
    ) -> Loss:
        """Error of the prediction (or weighted error of x_0) plus the variational term, mean."""
        return self.loss_at(
            self.levels(draw), network, images, noise, label, stable_target, **conditioning
        )

    def loss_at(
        self,
        t: Tensor,
        network: Network,
        images: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        stable_target: Target | None = None,
        **conditioning: Any,
    ) -> Loss:
        """`loss` at given steps t [B] int64.

        terms: "mse" and, with learned variance, "vb" (rescaled as the loss has it), or "vb" alone
        for the kl losses; before the share of the split.
        """
        a, s = self.scales(t)
        x = perturb(images, noise, a, s)
        clean = clean_target(images, x, a, s, stable_target)
        output = network(x, self.noise_number(t), label, **conditioning).to(torch.float32)
        mean_output, variance_output = self.split_output(output, x.shape[1])
        prediction, target = self.prediction_and_target(
            mean_output, images, noise, clean, x, t, a, s
        )
        kind = self.options.loss
        terms = {}
        if kind in ("kl", "rescaled_kl"):
            elements = self.variational(images, clean, x, t, self.moments(output, x, t))
            if kind == "rescaled_kl":
                elements = elements * self.schedule.steps
            terms["vb"] = elements.flatten(1).mean(1)
        else:
            elements = (prediction - target).square()
            if self.options.weighting != "uniform":
                elements = column(self.weights.to(t.device)[t], x) * elements
            terms["mse"] = elements.flatten(1).mean(1)
            if variance_output is not None:
                # The variational term trains the variance only.
                frozen = torch.cat([mean_output.detach(), variance_output], 1)
                vb = self.variational(images, images, x, t, self.moments(frozen, x, t))
                if kind == "rescaled_mse":
                    vb = vb * (self.schedule.steps / 1000)
                terms["vb"] = vb.flatten(1).mean(1)
                elements = elements + vb
        elements = elements * self.share
        return Loss(
            per_sample=elements.flatten(1).mean(1),
            level=t,
            sigma=self.sigma(t),
            elements=elements,
            target=target,
            prediction=prediction,
            clean=clean,
            noisy=x,
            terms=terms,
        )

    def prediction_and_target(
        self,
        mean_output: Tensor,
        images: Tensor,
        noise: Tensor,
        clean: Tensor,
        x: Tensor,
        t: Tensor,
        a: Tensor,
        s: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What is compared: x_0 under a weighting, the network's own quantity without one."""
        if self.options.weighting != "uniform" or self.options.prediction == "x0":
            return self.x0(mean_output, x, t), clean
        eps = noise_target(images, noise, clean, a, s)
        if self.options.prediction == "eps":
            return mean_output, eps
        return mean_output, column(a, x) * eps - column(s, x) * clean
