"""A study as typed models: what ``config.yaml`` may say, with every default.

``load`` checks a study and explains mistakes in one line each; ``schema`` gives the JSON schema
that ``workflow/schemas/study.schema.json`` holds. No heavy imports: the Snakefile reads this.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from study.backbones import FAMILIES
from study.diffusion.options import OPTIONS as FORMULATIONS
from study.diffusion.samplers.options import OPTIONS as SAMPLERS
from study.diffusion.samplers.options import GuidanceOptions
from study.files import UserError
from study.probes.options import OPTIONS as PROBES

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]

Place = Annotated[
    str,
    StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f]+$"),
    AfterValidator(os.path.expanduser),
]
"""Where a file or folder lies; ``~`` is the user's home."""


class Model(BaseModel):
    """Base of all sections: unknown keys are errors, and so are infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Shorthand(Model):
    """A section that may also be written as text: ``name`` or ``name(number)``.

    ``_key`` is the field that the name fills, ``_numbers`` the field that the number fills, by
    name.
    """

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _read_shorthand(cls, value: Any) -> Any:
        return cls._shorthand(value) if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        full = handler(core)
        description = (cls.__doc__ or "").strip().splitlines()[0]
        return {"anyOf": [{"type": "string"}, full], "description": description}


def _call(text: str) -> tuple[str, str | None]:
    """Split ``name(argument)``."""
    match = re.fullmatch(r"\s*([A-Za-z_0-9]+)\s*(?:\(\s*([^()]*?)\s*\))?\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is neither a name nor name(number)")
    return match[1], match[2]


def _number(text: str, of: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{of}({text}): {text!r} is not a number") from None


def _refuse_idle(model: Any) -> None:
    """Raise ``ValueError`` for a key that is not at its default and cannot act."""
    fields = type(model).model_fields
    for key, why in model.idle():
        if getattr(model, key) != fields[key].get_default(call_default_factory=True):
            raise ValueError(f"{key} cannot act: {why}; leave it out")


_SPLITS: dict[str, tuple[str | None, ...]] = {
    "digits": (None, "train", "all"),
    "cifar10": (None, "train", "test", "all"),
    "archive": (None, "train"),
}


class Dataset(Model):
    """The data set and how it is converted."""

    name: Name = Field(description="Name of the archive, results/datasets/<name>.zip.")
    source: Literal[
        "digits",
        "folder",
        "zip",
        "tar",
        "cifar10",
        "imagenet",
        "lsun",
        "celeba",
        "ffhq",
        "afhq",
        "latents",
        "archive",
    ] = Field(description="Where the images come from; digits is bundled, all others need a path.")
    path: Place | None = Field(None, description="Folder, zip or tar to read; ~ is your home.")
    split: Literal["train", "val", "test", "all"] | None = Field(
        None, description="Part of the source; null = train where there is one (FFHQ: all)."
    )
    resolution: int | None = Field(
        None, ge=4, description="Side in pixels after conversion; null keeps it (all must agree)."
    )
    crop: Literal["none", "center", "center_dhariwal", "celeba"] = Field(
        "none", description="How non-square images become square."
    )
    resize: Literal["lanczos", "box", "bilinear", "bicubic"] | None = Field(
        None, description="Filter of the resizing; null = lanczos (crop celeba: bilinear)."
    )
    color: Literal["rgb", "grey", "keep"] | None = Field(
        None, description="Colour mode of the archive; null = rgb (digits, archive: keep)."
    )
    labels: bool = Field(True, description="Keep class labels where the source has them.")
    channels: int | None = Field(
        None, ge=1, description="Channels that the images must have; null = as they are."
    )
    classes: int | None = Field(
        None, ge=1, description="Classes that the labels must have; null = as the source has."
    )
    max_images: int | None = Field(
        None, ge=1, description="Take only that many, evenly spaced in the source's order."
    )
    moments: Literal["mean_std", "mean_logvar"] | None = Field(
        None, description="Latents stored as moments: which; null = plain latents."
    )
    scale: float = Field(1.0, gt=0, description="Latents: factor, e.g. 0.18215.")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="Broken images: stop and name them, or leave them out with a list."
    )
    note: str = Field("", description="Printed wherever metrics on this data set appear.")

    @model_validator(mode="after")
    def _fits_its_source(self) -> "Dataset":
        if self.source != "digits" and self.path is None:
            raise ValueError(f"source {self.source} needs dataset.path")
        splits = _SPLITS.get(self.source, (None, "train", "val", "test", "all"))
        if self.split not in splits:
            known = ", ".join("null" if split is None else split for split in splits)
            raise ValueError(f"split {self.split}: source {self.source} has only {known}")
        if self.crop == "center_dhariwal" and self.resolution is None:
            raise ValueError("crop center_dhariwal needs a resolution")
        _refuse_idle(self)
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        if self.source == "digits":
            yield "path", "digits comes with a package"
        if self.source not in ("latents", "archive"):
            yield "moments", "only latents are moments"
            yield "scale", "it is a factor of latents"
        if self.source == "latents":
            for key in ("crop", "resize", "color"):
                yield key, "latents are not images"
        elif self.crop == "center_dhariwal":
            yield "resize", "crop center_dhariwal has its own filters"
        elif self.resolution is None:
            yield "resize", "without a resolution nothing is resized"


class SkipScaling(Shorthand):
    """Skip scaling: none, inv_sqrt2, cs, cs(kappa), ls or ls_unshared; or a mapping."""

    method: Literal["none", "inv_sqrt2", "cs", "ls", "ls_unshared"] = Field(
        description="Factor on a long skip: 1, 2^(-1/2), kappa^(i-1), or a learned gate."
    )
    kappa: float = Field(
        0.7, gt=0, description="Base of constant scaling; ScaleLong's README advises 0.5 to 0.95."
    )
    exponent: Literal["per_skip", "per_level", "normalised"] = Field(
        "per_skip", description="What counts the power of kappa; per_skip is published."
    )
    innermost: float | None = Field(
        None, ge=0, description="With normalised: the power of kappa at the innermost skip."
    )

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        method, argument = _call(text)
        if argument is None:
            return {"method": method}
        if method != "cs":
            raise ValueError(f"only cs takes a number, as in cs(0.7); got {text!r}")
        return {"method": method, "kappa": _number(argument, method, float)}

    @model_validator(mode="before")
    @classmethod
    def _named_alike(cls, value: Any) -> Any:
        """Factors of 1 are no scaling, however they are written: one setting has one name."""
        if isinstance(value, Mapping) and value.get("method") == "cs":
            flat = value.get("exponent") == "normalised" and value.get("innermost") == 0
            if value.get("kappa") == 1 or flat:
                return {"method": "none"}
        return value

    @model_validator(mode="after")
    def _complete(self) -> "SkipScaling":
        _refuse_idle(self)
        if (self.exponent == "normalised") != (self.innermost is not None):
            raise ValueError("exponent: normalised and innermost go together")
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        if self.method != "cs":
            for key in ("kappa", "exponent", "innermost"):
                yield key, f"it belongs to cs, not to {self.method}"

    def __str__(self) -> str:
        if self.method != "cs":
            return self.method
        how = "" if self.exponent == "per_skip" else f", {self.exponent}"
        if self.innermost is not None:
            how += f" {self.innermost:g}"
        return f"cs({self.kappa:g}{how})"


class Target(Shorthand):
    """Target: dsm, stf or stf(size of the reference batch); or a mapping."""

    kind: Literal["dsm", "stf"] = Field(
        description="dsm: the clean image; stf: the posterior-weighted mean of a reference batch."
    )
    reference: int = Field(
        1024,
        ge=2,
        description="STF: images in the reference batch of a step, over all processes, the "
        "training batch included as its first rows.",
    )

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        kind, argument = _call(text)
        if argument is None:
            return {"kind": kind}
        if kind != "stf":
            raise ValueError(f"only stf takes a number, as in stf(1024); got {text!r}")
        return {"kind": kind, "reference": int(_number(argument, kind, int))}

    @model_validator(mode="after")
    def _acts(self) -> "Target":
        _refuse_idle(self)
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        if self.kind == "dsm":
            yield "reference", "it belongs to stf"

    def __str__(self) -> str:
        return "dsm" if self.kind == "dsm" else f"stf({self.reference})"


class _Mistakes(ValueError):
    """Lines that each begin with the key of an option."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class _Registered(Shorthand):
    """A kind and its options, which the registry's models check."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str

    @classmethod
    def _registry(cls) -> Mapping[str, type[BaseModel]]:
        raise NotImplementedError

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        return {"kind": text.strip()}

    @model_validator(mode="after")
    def _check(self) -> "_Registered":
        registry = self._registry()
        if self.kind not in registry:
            raise ValueError(f"kind {self.kind!r} is unknown; allowed: {', '.join(registry)}")
        model = registry[self.kind]
        try:
            options = model.model_validate_json(json.dumps(self.model_extra), strict=True)
            _refuse_idle(options)
        except ValidationError as error:
            raise _Mistakes(explain(error, model, whole="")) from None
        return self

    def chosen(self, **which: set[str]) -> dict[str, Any]:
        """The options that are not at their defaults."""
        model = self._registry()[self.kind]
        options = model.model_validate_json(json.dumps(self.model_extra), strict=True)
        return options.model_dump(mode="json", exclude_defaults=True, **which)

    def resolved(self) -> dict[str, Any]:
        """The kind with all its options filled in."""
        model = self._registry()[self.kind]
        options = model.model_validate_json(json.dumps(self.model_extra), strict=True)
        return {"kind": self.kind, **options.model_dump(mode="json", exclude={"kind"})}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        choices: list[dict[str, Any]] = [{"type": "string", "enum": list(cls._registry())}]
        for kind, model in cls._registry().items():
            options = model.model_json_schema()
            options.pop("title", None)
            properties = {k: v for k, v in options.get("properties", {}).items() if k != "kind"}
            required = [key for key in options.get("required", []) if key != "kind"]
            options |= {
                "properties": {"kind": {"const": kind}, **properties},
                "required": ["kind", *required],
            }
            choices.append(options)
        description = (cls.__doc__ or "").strip().splitlines()[0]
        return {"anyOf": choices, "description": description}


class Formulation(_Registered):
    """Formulation: how noise levels are drawn, F becomes a denoiser, the loss is weighted."""

    @classmethod
    def _registry(cls) -> Mapping[str, type[BaseModel]]:
        return FORMULATIONS


class Sampler(_Registered):
    """Sampler: its kind and options."""

    @classmethod
    def _registry(cls) -> Mapping[str, type[BaseModel]]:
        return SAMPLERS


class Probe(_Registered):
    """Probe: its kind and options."""

    @classmethod
    def _registry(cls) -> Mapping[str, type[BaseModel]]:
        return PROBES

    @property
    def subject(self) -> str:
        """What it looks at: run, arm, dataset or study."""
        return PROBES[self.kind].subject

    def settings(self) -> dict[str, Any]:
        """The options, not at their defaults, that its numbers depend on."""
        return self.chosen(exclude={"seeds", *PROBES[self.kind].speed})

    def agrees(self, options: Mapping[str, Any]) -> bool:
        """Whether a probe that was made with ``options`` gave the numbers of this one."""
        apart = {"kind", "seeds", *PROBES[self.kind].speed}
        now = self.resolved()
        return all(options.get(key) == now[key] for key in now if key not in apart)

    def speed(self) -> dict[str, Any]:
        """The options, not at their defaults, that only its speed and memory depend on."""
        return self.chosen(include=set(PROBES[self.kind].speed))


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
    ema: Ema = Field(
        Ema(rate=0.9999, rampup=0.05),
        description="Average of the weights: {rate: 0.9999} is fixed, as published; the default "
        "ramps up, so that it has begun in short trainings too.",
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


class Guidance(GuidanceOptions):
    """Classifier-free guidance: a scale, or a mapping with the kind of guidance."""

    kind: Literal["edm", "uvit", "udit", "patch"] | None = Field(  # type: ignore[assignment]
        None, description="Whose definition; null = that of the formulation."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_number(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"scale": value}
        if not isinstance(value, Mapping):
            raise ValueError("neither a number nor a mapping with scale")
        return value

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        full = handler.resolve_ref_schema(handler(core))
        description = (cls.__doc__ or "").strip()
        return {"anyOf": [{"type": "number"}, full], "description": description}


class Decoder(Model):
    """The autoencoder that turns generated latents into images."""

    weights: Place = Field(
        description="File with the weights of a Stable Diffusion autoencoder: .safetensors, or "
        "tensors that torch saved; keys of the original code or of diffusers."
    )
    scale: float = Field(
        gt=0, description="Latents are divided by it before they are decoded, e.g. 0.18215."
    )


class Generation(Model):
    """How samples are made. The same for all arms of a study."""

    sampler: Sampler = Field(description="Sampler and its options.")
    images: int | None = Field(None, ge=1, description="null = as many as the data set has.")
    seed: int = Field(0, ge=0, description="First sample's seed; sample i has seed + i.")
    weights: Literal["ema", "raw"] = Field("ema", description="Which weights generate.")
    guidance: Guidance | None = Field(
        None, description="Classifier-free guidance: a scale, or {kind, scale, channels}."
    )
    decoder: Decoder | None = Field(
        None, description="What decodes latents; needed by data sets of latents, and only there."
    )
    batch: int = Field(256, ge=1, description="Images at a time; changes no result.")

    def protocol(self) -> dict[str, Any]:
        """What samples depend on, as far as it is not at its default."""
        left_out: Any = {"batch": True, "decoder": {"weights"}, "sampler": True}
        chosen = self.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
        return {**chosen, "sampler": {"kind": self.sampler.kind, **self.sampler.chosen()}}


class Evaluation(Model):
    """Which metrics, on which features."""

    extractor: Literal["digits", "inception", "pixels"] = Field(
        description="Feature extractor: digits trains a small classifier; inception gives FID."
    )
    weights: Place | None = Field(None, description="File with the extractor's weights.")
    metrics: tuple[Literal["fd", "kid", "is", "prc"], ...] = Field(
        ("fd", "kid", "is", "prc"), min_length=1, description="Frechet, KID, IS, precision/recall."
    )
    seed: int = Field(0, ge=0, description="Seed of the classifier that digits trains.")
    reference: Dataset | None = Field(
        None, description="Images to measure against; null = those of the data set itself."
    )

    @model_validator(mode="after")
    def _acts(self) -> "Evaluation":
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: {', '.join(self.metrics)} lists one twice")
        _refuse_idle(self)
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        if self.extractor == "digits":
            yield "weights", "digits trains its own classifier"
        else:
            yield "seed", "only digits trains a classifier"
        if self.extractor == "pixels":
            yield "weights", "pixels has none"

    def protocol(self) -> dict[str, Any]:
        """What a measurement depends on, as far as it is not at its default."""
        return self.model_dump(mode="json", exclude={"weights", "reference"}, exclude_defaults=True)


class Machine(Model):
    """Speed only: nothing here changes results beyond rounding, and nothing reruns.

    One exception: with training.dropout, masks are drawn for each process and micro-batch, so
    `processes` and `micro_batch` draw others. The dynamics log of several processes shows the
    first one's share of the batch.
    """

    gpus: int = Field(0, ge=0, description="GPUs of this machine that jobs may use.")
    jobs_per_gpu: int = Field(1, ge=1, description="Jobs that share one GPU.")
    threads: int = Field(1, ge=1, description="CPU threads per training or sampling job.")
    processes: int = Field(1, ge=1, description="Processes per training, each with a GPU if any.")
    micro_batch: int | None = Field(
        None, ge=1, description="Images at a time per process; null = the whole share."
    )
    checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    log_every: int | None = Field(None, ge=1, description="Steps per log row; null = 100 rows.")
    save_every: float = Field(60.0, gt=0, description="Seconds between checkpoints.")
    resident_mib: int = Field(4096, ge=0, description="Keep data sets up to this size in memory.")


class BackboneEntry(Model):
    """What a backbone name of this study stands for."""

    family: str | None = Field(
        None, description="Family; null = the entry's own name.", examples=list(FAMILIES)
    )
    preset: str | None = Field(None, description="Published or tiny size to start from.")
    options: dict[str, Any] = Field({}, description="Options that differ from the preset.")
    noise_scale: float = Field(
        1.0, gt=0, description="Multiplies the noise number that the network receives."
    )
    training: dict[str, Any] = Field({}, description="Training keys for this backbone only.")


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


class Grid(Model):
    """Axes of a grid; every combination is an arm."""

    backbone: tuple[str, ...] = Field(min_length=1, description="Names under `backbones`.")
    skip_scaling: tuple[SkipScaling, ...] = Field(
        (SkipScaling(method="none"),), min_length=1, description="Skip scalings, e.g. [none, ls]."
    )
    target: tuple[Target, ...] = Field(
        (Target(kind="dsm"),), min_length=1, description="Targets, e.g. [dsm, stf(1024)]."
    )
    formulation: tuple[Formulation, ...] | None = Field(None, description="null = the study's.")
    training: tuple[dict[str, Any], ...] = Field(
        ({},), min_length=1, description="Sets of training keys, e.g. [{lr: 1.0e-3}]."
    )
    seed: Seeds | None = Field(None, description="null = the study's `seed`.")


class Checkpoint(Shorthand):
    """Official checkpoint whose weights are imported instead of trained: its path; or a mapping."""

    path: Place = Field(description="Where the file lies; a run's name does not depend on it.")
    name: str | None = Field(
        None,
        min_length=1,
        description="What the weights are called, and the setting where sha256 is not given; "
        "null = the file's name.",
    )
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="Hash of the file, which then is the setting, and is checked.",
    )

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        return {"path": text}

    def identity(self) -> dict[str, Any]:
        """What is a setting: the content where its hash is given, a name for it otherwise."""
        return {"sha256": self.sha256} if self.sha256 else {"name": self.label}

    @property
    def label(self) -> str:
        """What people call the weights."""
        return self.name or Path(self.path).name


class Arm(Model):
    """One extra arm: what differs from the study's settings."""

    name: str | None = Field(None, min_length=1, description="Display name, free text.")
    backbone: str = Field(description="A name under `backbones`.")
    options: dict[str, Any] = Field({}, description="Backbone options of this arm only.")
    skip_scaling: SkipScaling = SkipScaling(method="none")
    target: Target = Target(kind="dsm")
    formulation: Formulation | None = Field(None, description="null = the study's.")
    training: dict[str, Any] = Field({}, description="Training keys of this arm only.")
    seed: Seeds | None = Field(None, description="null = the study's `seed`.")
    checkpoint: Checkpoint | None = Field(
        None, description="Take these weights instead of training; null = train."
    )


