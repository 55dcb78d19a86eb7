"""How the quality of runs is measured: protocols, and the measurements that they make of a run.

In a protocol a list is an axis; every cell of its axes is a measurement of each run.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_serializer, model_validator

from study.files import canonical_json
from study.spec.base import Model, Name, Shorthand, axis, call, digest, slug
from study.spec.extractors import Extractor
from study.spec.guidance import GuidanceOptions
from study.spec.metrics import METRICS, NUMBERS
from study.spec.samplers import Sampler

MEASUREMENT_PATTERN = r"(?:final|best|step\d+)-[a-z0-9.-]+-[0-9a-f]{8}"
"""What a measurement's folder name looks like."""


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


WHICH = "neither final, snapshots, a step nor best(<protocol>)"


class Best(Shorthand):
    """The best snapshot by another protocol: best(name); or a mapping."""

    best: Name = Field(description="The protocol whose measurements tell which snapshot is best.")
    metric: Literal[tuple(NUMBERS)] = Field(  # type: ignore[valid-type]
        "fd", description="By which number of its metrics."
    )
    extractor: str | None = Field(
        None, description="On which of its extractors' features; null = its first."
    )

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        name, argument = call(text)
        if name != "best" or not argument:
            raise ValueError(WHICH)
        return {"best": argument}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core, handler)
        schema["anyOf"][0]["pattern"] = r"^\s*best\s*\("  # no other text of `at` is one
        return schema


def _at(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return "<step>"
    if isinstance(value, str | Mapping | Best):
        return "<word>" if value in ("final", "snapshots") else "<best>"
    return None


At = Annotated[
    Annotated[Literal["final", "snapshots"], Tag("<word>")]
    | Annotated[int, Field(ge=0), Tag("<step>")]
    | Annotated[Best, Tag("<best>")],
    Discriminator(_at, "unknown_at", WHICH),
]


class Classes(Model):
    """Some of the data set's classes, which take turns."""

    classes: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="Their numbers, from 0."
    )


