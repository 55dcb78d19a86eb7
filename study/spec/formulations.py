"""Options of the formulations, checked without importing torch.

Each model lists the options of one formulation with the published values as defaults, so that a
configuration can be validated, completed and documented without the numerical libraries.
`FORMULATIONS` maps the `kind` of a formulation to its model.
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from study.files import UserError
from study.spec.base import Options, kinds
from study.spec.steps import (
    Sigma,
    Steps,
    check_betas,
    check_noise,
    linear_end,
    summed_betas,
)


class FormulationOptions(Options):
    """What the options of every formulation have in common."""

    @property
    def guidance(self) -> str:
        """The kind of guidance that goes with it."""
        return "edm"

    @property
    def discrete_steps(self) -> int | None:
        """Steps of a discrete process, ``None`` of any other."""
        return None

    @property
    def parts(self) -> list["FormulationOptions"]:
        """The formulations of a run's networks: itself, or one for each split in their order."""
        return [self]

    @property
    def output_multiplier(self) -> int:
        """Output channels that the network needs for each image channel."""
        return 1


def _as_value_error(check: Callable[..., None], *arguments: Any) -> None:
    """Call a check whose ``UserError`` becomes the ``ValueError`` that models speak."""
    try:
        check(*arguments)
    except UserError as error:
        raise ValueError(str(error)) from None


class EDMOptions(FormulationOptions):
    """EDM preconditioning, noise distribution and loss (Karras et al. 2022, table 1)."""

    implementation = "study.diffusion.edm:EDM"
    kind: Literal["edm"] = "edm"
    P_mean: float = Field(-1.2, description="Mean of ln(sigma) in training.")
    P_std: float = Field(1.2, gt=0, description="Standard deviation of ln(sigma) in training.")
    sigma_data: Sigma = Field(0.5, description="Standard deviation of the data.")
    sigma_min: float = Field(
        0.0, ge=0, le=1e6, description="Smallest noise level the denoiser supports."
    )
    sigma_max: Sigma | None = Field(
        None, description="Largest noise level the denoiser supports; null: no limit."
    )

    @model_validator(mode="after")
    def _ordered(self):
        if self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min must be smaller than sigma_max")
        if abs(self.P_mean) + 6 * self.P_std > 30:
            raise ValueError(
                f"P_mean {self.P_mean:g} and P_std {self.P_std:g} draw noise levels that single "
                "precision does not have: |P_mean| + 6 P_std may be up to 30"
            )
        return self


class VPOptions(FormulationOptions):
    """Variance-preserving preconditioning of the EDM family."""

    implementation = "study.diffusion.vp:VP"
    kind: Literal["vp"] = "vp"
    beta_d: float = Field(19.9, ge=1e-3, description="Extent of the noise schedule.")
    beta_min: float = Field(0.1, gt=0, description="Initial slope of the noise schedule.")
    M: Steps = Field(1000, description="Number of discrete steps behind the noise number.")
    epsilon_t: float = Field(1e-5, gt=0, lt=1, description="Smallest time in training.")

    @model_validator(mode="after")
    def _resolved(self):
        if self.epsilon_t * self.beta_min < 2e-7:
            raise ValueError(
                "epsilon_t * beta_min must be 2e-7 or more: float32 sees no noise below"
            )
        _as_value_error(check_noise, self.beta_d / 2 + self.beta_min, "beta_d and beta_min")
        return self


class VEOptions(FormulationOptions):
    """Variance-exploding preconditioning of the EDM family."""

    implementation = "study.diffusion.ve:VE"
    kind: Literal["ve"] = "ve"
    sigma_min: Sigma = Field(0.02, description="Smallest noise level.")
    sigma_max: Sigma = Field(100.0, description="Largest noise level.")

    @model_validator(mode="after")
    def _ordered(self):
        if self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min must be smaller than sigma_max")
        return self


class IDDPMOptions(FormulationOptions):
    """Improved-DDPM preconditioning of the EDM family: a table of noise levels."""

    implementation = "study.diffusion.iddpm:IDDPM"
    kind: Literal["iddpm"] = "iddpm"
    C_1: float = Field(0.001, ge=1e-6, lt=1, description="Lower limit of one step's signal ratio.")
    C_2: float = Field(0.008, ge=0, le=10, description="Offset of the cosine schedule.")
    M: Steps = Field(1000, description="Number of noise levels.")
    variance_channels: bool = Field(
        True,
        description="The network has twice the image channels, as the official one; the second "
        "half is not used by this formulation.",
    )

    @property
    def output_multiplier(self) -> int:
        """Output channels that the network needs for each image channel."""
        return 2 if self.variance_channels else 1


class VPSDEOptions(FormulationOptions):
    """U-ViT's formulation: variance-preserving SDE (or its discretisation) with LSimple."""

    implementation = "study.diffusion.vpsde:VPSDE"
    kind: Literal["vpsde"] = "vpsde"
    schedule: Literal["linear", "cosine", "discrete"] = Field(
        "linear",
        description="linear or cosine: continuous time, the network receives 999 t; discrete: "
        "the Stable-Diffusion schedule, the network receives the step 1..steps.",
    )
    prediction: Literal["eps", "x0"] = Field("eps", description="What the network predicts.")
    beta_min: float = Field(0.1, ge=1e-3, description="linear: beta at t = 0.")
    beta_max: float = Field(20.0, ge=1e-3, description="linear: beta at t = 1.")
    cosine_s: float = Field(0.008, ge=0, le=10, description="cosine: offset of the schedule.")
    steps: Steps = Field(1000, description="discrete: number of steps.")
    beta_start: float = Field(0.00085, ge=1e-7, lt=1, description="discrete: first beta.")
    beta_end: float = Field(0.012, ge=1e-7, lt=1, description="discrete: last beta.")

    @model_validator(mode="after")
    def _ends(self):
        if self.schedule == "linear":
            _as_value_error(check_noise, (self.beta_min + self.beta_max) / 2, "beta_min, beta_max")
        if self.schedule == "discrete":
            total = summed_betas(self.beta_start, self.beta_end, self.steps)
            _as_value_error(check_noise, total, "steps, beta_start, beta_end")
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        own = {
            "linear": ("beta_min", "beta_max"),
            "cosine": ("cosine_s",),
            "discrete": ("steps", "beta_start", "beta_end"),
        }
        for schedule, keys in own.items():
            if schedule != self.schedule:
                yield from ((key, f"it belongs to schedule {schedule}") for key in keys)

    @property
    def guidance(self) -> str:
        return "uvit"

    @property
    def discrete_steps(self) -> int | None:
        return self.steps if self.schedule == "discrete" else None