# --- where a published study's settings come from ---------------------------------------------

Origin = Literal["paper", "code", "readme", "ours"]


class Conflict(Model):
    """Another source that says something else."""

    source: Origin = Field(description="Where it stands.")
    value: Any = Field(description="What it says.")
    where: str = Field("", description="File and key, table or section.")
    note: str = Field("", description="Why it was not followed.")


class Source(Shorthand):
    """Where a setting comes from: code(file key), readme(place), paper(place), ours(reason)."""

    source: Origin = Field(description="ours: no source says it; the note says why it is so.")
    where: str = Field("", description="File and key, table or section; not for ours.")
    note: str = Field("", description="What a reader should know; for ours the reason.")
    conflicts: list[Conflict] = Field([], description="Sources that say something else.")

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
        if match is None:
            raise ValueError(f"{text!r} is not of the form code(place) or ours(reason)")
        return {"source": match[1], "note" if match[1] == "ours" else "where": match[2].strip()}

    @model_validator(mode="after")
    def _says_something(self) -> "Source":
        if self.source == "ours" and not self.note:
            raise ValueError("ours needs a note: why the value is what it is")
        if self.source != "ours" and not self.where:
            raise ValueError(f"{self.source} needs where: the place that says so")
        return self


class Repository(Model):
    """A released code."""

    url: str = Field(description="Where it is published.")
    commit: str = Field(description="The commit that was read.")


