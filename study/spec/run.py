"""The settings of a run as one value: what it is called, what it trains, which state it shares.

A run's name is a readable slug and eight hex digits of a hash of its settings alone. The hash
leaves out defaults, so a new option with its default keeps every old name, and it leaves out what
cannot change numbers (``Study.machine``, paths, display names, notes).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from study.files import UserError, canonical_json
from study.spec.backbones import BackboneOptions, Family, family
from study.spec.base import Model, digest, slug
from study.spec.data import DatasetSettings
from study.spec.explain import check, explain
from study.spec.formulations import Formulation, FormulationOptions
from study.spec.scalings import SkipScaling
from study.spec.targets import Target
from study.spec.training import Training

RUN_PATTERN = r"[A-Za-z0-9._-]+-s\d+-[0-9a-f]{8}"
"""What a run's folder name looks like."""

KEPT = ("conditional", "augment", "precision", "attention")
"""Training keys that say something of an imported network as well."""


class Backbone(Model):
    """A family with its options; ``noise_scale`` multiplies the noise number it receives."""

    family: str
    options: SerializeAsAny[BackboneOptions]
    noise_scale: float = Field(1.0, gt=0)

    @classmethod
    def read(cls, content: dict[str, Any]) -> "Backbone":
        """The section that ``content`` describes. Raises ``UserError``."""
        if not isinstance(content.get("family"), str):
            raise UserError("spec.backbone.family: missing")
        try:
            model = family(content["family"]).options
        except UserError as error:
            raise UserError(f"spec.backbone.family: {error}") from None
        options = check(model, content.get("options", {}), "spec.backbone.options.")
        try:
            return cls.model_validate(content | {"options": options})
        except ValidationError as error:
            raise UserError(*explain(error, cls, "spec.backbone.")) from None

    @property
    def row(self) -> Family:
        """The family's row in the registry."""
        return family(self.family)


class Seeds(Model):
    """One seed for each kind of random number of a training."""

    data: int = 0
    init: int = 0
    noise: int = 0


class Untrained(Training):
    """What a run has for a training whose weights are imported."""

    steps: int = 0
    batch: int = 1
    lr: float = 0.0


class Identity(Model):
    """Weights that are imported: their content where its hash is given, else a name for it."""

    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    name: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> "Identity":
        if (self.sha256 is None) == (self.name is None):
            raise ValueError("either sha256 or name says which weights they are")
        return self


@dataclass(frozen=True)
class NetworkTraining:
    """How one network of a run is trained.

    ``split`` is its index (``None`` where one network serves all noise levels), ``start`` the split
    whose averaged weights it starts from, if any.
    """

    split: int | None
    start: int | None
    steps: int
    lr: float
    betas: tuple[float, float]
    warmup: int


