"""How an arm is trained."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from study.spec.base import Model

Beta = Annotated[float, Field(ge=0, lt=1)]


class Ema(Model):
    """Exponential moving average of the weights: a rate per step, or EDM's half-life in images.

    Without ``rampup`` the rate is fixed, as published, and the average of a short training is
    still that of the initial weights: after 400 steps at 0.9999 they make 96 percent of it. With
    ``rampup`` nothing older than a share of what was seen counts for much (Karras et al. 2022,
    released training loop), so the average is one of trained weights after any number of steps.
    """

    rate: float | None = Field(None, gt=0, lt=1, description="Decay per step, e.g. 0.9999.")
    halflife: float | None = Field(None, gt=0, description="Half-life in images (EDM: 500000).")
    rampup: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The half-life is at most this share of the steps (with rate) or images (with "
        "halflife) seen so far (EDM: 0.05); null = it is fixed from the first step.",
    )

    @model_validator(mode="after")
    def _one(self) -> "Ema":
        if (self.rate is None) == (self.halflife is None):
            raise ValueError("give either rate or halflife")
        return self


def _how_written(value: Any) -> str:
    """Which of the forms of a setting this is: a mapping, a list, or a number."""
    if isinstance(value, list | tuple):
        return "<list>"
    return "<mapping>" if isinstance(value, Mapping | Model) else "<number>"


def _distinct(averages: tuple[Ema, ...]) -> Ema | tuple[Ema, ...]:
    for number, one in enumerate(averages):
        if one in averages[:number]:
            raise ValueError(f"entries {averages.index(one)} and {number} are the same average")
    return averages if len(averages) > 1 else averages[0]


Averages = Annotated[
    Annotated[Ema, Tag("<mapping>")]
    | Annotated[tuple[Ema, ...], Field(min_length=1), AfterValidator(_distinct), Tag("<list>")],
    Discriminator(lambda value: "<list>" if _how_written(value) == "<list>" else "<mapping>"),
]
"""One average, or several; a list of one is that one."""


def _in_order(steps: tuple[int, ...]) -> tuple[int, ...]:
    for number, step in enumerate(steps):
        if step in steps[:number]:
            raise ValueError(f"step {step} is there twice")
    return tuple(sorted(steps))


Steps = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_in_order)
]


class Snapshots(Model):
    """Which steps before the last keep their weights; the last step always does."""

    every: int | None = Field(None, ge=1, description="Every so many steps.")
    at: Steps | None = Field(None, description="These steps; 0 = the weights at initialisation.")
    raw: bool = Field(False, description="Keep the weights themselves beside their averages.")

    @model_validator(mode="after")
    def _one(self) -> "Snapshots":
        if (self.every is None) == (self.at is None):
            raise ValueError("give either every or at")
        return self


Kept = Annotated[
    Annotated[int, Field(ge=1), AfterValidator(lambda n: Snapshots(every=n)), Tag("<number>")]
    | Annotated[Steps, AfterValidator(lambda steps: Snapshots(at=steps)), Tag("<list>")]
    | Annotated[Snapshots, Tag("<mapping>")],
    Discriminator(_how_written),
]
"""Snapshots: every so many steps, a list of steps, or a mapping."""


class SplitModel(Model):
    """One of the models that share the noise levels: its split and what differs in training."""

    split: int = Field(ge=0, description="Its split of the noise levels; 0 has the least noise.")
    start: int | None = Field(
        None,
        ge=0,
        description="Start from the averaged weights of the model of this split, which must come "
        "earlier in the list; null = from its own initialisation.",
    )
    steps: int | None = Field(None, ge=1, description="null = training.steps.")
    lr: float | None = Field(None, gt=0, description="null = training.lr.")
    betas: tuple[Beta, Beta] | None = Field(None, description="null = training.betas.")
    warmup: int | None = Field(None, ge=0, description="null = training.warmup.")


class Training(Model):
    """How an arm is trained. Everything here changes numbers and is part of a run's name."""

    steps: int = Field(ge=1, description="Optimiser steps.")
    batch: int = Field(ge=1, description="Images per step, over all processes and accumulations.")
    optimizer: Literal["adam", "adamw"] = Field("adam", description="Optimiser.")
    lr: float = Field(gt=0, description="Learning rate after the warm-up.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Decay rates of the moments.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled with adamw, L2 with adam.")
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    ema: Averages = Field(
        Ema(rate=0.9999, rampup=0.05),
        description="Average of the weights: {rate: 0.9999} is fixed, as published; the default "
        "ramps up, so that it has begun in short trainings too. Of a list the first is called "
        "ema, the others ema2, ema3, ...",
    )
    snapshots: Kept | None = Field(
        None,
        description="Steps that keep their averages beside the last one's: every so many steps, a "
        "list, or {every | at, raw: true} to keep the weights themselves as well.",
    )
    clip: float | None = Field(None, gt=0, description="Largest gradient norm; null = no clipping.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout, where the backbone has one.")
    flip: bool = Field(False, description="Random horizontal flips.")
    augment: float = Field(
        0.0, ge=0, le=1, description="Probability of EDM's augmentations (SongUNet only)."
    )
    conditional: bool = Field(False, description="Train with class labels.")
    label_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of the null label, for guidance."
    )
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = Field(
        "fp32",
        description="fp16, bf16: mixed precision. fp32: single precision throughout. tf32: the "
        "same with products rounded to TF32 where the GPU can.",
    )
    attention: Literal["sdpa", "xformers", "math"] = Field("sdpa", description="Kernel.")
    divergence: float | None = Field(
        20.0, gt=1, description="Stop when the smoothed loss exceeds its best by this factor."
    )
    nan_to_num: bool = Field(False, description="Silently repair gradients, as EDM does.")
    models: tuple[SplitModel, ...] = Field(
        (),
        description="With formulation.splits: the models of an arm in the order in which they are "
        "trained, one after another; empty = all with the same settings.",
    )

    @property
    def averages(self) -> dict[str, Ema]:
        """The averages by what they are called: ``ema``, ``ema2``, ..."""
        listed = self.ema if isinstance(self.ema, tuple) else (self.ema,)
        return {
            f"ema{number}" if number > 1 else "ema": one for number, one in enumerate(listed, 1)
        }

    def kept(self, end: int) -> tuple[int, ...]:
        """The steps whose weights are kept, in order, of a training with ``end`` steps."""
        given = self.snapshots
        if given is None:
            return (end,)
        steps = given.at or range(given.every, end, given.every)
        return (*(step for step in steps if step < end), end)


SeedNumber = Annotated[int, Field(ge=0)]
Seed = (
    SeedNumber | Annotated[dict[Literal["data", "init", "noise"], SeedNumber], Field(min_length=1)]
)


def _each_seed_once(seeds: tuple[Seed, ...] | None) -> tuple[Seed, ...] | None:
    axes = ("data", "init", "noise")
    whole = [
        tuple(seed.get(axis, 0) if isinstance(seed, dict) else seed for axis in axes)
        for seed in seeds or ()
    ]
    for number, seed in enumerate(whole):
        if seed in whole[:number]:
            raise ValueError(f"entries {whole.index(seed)} and {number} are the same seed")
    return seeds


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_each_seed_once)]