class Published(Model):
    """The publication that a study follows."""

    paper: str = Field(description="Its name in our table of published numbers.")
    model: str = Field("", description="The model's name in that table.")
    dataset: str = Field("", description="The data set's name in that table.")
    repositories: dict[Name, Repository] = Field(
        {}, description="Released code; places without a repository's name are in the first."
    )
    parameters: int | None = Field(
        None, ge=1, description="Parameters of the network, counted on the released code."
    )
    needs: tuple[str, ...] = Field(
        (), description="What a user brings, and in which form: data, weights."
    )
    differences: tuple[str, ...] = Field(
        (), description="What the publication does and this study does not do, or otherwise."
    )


class Study(Model):
    """A study: a data set, a grid of arms, extra arms, protocols."""

    study: Name = Field(description="Name; results/<study> and reports/<study>.")
    title: str = Field("", description="Heading of the report.")
    dataset: Dataset
    grid: tuple[Grid, ...] = Field(
        (), description="Every combination of its axes is an arm; one grid or a list of grids."
    )
    seed: Seeds = Field((0,), description="Seeds of every arm.")
    arms: tuple[Arm, ...] = Field((), description="Arms beside the grid.")
    backbones: dict[Name, BackboneEntry] = Field({}, description="What backbone names stand for.")
    formulation: Formulation = Field(Formulation(kind="edm"), description="The same for all arms.")
    training: Training
    generation: Generation
    evaluation: Evaluation
    probes: tuple[Probe, ...] = Field(
        (), description="Measurements of networks and targets beside sample quality."
    )
    machine: Machine = Machine()
    notebooks: tuple[Name, ...] = Field(
        ("overview",), description="Notebooks under notebooks/ that the study runs."
    )
    published: Published | None = Field(None, description="The publication that it follows.")
    sources: dict[str, Source] = Field(
        {},
        description="Where each setting comes from, by its key, e.g. training.lr or "
        "arms[0].skip_scaling; `study provenance` shows it beside the value.",
    )

    @field_validator("study")
    @classmethod
    def _own_folder(cls, name: str) -> str:
        if name == "datasets":
            raise ValueError("results/datasets holds the data sets of all studies")
        return name

    @field_validator("probes")
    @classmethod
    def _each_once(cls, probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
        kinds = [probe.kind for probe in probes]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"{kind} is listed twice; a study has one of each kind")
        return probes

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        full = handler.resolve_ref_schema(handler(core))
        grid = full["properties"]["grid"]
        description = grid.pop("description")
        one = grid["items"]
        full["properties"]["grid"] = {"anyOf": [one, grid], "description": description}
        return full