class Spec(Model):
    """The resolved settings of a run, the only form in which they travel."""

    dataset: DatasetSettings
    backbone: Backbone
    skip_scaling: SkipScaling
    target: Target
    formulation: SerializeAsAny[FormulationOptions]
    training: SerializeAsAny[Training]
    seeds: Seeds = Seeds()
    checkpoint: Identity | None = None

    @classmethod
    def read(cls, content: Any) -> "Spec":
        """The spec that ``key`` or ``content`` describes; a spec stays as it is.

        What is left out has its default, so a spec from before an option existed stays readable.
        Raises ``UserError`` for anything that is no spec.
        """
        if isinstance(content, Spec):
            return content
        if not isinstance(content, dict):
            raise UserError(f"spec: expected an object of sections; got {type(content).__name__}")
        for section, field in cls.model_fields.items():
            if field.is_required() and section not in content:
                raise UserError(
                    f"spec: section {section!r} is missing; study.json holds whole specs"
                )
        for section, value in content.items():
            if section not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise UserError(f"spec.{section}: unknown; allowed: {known}")
            if section != "checkpoint" and not isinstance(value, dict):
                raise UserError(f"spec.{section}: expected an object")
        imported = content.get("checkpoint") is not None
        return cls(
            dataset=check(DatasetSettings, content["dataset"], "spec.dataset."),
            backbone=Backbone.read(content["backbone"]),
            skip_scaling=check(SkipScaling, content["skip_scaling"], "spec.skip_scaling."),
            target=check(Target, content["target"], "spec.target."),
            formulation=check(Formulation, content["formulation"], "spec.formulation."),
            training=check(
                Untrained if imported else Training, content["training"], "spec.training."
            ),
            seeds=check(Seeds, content.get("seeds", {}), "spec.seeds."),
            checkpoint=check(Identity, content["checkpoint"], "spec.checkpoint.")
            if imported
            else None,
        )

    def model_copy(self, **options: Any) -> "Spec":
        """As of every model, without what was kept of the settings before the change."""
        copy = super().model_copy(**options)
        copy.__dict__.pop("chosen", None)
        return copy

    def changed(self, **sections: dict[str, Any]) -> "Spec":
        """The same with other values of some keys: ``spec.changed(training={"lr": 1e-3})``."""
        content = self.chosen
        return Spec.read({**content, **{k: content.get(k, {}) | v for k, v in sections.items()}})

    def content(self) -> dict[str, Any]:
        """Every setting, in JSON form."""
        whole = self.model_dump(mode="json", exclude={"checkpoint"})
        if self.checkpoint is not None:
            whole["checkpoint"] = self.checkpoint.model_dump(exclude_none=True)
        return whole

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """What differs from the defaults, in JSON form: all that a name depends on."""
        return {"seeds": {}, **self.model_dump(mode="json", exclude_defaults=True)}

    @property
    def key(self) -> str:
        """``chosen`` as text: equal for equal settings, however they were written."""
        return canonical_json(self.chosen)

    @property
    def lineage(self) -> str:
        """The key of all runs that differ only in how long they train, and in what they keep.

        Of several networks that are trained one after another the later ones begin where the
        earlier end, so theirs includes the steps.
        """
        left_out = {"snapshots"} if len(self.models) > 1 else {"snapshots", "steps"}
        training = {k: v for k, v in self.chosen["training"].items() if k not in left_out}
        return canonical_json({**self.chosen, "training": training})

    @property
    def slug(self) -> str:
        """What it is at a glance: family, skip scaling, target."""
        family, scaling = self.backbone.family, self.skip_scaling
        return f"{slug(family)}-{slug(str(scaling))}-{self.target.kind}"

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.slug}-s{self.seeds.init}-{digest(self.chosen)}"

    @property
    def arm(self) -> str:
        """What identifies the arm, whatever its seed."""
        settings = {key: value for key, value in self.chosen.items() if key != "seeds"}
        return f"{self.slug}-{digest(settings)}"

    @property
    def stable(self) -> bool:
        """Whether its targets are those of a stable target field."""
        return self.target.kind == "stf"

    @property
    def models(self) -> list[NetworkTraining]:
        """How the networks of the run are trained, one after another."""
        own = {key: getattr(self.training, key) for key in ("steps", "lr", "betas", "warmup")}
        parts = self.formulation.parts
        if len(parts) == 1:
            split = getattr(self.formulation, "split", None)
            return [NetworkTraining(split=split, start=None, **own)]
        listed = [model.model_dump(exclude_none=True) for model in self.training.models]
        listed = listed or [{"split": number} for number in range(len(parts))]
        return [NetworkTraining(**{"start": None, **own, **model}) for model in listed]

    @property
    def steps(self) -> int:
        """Optimiser steps, over all of its networks."""
        return sum(model.steps for model in self.models)

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The steps whose weights are kept, in order; the last step is the last of them."""
        return self.training.kept(self.steps)

    @property
    def averages(self) -> tuple[str, ...]:
        """What the averages of the weights are called, which every kept step has."""
        return tuple(self.training.averages)

    def kept(self, step: int) -> tuple[str, ...]:
        """Which weights are kept at a step: the averages, and raw ones at the last or by choice."""
        kept = self.training.snapshots
        raw = step == self.snapshots[-1] or (kept is not None and kept.raw)
        return (*self.averages, "raw") if raw else self.averages

    @property
    def unsupported(self) -> str | None:
        """Why such a run cannot be trained or sampled by the stages as they are, if so."""
        if getattr(self.backbone.options, "context_dim", None) is not None:
            return (
                "backbones: context_dim makes a network that is told a text, but data set archives "
                "hold no texts and no text features; such a study can be planned, not run"
            )
        return None

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """Resolution and channels that the data set fixes; ``None`` where its images decide."""
        return self.dataset.shape