def _labels(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return "<class>"
    if isinstance(value, str):
        return "<word>"
    return "<classes>" if isinstance(value, Mapping | Classes) else None


Labels = Annotated[
    Annotated[Literal["data", "uniform"], Tag("<word>")]
    | Annotated[
        int, Field(ge=0), AfterValidator(lambda one: Classes(classes=(one,))), Tag("<class>")
    ]
    | Annotated[Classes, Tag("<classes>")],
    Discriminator(_labels, "unknown_labels", "neither data, uniform, a class nor some classes"),
]
"""data: classes by their shares in the data set; uniform: all take turns; or some of them."""

Metric = Literal[tuple(METRICS)]  # type: ignore[valid-type]

WEIGHTS_PATTERN = r"^(raw|ema([2-9]|[1-9]\d+)?)$"
"""Which weights: those of the last step, or the first, second, ... average."""


class Only(Model):
    """Some of a study's arms: those that have one of the given values in every given key."""

    dataset: axis(str) | None = Field(None, description="Names of data sets.")
    backbone: axis(str) | None = Field(None, description="Names of backbones.")
    skip_scaling: axis(str) | None = Field(None, description="Skip scalings, e.g. cs(0.7).")
    target: axis(str) | None = Field(None, description="Targets: dsm, stf, or stf(n).")
    formulation: axis(str) | None = Field(None, description="Kinds of formulations.")
    name: axis(str) | None = Field(None, description="Names of arms.")
    seed: axis(int) | None = Field(None, description="Seeds.")

    def given(self) -> dict[str, tuple[Any, ...]]:
        """The keys that choose, with their values."""
        return {key: value for key, value in self if value is not None}


class Protocol(Model):
    """How quality is measured. A list is an axis: every combination is a measurement."""

    like: Name | None = Field(
        None, exclude=True, description="What is left out is as in the protocol of this name."
    )
    at: axis(At) = Field(
        ("final",),
        description="Which weights of the training: final, snapshots (all that are kept), a step, "
        "or best(<protocol>).",
    )
    weights: axis(Annotated[str, Field(pattern=WEIGHTS_PATTERN)]) = Field(
        ("ema",), description="ema, ema2, ... (the averages of training.ema in order), or raw."
    )
    sampler: axis(Sampler) = Field(description="Sampler and its options.")
    guidance: axis(Guidance | None) = Field(
        (None,), description="Classifier-free guidance: a scale, or {kind, scale, channels}."
    )
    images: axis(Annotated[int, Field(ge=1)] | None) = Field(
        (None,), description="How many; null = as many as the data set has."
    )
    seeds: axis(Annotated[int, Field(ge=0)]) = Field(
        (0,), description="Seed of the first sample; sample i has that seed + i."
    )
    labels: axis(Labels) = Field(
        ("data",),
        description="Classes of the samples: data (as in the data set), uniform, a class, or "
        "{classes: [...]}.",
    )
    extractors: axis(Extractor) = Field(
        description="Whose features are compared; samples are made once for all of them."
    )
    metrics: tuple[Metric, ...] = Field(
        tuple(METRICS), min_length=1, description="Frechet, KID, IS, precision/recall."
    )
    keep: Literal["samples", "grid", "none"] = Field(
        "samples",
        description="What stays of the samples when they are measured; nothing reruns for it.",
    )
    only: Only | None = Field(None, description="Measure these arms alone; null = all.")

    @model_validator(mode="after")
    def _acts(self) -> "Protocol":
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: {', '.join(self.metrics)} lists one twice")
        for metric in self.metrics:
            if not any(metric in given for given in self.measured().values()):
                kind = self.extractors[0].kind
                raise ValueError(
                    f"metrics: {metric!r} needs class logits, which {kind} does not have"
                )
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        full = handler.resolve_ref_schema(handler(core))
        full["anyOf"] = [{"required": ["like"]}, {"required": full.pop("required")}]
        return full

    def measured(self) -> dict[str, tuple[str, ...]]:
        """The metrics of each extractor: all that it can give."""
        return {
            one.kind: tuple(
                metric
                for metric, row in METRICS.items()
                if metric in self.metrics and (one.logits or not row.logits)
            )
            for one in self.extractors
        }

    def cells(self) -> Iterator[dict[str, Any]]:
        """Every combination of the axes that a measurement depends on."""
        axes = ("at", "weights", "sampler", "guidance", "images", "seeds", "labels")
        for values in itertools.product(*(getattr(self, one) for one in axes)):
            cell = dict(zip(axes, values, strict=True))
            cell["seed"] = cell.pop("seeds")
            yield cell


class BestOf(Model):
    """The snapshot with the best value of a metric, of these measurements of the run."""

    best: tuple[str, ...] = Field(min_length=1)
    extractor: str
    metric: str


class Decoding(Model):
    """What turns latents into images: the setting of it, wherever the weights lie."""

    scale: float = Field(gt=0)


class Measurement(Model):
    """What samples depend on but the run: one cell of a protocol, and how latents are decoded."""

    at: Annotated[
        Annotated[Literal["final"], Tag("<word>")]
        | Annotated[int, Field(ge=0), Tag("<step>")]
        | Annotated[BestOf, Tag("<best>")],
        Discriminator(lambda at: "<best>" if isinstance(at, BestOf | Mapping) else _at(at)),
    ] = "final"
    weights: Annotated[str, Field(pattern=WEIGHTS_PATTERN)] = "ema"
    sampler: Sampler
    guidance: Guidance | None = None
    images: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    labels: Labels = "data"
    decoder: Decoding | None = None

    @property
    def key(self) -> str:
        """What differs from the defaults, as text: equal for equal settings."""
        return canonical_json(self.model_dump(mode="json", exclude_defaults=True))

    @property
    def name(self) -> str:
        """The name of the measurement's folder: what it is at a glance, and a hash of ``key``."""
        at = "best" if isinstance(self.at, BestOf) else self.at
        parts = [at if isinstance(at, str) else f"step{at}", self.sampler.kind]
        parts += [str(steps)] if (steps := getattr(self.sampler, "steps", None)) else []
        parts += [self.weights] if self.weights != "ema" else []
        parts += [f"g{self.guidance.scale:g}"] if self.guidance else []
        return (
            f"{slug('-'.join(parts))}-{digest(self.model_dump(mode='json', exclude_defaults=True))}"
        )