# --- reading and explaining ------------------------------------------------------------------


def _number_in_text(value: Any, whole: bool) -> str | None:
    """What to say of a text that is meant as a number; ``None`` of anything else."""
    if not isinstance(value, str):
        return None
    text = value.strip().replace("_", "")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if not number.is_finite() or abs(number.adjusted()) > 300:
        return None
    if whole and number != int(number):
        return f"{value!r} is text, and not a whole number"
    right = str(int(number)) if whole else f"{float(number):.15g}"
    if "e" in right and "." not in right:
        right = right.replace("e", ".0e")
    elif not whole and "e" not in right and "e" in text.lower():
        mantissa, _, power = text.lower().partition("e")
        right = f"{float(mantissa)}e{int(power):+d}"
    if "e" in text.lower() and not re.fullmatch(r"[-+]?\d*\.\d*[eE][-+]\d+", text):
        why = "YAML 1.1 reads a number with an exponent only with a point and a sign"
    else:
        why = "it stands in quotes"
    return f"{value!r} is text ({why}); write {right}"


def _siblings(model: type[BaseModel] | None, where: tuple[Any, ...]) -> list[str]:
    """Field names of the section that holds the last key of ``where``."""
    current: Any = model
    for part in where[:-1]:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        found = [
            kind
            for kind in _walk(field.annotation)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if found:
            current = found[0]
    return list(getattr(current, "model_fields", {}))


def _walk(annotation: Any) -> list[Any]:
    nested = [item for part in getattr(annotation, "__args__", ()) for item in _walk(part)]
    return [annotation, *nested]


def _place(item: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where a mistake is, without the parts that name a branch of a union."""
    pydantic = r"\[|^Grid$|^function|^tuple|^int$|^constrained-int$"
    return tuple(
        part for part in item["loc"] if isinstance(part, int) or not re.search(pydantic, part)
    )


def _of_another_branch(item: Any, others: list[Any]) -> bool:
    """Whether a union has a branch of the value's own type, whose mistake says more."""
    place = _place(item)
    return item["type"].endswith("_type") and any(
        _place(other)[: len(place)] == place
        and (not other["type"].endswith("_type") or others.index(other) < others.index(item))
        for other in others
        if other is not item
    )


def explain(
    error: ValidationError, model: type[BaseModel], prefix: str = "", whole: str = "study"
) -> list[str]:
    """One line per mistake: key, value, and what is allowed. ``whole`` is the key of the model."""
    lines = []
    details = error.errors()
    for item in details:
        if _of_another_branch(item, details):
            continue
        where = _place(item)
        if item["type"] == "too_short" and any(
            other["loc"][: len(item["loc"])] == item["loc"] and other is not item
            for other in details
        ):
            continue  # a list of which no item was valid: the items' own mistakes say why
        key = prefix + ".".join(str(part) for part in where)
        key = re.sub(r"\.(\d+)", r"[\1]", key) or whole
        if key.startswith("grid[0]") and not any(o["loc"][:2] == ("grid", 1) for o in details):
            key = "grid" + key.removeprefix("grid[0]")
        value, kind = item["input"], item["type"]
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        nested = item.get("ctx", {}).get("error")
        if isinstance(nested, _Mistakes):
            lines += [f"{key}.{line}" if line[0] != ":" else key + line for line in nested.lines]
        elif kind == "extra_forbidden":
            known = _siblings(model, where)
            close = difflib.get_close_matches(str(where[-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif kind == "missing" and where and isinstance(where[-1], int):
            lines.append(f"{key.rpartition('[')[0]}: too few values; got {shown}")
        elif kind == "missing":
            lines.append(f"{key}: missing")
        elif kind in ("float_type", "int_type") and _number_in_text(value, kind == "int_type"):
            lines.append(f"{key}: {_number_in_text(value, kind == 'int_type')}")
        elif kind == "int_type" and isinstance(value, float) and value.is_integer():
            lines.append(f"{key}: a whole number is written without point; write {int(value)}")
        elif kind == "string_type" and isinstance(value, int | float):
            lines.append(f"{key}: {shown} is no text to YAML; write it in quotes")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if kind != "value_error":
                message = message[0].lower() + message[1:]
            lines.append(f"{key}: {message}; got {shown}")
    return list(dict.fromkeys(lines))


def check(model: type[BaseModel], value: Any, prefix: str = "") -> BaseModel:
    """Validate strictly (text is never read as a number). Raises ``UserError``, a line each."""
    for key, leaf in leaves(value, prefix.rstrip(".")).items():
        for number in leaf if isinstance(leaf, list | tuple) else (leaf,):
            if isinstance(number, int) and abs(number) >= 2**63:
                raise UserError(f"{key}: {str(number)[:20]}... is beyond 64 bits")
    try:
        return model.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise UserError(*explain(error, model, prefix)) from None


def leaves(content: Any, where: str = "") -> dict[str, Any]:
    """Every value that a study's content sets, by its key: ``training.lr``, ``arms[0].seed``.

    Mappings and lists of mappings are followed; other lists are values.
    """
    if isinstance(content, Mapping) and content:
        items = [(f"{where}.{key}" if where else str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple) and any(isinstance(v, Mapping) for v in content):
        items = [(f"{where}[{number}]", value) for number, value in enumerate(content)]
    else:
        return {where: content}
    return {key: leaf for path, value in items for key, leaf in leaves(value, path).items()}


def _check_sources(content: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for a source of a key that the study does not set."""
    set_here = leaves({key: value for key, value in content.items() if key != "sources"})
    # In a resolved study ``none`` is ``{method: none, ...}``, and one grid is a list of one.
    known = {key[: at.start()] for key in set_here for at in re.finditer(r"[.[]|$", key)}
    if len(content.get("grid") or ()) == 1:
        known |= {re.sub(r"^grid\[0\]", "grid", key) for key in known}
    lines = []
    for key in content.get("sources") or {}:
        if key not in known:
            close = difflib.get_close_matches(key, set_here, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "leave the entry out"
            lines.append(f"sources.{key}: the study sets no such key; {hint}")
    if lines:
        raise UserError(*lines)


def read(path: str | Path) -> dict[str, Any]:
    """The content of a study's file, unchecked. Raises ``UserError`` where it is none."""
    from study.yamlfile import read as read_file

    return read_file(path)


def override(text: str) -> dict[str, Any]:
    """The content that ``key=value`` of a command line stands for, its value as in a study's file.

    ``training={steps: 24}`` is ``{"training": {"steps": 24}}``. Raises ``UserError``.
    """
    from study.yamlfile import value

    key, _, content = text.partition("=")
    return {key: value(content, f"--config {text}")}


def load(source: str | Path | Mapping[str, Any]) -> Study:
    """Read a study from a YAML file or a mapping.

    Raises ``UserError`` with one line per mistake: the key, the value, and what is allowed.
    """
    content = dict(source) if isinstance(source, Mapping) else read(source)
    study = dict(content)
    if isinstance(study.get("grid"), Mapping):
        study["grid"] = [study["grid"]]
    result = check(Study, study)
    _check_sources(content)
    return result


def schema() -> dict[str, Any]:
    """The JSON schema of a study."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Study.model_json_schema(),
    }