class DDPMOptions(FormulationOptions):
    """Discrete diffusion of U-DiT (the defaults) and of Patch Diffusion.

    U-DiT: eps prediction, unweighted error, learned variance with values in [-1, 1].
    Patch Diffusion: prediction x0, weighting sqrt_snr, variance_values unit.
    """

    implementation = "study.diffusion.ddpm:DDPM"
    kind: Literal["ddpm"] = "ddpm"
    steps: Steps = Field(1000, description="Number of steps T.")
    schedule: str = Field(
        "linear",
        pattern=r"^(linear(\d+(\.\d*)?|\.\d+)?|cosine)$",
        description="Betas: linear (1e-4..0.02), linearX (1e-4..X), both times 1000/T; or cosine.",
    )
    prediction: Literal["eps", "x0", "v"] = Field("eps", description="What the network predicts.")
    variance: Literal["learned", "fixed_small", "fixed_large"] = Field(
        "learned",
        description="learned: interpolated between the two fixed ones by extra output channels; "
        "fixed_small: that of the posterior; fixed_large: beta.",
    )
    variance_values: Literal["signed", "unit"] = Field(
        "signed",
        description="signed: learned values in [-1, 1], +1 meaning beta (U-DiT); unit: values in "
        "(0, 1), 1 meaning the posterior variance (Patch Diffusion).",
    )
    weighting: Literal["uniform", "sqrt_snr", "snr", "snr+1", "truncated_snr", "p2"] = Field(
        "uniform",
        description="uniform: unweighted error of the network's own prediction (U-DiT); the "
        "others weight the error of x0, whatever the prediction (Patch Diffusion).",
    )
    loss: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = Field(
        "mse",
        description="mse: error plus, with learned variance, the variational term; rescaled_mse: "
        "that term times T/1000; kl: the variational term alone; rescaled_kl: it times T.",
    )
    rescale_timesteps: bool = Field(
        False, description="Give the network t * 1000 / T instead of t."
    )
    splits: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="Signal-to-noise ratios at which the steps are split among models; a run has "
        "a model for each part.",
    )
    split: int | None = Field(
        None,
        ge=0,
        description="One part alone, as a loss or a network of its own sees it; 0: least noise.",
    )

    @field_validator("splits")
    @classmethod
    def _in_one_order(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise ValueError("one of them is given twice")
        return tuple(sorted(value, reverse=True))

    @model_validator(mode="after")
    def _consistent(self):
        if self.split is not None and self.split > len(self.splits):
            raise ValueError(f"split must lie in 0..{len(self.splits)}")
        _as_value_error(check_betas, self.schedule, self.steps)
        self._check_splits()
        return self

    def _check_splits(self) -> None:
        """Every part of the noise levels needs a step of the schedule."""
        if not self.splits:
            return
        ratios, abar, end = [], 1.0, linear_end(self.schedule)
        for step in range(self.steps):
            if end is None:
                now, then = (
                    math.cos((u / self.steps + 0.008) / 1.008 * math.pi / 2) ** 2
                    for u in (step, step + 1)
                )
                beta = min(1 - then / now, 0.999)
            else:
                share = step / (self.steps - 1)
                beta = 1000 / self.steps * (1e-4 + share * (end - 1e-4))
            abar *= 1 - beta
            ratios.append(abar / (1 - abar))
        bounds = [math.inf, *self.splits, 0.0]
        for part, (high, low) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if not any(low <= ratio < high for ratio in ratios):
                raise ValueError(
                    f"splits: part {part} is empty; the signal-to-noise ratios of the steps "
                    f"reach from {min(ratios):.2g} to {max(ratios):.2g}"
                )

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        if self.loss in ("kl", "rescaled_kl"):
            yield "weighting", f"loss {self.loss} is the variational term alone"

    @property
    def output_multiplier(self) -> int:
        """Output channels that the network needs for each image channel."""
        return 2 if self.variance == "learned" else 1

    @property
    def guidance(self) -> str:
        return "patch" if self.variance_values == "unit" else "udit"

    @property
    def discrete_steps(self) -> int:
        return self.steps

    @property
    def parts(self) -> list[FormulationOptions]:
        if not self.splits or self.split is not None:
            return [self]
        return [self.model_copy(update={"split": k}) for k in range(len(self.splits) + 1)]


FORMULATIONS: dict[str, type[FormulationOptions]] = {
    "edm": EDMOptions,
    "vp": VPOptions,
    "ve": VEOptions,
    "iddpm": IDDPMOptions,
    "vpsde": VPSDEOptions,
    "ddpm": DDPMOptions,
}

Formulation = kinds(
    FORMULATIONS,
    "Formulation: how noise levels are drawn, F becomes a denoiser, the loss is weighted.",
)
