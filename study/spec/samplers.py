"""The options of every sampler: names, defaults, ranges, and what they mean."""

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AllowInfNan,
    BeforeValidator,
    Field,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from study.files import UserError
from study.spec.base import Options, kinds
from study.spec.steps import Sigma, Steps, check_betas, kept_steps

_COUNT = {"type": "integer", "minimum": 1, "maximum": 100_000}
Count = Annotated[
    int,
    Field(ge=1, le=100_000),
    WithJsonSchema({"anyOf": [_COUNT, {"type": "array", "items": _COUNT, "minItems": 1}]}),
]
"""Steps of a sampler; a protocol may list several."""


def _infinite(value: Any) -> Any:
    """JSON has no infinity: ``null`` and ``"inf"`` stand for it."""
    return math.inf if value is None or value in ("inf", "+inf", "infinity", ".inf") else value


UpperBound = Annotated[
    float,
    AllowInfNan(True),
    BeforeValidator(_infinite),
    PlainSerializer(lambda value: "inf" if math.isinf(value) else value, return_type=float | str),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "inf"}]}),
]
"""A float that may be infinite; it is written as ``"inf"`` so that JSON stays strict."""


class SamplerOptions(Options):
    """What every sampler's options have in common."""

    def evaluations(self, timesteps: int | None = None) -> int:
        """Denoiser evaluations per image; ``timesteps`` is the length of a discrete formulation.

        It matters for discrete samplers without respacing only.
        """
        raise NotImplementedError


class _Churn(SamplerOptions):
    S_churn: float = Field(
        default=0.0,
        ge=0,
        description="Amount of noise added back over the whole trajectory; 0 is deterministic.",
    )
    S_min: float = Field(default=0.0, ge=0, description="Lowest sigma at which noise is added.")
    S_max: UpperBound = Field(
        default=math.inf,
        gt=0,
        description='Highest sigma at which noise is added ("inf": all).',
        json_schema_extra={"default": "inf"},
    )
    S_noise: float = Field(
        default=1.0, ge=0, le=100, description="Standard deviation of the added noise, 1 in theory."
    )

    @model_validator(mode="after")
    def _churn_ordered(self) -> "_Churn":
        if self.S_min > self.S_max:
            raise ValueError(f"S_min {self.S_min} is above S_max {self.S_max}")
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.S_churn == 0:
            for key in ("S_min", "S_max", "S_noise"):
                yield key, "with S_churn 0 no noise is added"


