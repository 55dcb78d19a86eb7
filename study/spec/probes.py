"""The options of every probe, what they mean, and what a probe looks at."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator

from study.spec.base import Options, kinds
from study.spec.scalings import SkipScaling

Subject = Literal["run", "arm", "dataset", "study"]


class ProbeOptions(Options):
    """What every probe's options have in common.

    ``subject``: a probe looks at the trained network of every ``run``; at every run's ``arm``
    (its settings and seed, whether or not it was trained); at the ``dataset``, once; or at all
    the arms of the ``study``, once.
    """

    subject: ClassVar[Subject]
    speed: ClassVar[frozenset[str]] = frozenset()
    """Options that no number depends on: a new value of them reruns nothing."""

    def settings(self) -> dict[str, Any]:
        """The options, not at their defaults, that its numbers depend on."""
        return self._dump(exclude_defaults=True, exclude={"seeds", *self.speed})

    def agrees(self, options: Mapping[str, Any]) -> bool:
        """Whether a probe that was made with ``options`` gave the numbers of this one."""
        now = self._dump(exclude={"seeds", *self.speed})
        return all(options.get(key) == value for key, value in now.items())

    def speed_settings(self) -> dict[str, Any]:
        """The options, not at their defaults, that only its speed and memory depend on."""
        return self._dump(exclude_defaults=True, include=set(self.speed))

    def _dump(self, **which: Any) -> dict[str, Any]:
        options = self.model_dump(mode="json", **which)
        return {key: value for key, value in options.items() if key != "kind"}


class PerRun(ProbeOptions):
    """A probe with a result for every run, or for those of some seeds."""

    subject: ClassVar[Subject] = "run"
    seeds: tuple[int | str, ...] | None = Field(
        None,
        min_length=1,
        description="Only runs with these seeds (0, or 0.1.0 for seeds of each axis); null = all.",
    )


class Dynamics(PerRun):
    """Norms, gradients, loss by noise level and gates of the trained network on fresh noise."""

    implementation = "study.probes.dynamics:measure"
    kind: Literal["dynamics"] = "dynamics"
    speed: ClassVar[frozenset[str]] = frozenset({"batch"})
    samples: int = Field(512, ge=2, description="Images that every number is measured on.")
    sigmas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.05, 0.2, 0.5, 1.0, 2.0, 10.0),
        min_length=1,
        description="Noise levels (EDM's sigma) of norms and gates; those that a network does "
        "not know are left out.",
    )
    batch: int = Field(64, ge=1, description="Images at a time; memory only, no number changes.")
    weights: Literal["ema", "raw"] = Field("ema", description="Averaged or last weights.")


class Robustness(PerRun):
    """Change of the output against the size of a perturbation of the input."""

    implementation = "study.probes.robustness:measure"
    kind: Literal["robustness"] = "robustness"
    speed: ClassVar[frozenset[str]] = frozenset({"batch"})
    samples: int = Field(256, ge=1, description="Noisy images that every number is a mean over.")
    sigmas: tuple[Annotated[float, Field(ge=1e-3)], ...] = Field(
        (0.1, 0.34, 1.2, 3.4, 12.0),
        min_length=1,
        description="Noise levels (EDM's sigma); those that a network does not know are left out. "
        "The last four are t = 0.1, 0.3, 0.5, 0.7 of the linear variance-preserving schedule.",
    )
    relative: tuple[Annotated[float, Field(ge=1e-4, le=10)], ...] = Field(
        (1e-3, 1e-2, 1e-1),
        min_length=1,
        description="Sizes of the perturbation, as shares of the input's norm.",
    )
    batch: int = Field(64, ge=1, description="Images at a time; memory only, no number changes.")
    weights: Literal["ema", "raw"] = Field("ema", description="Averaged or last weights.")


class Representation(PerRun):
    """Similarity (CKA) between blocks, and radial spectra of their features."""

    implementation = "study.probes.representation:measure"
    kind: Literal["representation"] = "representation"
    speed: ClassVar[frozenset[str]] = frozenset({"batch"})
    samples: int = Field(256, ge=4, description="Noisy images that blocks are compared on.")
    sigmas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.1, 0.5, 2.0), description="Noise levels (EDM's sigma) of the spectra."
    )
    similarity_sigmas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="Noise levels at which blocks are compared as well; all levels together "
        "always.",
    )
    batch: int = Field(64, ge=1, description="Images at a time; memory only, no number changes.")
    debiased: bool = Field(
        False,
        description="Estimate CKA without its bias, which is upwards with few samples; the "
        "published figures do not.",
    )


class StabilityFrontier(PerRun):
    """Short trainings at rising learning rates: which still train, which diverge."""

    implementation = "study.probes.stability_frontier:measure"
    kind: Literal["stability_frontier"] = "stability_frontier"
    subject: ClassVar[Subject] = "arm"
    speed: ClassVar[frozenset[str]] = frozenset({"micro_batch"})
    lr: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        min_length=1,
        description="Learning rates to try, rising.",
    )
    steps: int = Field(60, ge=2, description="Steps of every training.")
    warmup: int = Field(
        10, ge=0, description="Longest warm-up, in steps; an arm's own counts where it is shorter."
    )
    below: float = Field(
        0.85,
        gt=0,
        description="A run has trained if its last losses are below this share of its first. A "
        "network that has only learned a constant image may come to 0.9.",
    )
    beyond: int = Field(0, ge=0, description="Rates to try after the first that diverged.")
    micro_batch: int | None = Field(
        None, ge=1, description="Images at a time; null = the whole batch."
    )

    @field_validator("lr")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(second <= first for first, second in pairwise(value)):
            raise ValueError("the learning rates are to rise from one to the next")
        return value


class Cost(PerRun):
    """Parameters, operations, activation memory, speed and energy."""

    implementation = "study.probes.cost:measure"
    kind: Literal["cost"] = "cost"
    subject: ClassVar[Subject] = "arm"
    batch: int | None = Field(
        None, ge=1, description="Batch of the timed training steps; null = the arm's own."
    )
    steps: int = Field(
        40, ge=1, description="Timed training steps, and timed evaluations; the shortest counts."
    )
    evaluation_batch: int = Field(64, ge=1, description="Images that are evaluated at a time.")


class TargetVariance(ProbeOptions):
    """Variance and bias of the training target against noise level and reference size."""

    implementation = "study.probes.target_variance:measure"
    kind: Literal["target_variance"] = "target_variance"
    subject: ClassVar[Subject] = "dataset"
    sigma: tuple[Annotated[float, Field(ge=1e-4, le=1e4)], ...] = Field(
        (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0, 20.0, 50.0),
        min_length=1,
        description="Noise levels (EDM's sigma; images are in [-1, 1]).",
    )
    reference: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        (4, 16, 64, 256, 512),
        min_length=1,
        description="Reference sizes n of the stable target, at most the size of the data set.",
    )
    points: int = Field(400, ge=2, description="Noisy images over which variances are averaged.")
    draws: int = Field(32, ge=2, description="References drawn for every noisy image.")
    toy: bool = Field(True, description="Measure the toy of two modes as well.")
    images: int | None = Field(
        None, ge=1, description="Only this many images of the data set (by seed); null = all."
    )
    seed: int = Field(0, ge=0, description="Seed of images, noise and references.")


class OptimalDenoiser(ProbeOptions):
    """Posterior-mean images, and their energy above what a patch size can show."""

    implementation = "study.probes.optimal_denoiser:measure"
    kind: Literal["optimal_denoiser"] = "optimal_denoiser"
    subject: ClassVar[Subject] = "dataset"
    snr: tuple[Annotated[float, Field(ge=1e-8, le=1e8)], ...] = Field(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 1.0, 3.0, 10.0),
        min_length=1,
        description="Signal-to-noise ratios abar / (1 - abar); sigma = snr^(-1/2).",
    )
    patch: tuple[Annotated[int, Field(ge=2, le=64)], ...] = Field(
        (2, 4, 8),
        min_length=1,
        description="Patch sizes P; those beyond the resolution of the data set are left out.",
    )
    samples: int = Field(256, ge=2, description="Noisy images over which energy is averaged.")
    shown: int = Field(6, ge=0, le=32, description="Noisy images whose posterior mean is kept.")
    images: int | None = Field(
        None, ge=1, description="Only this many images of the data set (by seed); null = all."
    )
    seed: int = Field(0, ge=0, description="Seed of images and noise.")


class ScalingLaws(ProbeOptions):
    """Norms, gradients and sensitivity at initialisation against the factors of the long skips."""

    implementation = "study.probes.scaling_laws:measure"
    kind: Literal["scaling_laws"] = "scaling_laws"
    subject: ClassVar[Subject] = "study"
    depths: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        (4, 8, 16), min_length=1, description="Numbers of long skips N of the clean recursion."
    )
    width: int = Field(256, ge=8, le=4096, description="Width m of the recursion's blocks.")
    layers: int = Field(2, ge=1, le=8, description="Layers l of each of the recursion's blocks.")
    draws: int = Field(
        32, ge=2, description="Independent draws of the recursion's weights (its seeds)."
    )
    directions: int = Field(
        4, ge=1, le=1024, description="Random directions of perturbation for each draw."
    )
    skip_scaling: tuple[str, ...] = Field(
        ("none", "inv_sqrt2", "cs(0.9)", "cs(0.7)", "cs(0.5)"),
        min_length=1,
        description="Skip scalings to measure, as in a grid; learned ones on backbones only.",
    )
    backbone_draws: int = Field(
        4, ge=0, description="Initialisations of every backbone; 0 = the recursion alone."
    )
    samples: int = Field(16, ge=1, description="Noisy images that every backbone is shown.")
    perturbation: float = Field(
        1e-3, gt=0, le=0.1, description="Size of the perturbation, as a share of the input's norm."
    )

    @field_validator("skip_scaling")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = []
        for text in value:
            try:
                known.append(str(SkipScaling.model_validate(text)))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"{text!r} is no skip scaling: {reason}") from None
        return tuple(dict.fromkeys(known))


PROBES: dict[str, type[ProbeOptions]] = {
    "dynamics": Dynamics,
    "robustness": Robustness,
    "representation": Representation,
    "stability_frontier": StabilityFrontier,
    "cost": Cost,
    "target_variance": TargetVariance,
    "optimal_denoiser": OptimalDenoiser,
    "scaling_laws": ScalingLaws,
}
Probe = kinds(PROBES, "Probe: its kind and options.")