class EDMHeunOptions(_Churn):
    """The stochastic sampler of Karras et al. 2022, Algorithm 2, and its Euler form."""

    implementation = "study.diffusion.samplers.edm:EDMHeun"
    kind: Literal["edm_heun"] = Field(default="edm_heun", description="EDM's sampler.")
    steps: Count = Field(default=18, description="Number of steps N.")
    sigma_min: Sigma = Field(
        default=0.002,
        description="Last noise level above zero; the network's range clips it.",
    )
    sigma_max: Sigma = Field(
        default=80.0, description="First noise level; the network's range clips it."
    )
    rho: float = Field(
        default=7.0, ge=0.1, le=1000, description="Curvature of the noise levels; 1 is linear."
    )
    solver: Literal["heun", "euler"] = Field(
        default="heun",
        description="heun: second order, 2N-1 evaluations. euler: first order, N evaluations.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "EDMHeunOptions":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self

    @property
    def sigmas(self) -> tuple[float, float]:
        """(sigma_min, sigma_max)."""
        return self.sigma_min, self.sigma_max

    def evaluations(self, timesteps: int | None = None) -> int:
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps


class EDMAblationOptions(_Churn):
    """The generalised sampler of Karras et al. 2022, Appendices B and C."""

    implementation = "study.diffusion.samplers.ablation:EDMAblation"
    kind: Literal["edm_ablation"] = Field(default="edm_ablation", description="EDM's ablations.")
    steps: Count = Field(default=18, description="Number of steps N.")
    sigma_min: Sigma | None = Field(
        default=None,
        description="Last noise level above zero; null takes the discretisation's own "
        "(vp: sigma_vp(epsilon_s), ve 0.02, iddpm 0.002, edm 0.002).",
    )
    sigma_max: Sigma | None = Field(
        default=None,
        description="First noise level; null takes the discretisation's own "
        "(vp: sigma_vp(1), ve 100, iddpm 81, edm 80).",
    )
    rho: float = Field(
        default=7.0, ge=0.1, le=1000, description="Curvature of the edm discretisation."
    )
    solver: Literal["heun", "euler"] = Field(default="heun", description="Order 2 or order 1.")
    discretization: Literal["vp", "ve", "iddpm", "edm"] = Field(
        default="edm", description="Which noise levels are visited."
    )
    schedule: Literal["vp", "ve", "linear"] = Field(
        default="linear", description="sigma(t), the noise level as a function of the ODE's time."
    )
    scaling: Literal["vp", "none"] = Field(
        default="none", description="s(t), the scaling of the signal as a function of time."
    )
    epsilon_s: float = Field(
        default=1e-3, ge=1e-6, lt=1, description="Smallest time of the vp discretisation."
    )
    C_1: float = Field(
        default=1e-3,
        ge=1e-6,
        lt=1,
        description="Floor of the iddpm table's ratio of signal levels.",
    )
    C_2: float = Field(default=8e-3, ge=0, le=10, description="Time offset of the iddpm table.")
    M: Steps = Field(default=1000, description="Number of entries of the iddpm table.")
    alpha: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Where the second evaluation of a step stands: 1 is Heun, 1/2 the midpoint "
        "rule, 2/3 Ralston.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "EDMAblationOptions":
        low, high = self.sigmas
        if low >= high:
            raise ValueError(f"sigma_min {low:.4g} is not below sigma_max {high:.4g}")
        if "vp" in (self.discretization, self.schedule):
            first, last, time = math.log1p(low**2), math.log1p(high**2), self.epsilon_s
            if first > time * last:
                raise ValueError(
                    f"no vp schedule has sigma {low:.4g} at epsilon_s {time:g} and {high:.4g} at 1"
                )
        return self

    @property
    def sigmas(self) -> tuple[float, float]:
        """(sigma_min, sigma_max), the discretisation's own where none are given."""
        time = self.epsilon_s  # vp: beta from 0.1 to 20
        lowest, highest = {
            "vp": (
                math.sqrt(math.expm1(9.95 * time**2 + 0.1 * time)),
                math.sqrt(math.expm1(10.05)),
            ),
            "ve": (0.02, 100.0),
            "iddpm": (0.002, 81.0),
            "edm": (0.002, 80.0),
        }[self.discretization]
        low = lowest if self.sigma_min is None else self.sigma_min
        return low, highest if self.sigma_max is None else self.sigma_max

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        if self.discretization != "edm":
            yield "rho", "it belongs to discretization edm"
        if self.discretization != "iddpm":
            for key in ("C_1", "C_2", "M"):
                yield key, "it belongs to discretization iddpm"
        if "vp" not in (self.discretization, self.schedule):
            yield "epsilon_s", "it belongs to discretization vp and schedule vp"
        if self.solver == "euler":
            yield "alpha", "solver euler evaluates once"

    def evaluations(self, timesteps: int | None = None) -> int:
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps


class _VPTime(SamplerOptions):
    """Samplers that walk a variance-preserving process in its own time t in [0, 1]."""

    schedule: Literal["formulation", "linear", "cosine", "discrete"] = Field(
        default="formulation",
        description="The process x_t = alpha(t) y + s(t) n that is walked. formulation: the "
        "denoiser's own where it has one, else linear. linear: beta(t) from 0.1 to 20. "
        "cosine: improved DDPM's. discrete: Stable Diffusion's 1000 steps.",
    )
    t_start: float = Field(
        default=1.0, ge=0.05, le=1, description="First time; clipped to the denoiser's sigma range."
    )
    t_end: float

    @model_validator(mode="after")
    def _ordered(self) -> "_VPTime":
        if self.t_end >= self.t_start:
            raise ValueError(f"t_end {self.t_end} is not below t_start {self.t_start}")
        return self


class DPMSolverOptions(_VPTime):
    """DPM-Solver "fast" of Lu et al. 2022 (singlestep, order 3 with a lower tail), as in U-ViT."""

    implementation = "study.diffusion.samplers.dpm_solver:DPMSolver"
    kind: Literal["dpm_solver"] = Field(default="dpm_solver", description="DPM-Solver, fast.")
    steps: Count = Field(default=50, description="Number of denoiser evaluations.")
    spacing: Literal["logsnr", "time"] = Field(
        default="logsnr", description="Steps uniform in log signal-to-noise ratio or in time."
    )
    t_end: float = Field(
        default=1e-4, ge=1e-6, lt=1, description="Last time; the sample is x there."
    )
    precision: Literal["float64", "float32"] = Field(
        default="float64",
        description="Of the solver's schedule. float32 is that of U-ViT's released code, whose s "
        "is off by 0.3 percent at t = 1e-4.",
    )
    prediction: ClassVar[str] = "noise"

    def evaluations(self, timesteps: int | None = None) -> int:
        return self.steps


class DPMSolverPPOptions(DPMSolverOptions):
    """DPM-Solver++ "fast" of Lu et al. 2022b in data prediction, as U-ViT's discrete models use."""

    kind: Literal["dpm_solver_pp"] = Field(  # type: ignore[assignment]
        default="dpm_solver_pp", description="DPM-Solver++, fast."
    )
    spacing: Literal["logsnr", "time"] = Field(
        default="time", description="Steps uniform in log signal-to-noise ratio or in time."
    )
    t_end: float = Field(
        default=1e-3, ge=1e-6, lt=1, description="Last time; the sample is x there."
    )
    prediction: ClassVar[str] = "data"


class EulerMaruyamaOptions(_VPTime):
    """Euler(-Maruyama) on the reverse SDE or its probability-flow ODE (Song et al. 2021)."""

    implementation = "study.diffusion.samplers.euler_maruyama:EulerMaruyama"
    kind: Literal["euler_maruyama"] = Field(default="euler_maruyama", description="Reverse SDE.")
    steps: Count = Field(default=1000, description="Number of updates and of evaluations.")
    form: Literal["sde", "ode"] = Field(
        default="sde", description="sde: noise at every update but the last. ode: deterministic."
    )
    t_end: float = Field(
        default=1e-3,
        ge=1e-6,
        lt=1,
        description="Last time above zero; one update from it ends at 0.",
    )

    def evaluations(self, timesteps: int | None = None) -> int:
        return self.steps


class _Discrete(SamplerOptions):
    """Samplers that walk a discrete process of T steps, or a respaced part of it."""

    respacing: str = Field(
        default="",
        description='Which of the T steps are visited: "" all; "250" that many evenly; "10,15,20" '
        'so many of each equal section; "ddim25" every i-th for the whole i that gives 25.',
    )
    threshold: Literal["none", "clip", "dynamic"] = Field(
        default="clip",
        description="What is done to the predicted clean image: clip to [-1, 1]; dynamic: clip to "
        "its own quantile and divide by it; none, as for latents.",
    )
    quantile: float = Field(
        default=0.995, gt=0, le=1, description="Quantile of |x0| per image of dynamic thresholding."
    )
    schedule: str = Field(
        default="formulation",
        pattern=r"^(formulation|linear(\d+(\.\d*)?|\.\d+)?|cosine)$",
        description="Betas. formulation: the denoiser's own where it is discrete, else linear. Or "
        "linear (1e-4..0.02), linearX (1e-4..X), cosine, whatever the denoiser.",
    )
    timesteps: Steps = Field(
        default=1000, description="Length T of a schedule that is not the denoiser's."
    )
    precision: Literal["float64", "float32"] = Field(
        default="float64",
        description="Of the sampler's arithmetic; float32 is that of the released codes.",
    )

    @field_validator("respacing", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, list | tuple):
            value = ",".join(str(item) for item in value)
        value = value.replace(" ", "") if isinstance(value, str) else value
        if isinstance(value, str) and not re.fullmatch(
            r"|ddim[1-9]\d*|[1-9]\d*(,[1-9]\d*)*", value
        ):
            raise ValueError(f'"{value}" is no respacing; "", "250", "10,15,20" or "ddim25" are')
        return value

    @model_validator(mode="after")
    def _has_betas(self) -> "_Discrete":
        if self.schedule != "formulation":
            try:
                self.check(None)
            except UserError as error:
                raise ValueError(str(error)) from None
        return self

    def check(self, own: int | None) -> None:
        """Raise ``UserError`` where these steps cannot be walked.

        ``own`` is the number of steps of a discrete formulation, ``None`` of any other.
        """
        walked = own if self.schedule == "formulation" else None
        if walked is None:
            check_betas(self.schedule.replace("formulation", "linear"), self.timesteps)
        elif self.timesteps != 1000:
            raise UserError(
                f"timesteps cannot act: the formulation has its own {walked} steps; leave it out"
            )
        kept_steps(walked or self.timesteps, self.respacing)

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.threshold != "dynamic":
            yield "quantile", "it belongs to threshold dynamic"

    def evaluations(self, timesteps: int | None = None) -> int:
        if self.respacing == "":
            own = self.schedule == "formulation" and timesteps is not None
            return timesteps if own else self.timesteps
        if self.respacing.startswith("ddim"):
            return int(self.respacing[4:])
        return sum(int(count) for count in self.respacing.split(","))


class AncestralOptions(_Discrete):
    """Ancestral sampling of Ho et al. 2020 with the variances of Nichol & Dhariwal 2021."""

    implementation = "study.diffusion.samplers.ancestral:Ancestral"
    kind: Literal["ancestral"] = Field(default="ancestral", description="DDPM's sampler.")
    variance: Literal["formulation", "small", "large"] = Field(
        default="formulation",
        description="Variance of a step. formulation: the denoiser's own (learned or fixed; small "
        "where it has none). small: the posterior variance. large: beta.",
    )


class DDIMOptions(_Discrete):
    """DDIM of Song et al. 2021."""

    implementation = "study.diffusion.samplers.ancestral:DDIM"
    kind: Literal["ddim"] = Field(default="ddim", description="DDIM.")
    eta: float = Field(
        default=0.0, ge=0, le=10, description="0 is deterministic; 1 has DDPM's posterior variance."
    )


SAMPLERS: dict[str, type[SamplerOptions]] = {
    "edm_heun": EDMHeunOptions,
    "edm_ablation": EDMAblationOptions,
    "dpm_solver": DPMSolverOptions,
    "dpm_solver_pp": DPMSolverPPOptions,
    "euler_maruyama": EulerMaruyamaOptions,
    "ancestral": AncestralOptions,
    "ddim": DDIMOptions,
}
"""Options model of every sampler kind."""

Sampler = kinds(SAMPLERS, "Sampler: its kind and options.")
