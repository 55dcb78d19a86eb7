"""A study: what ``config.yaml`` may say, with every default.

``load`` checks a study and explains mistakes in one line each; ``schema`` gives the JSON schema
that ``workflow/schemas/study.schema.json`` holds. No heavy imports: the Snakefile reads this.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from study.files import UserError
from study.spec.backbones import FAMILIES
from study.spec.base import Model, Name, Options, Place, Shorthand, axis
from study.spec.data import Dataset
from study.spec.explain import check, leaves
from study.spec.formulations import EDMOptions, Formulation
from study.spec.measuring import Only, Protocol
from study.spec.origins import Published, Source
from study.spec.probes import Probe
from study.spec.run import Identity
from study.spec.scalings import SkipScaling
from study.spec.targets import Target
from study.spec.training import Seeds, Training


class Machine(Model):
    """Speed only: nothing here changes results beyond rounding, and nothing reruns.

    `compile`, `channels_last` and `cudnn_benchmark` change rounding. One exception: with
    training.dropout, masks are drawn for each process and micro-batch, so `processes` and
    `micro_batch` draw others. The dynamics log of several processes shows the first one's share of
    the batch.
    """

    gpus: int = Field(0, ge=0, description="GPUs of this machine that jobs may use.")
    jobs_per_gpu: int = Field(1, ge=1, description="Jobs that share one GPU.")
    threads: int = Field(1, ge=1, description="CPU threads per training or sampling job.")
    processes: int = Field(1, ge=1, description="Processes per training, each with a GPU if any.")
    micro_batch: int | None = Field(
        None, ge=1, description="Images at a time per process; null = the whole share."
    )
    checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    log_every: int | None = Field(
        None, ge=1, description="Steps per log row; null = the power of two with 100 to 200 rows."
    )
    save_every: float = Field(
        60.0,
        gt=0,
        description="Seconds between checkpoints; more where they would take over 2 percent of the "
        "time.",
    )
    sampling_batch: int = Field(256, ge=1, description="Images that are sampled at a time.")
    resident_mib: int = Field(4096, ge=0, description="Keep data sets up to this size in memory.")
    compile: bool = Field(
        False, description="Train compiled networks (torch.compile; needs a C++ compiler)."
    )
    channels_last: bool = Field(
        False, description="Keep convolutions' weights in the order that tensor cores want."
    )
    cudnn_benchmark: bool = Field(
        False, description="Let cuDNN try its algorithms and take the fastest."
    )


class BackboneEntry(Model):
    """What a backbone name of this study stands for."""

    family: str | None = Field(
        None,
        description="Family, or your own backbone as package.module:Class; null = the entry's own "
        "name.",
        examples=list(FAMILIES),
    )
    preset: str | None = Field(None, description="Published or tiny size to start from.")
    options: dict[str, Any] = Field({}, description="Options that differ from the preset.")
    noise_scale: float = Field(
        1.0, gt=0, description="Multiplies the noise number that the network receives."
    )
    training: dict[str, Any] = Field({}, description="Training keys for this backbone only.")


class Grid(Model):
    """Axes of a grid; every combination is an arm."""

    dataset: axis(Name) | None = Field(
        None, description="Names under `datasets`; null = the only one."
    )
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

    @property
    def identity(self) -> Identity:
        """What is a setting: the content where its hash is given, a name for it otherwise."""
        return Identity(sha256=self.sha256) if self.sha256 else Identity(name=self.label)

    @property
    def label(self) -> str:
        """What people call the weights."""
        return self.name or Path(self.path).name


class Arm(Model):
    """One extra arm: what differs from the study's settings."""

    name: str | None = Field(None, min_length=1, description="Display name, free text.")
    dataset: Name | None = Field(None, description="A name under `datasets`; null = the only one.")
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


class Study(Model):
    """A study: data sets, a grid of arms, extra arms, protocols."""

    study: Name = Field(description="Name; results/<study> and reports/<study>.")
    title: str = Field("", description="Heading of the report.")
    dataset: Dataset | None = Field(None, description="The data set; or `datasets`.")
    datasets: dict[Name, Dataset] = Field(
        {}, description="Several data sets by their names; grids and arms choose."
    )
    grid: tuple[Grid, ...] = Field(
        (), description="Every combination of its axes is an arm; one grid or a list of grids."
    )
    seed: Seeds = Field((0,), description="Seeds of every arm.")
    arms: tuple[Arm, ...] = Field((), description="Arms beside the grid.")
    backbones: dict[Name, BackboneEntry] = Field({}, description="What backbone names stand for.")
    formulation: Formulation = Field(EDMOptions(), description="The same for all arms.")
    training: Training
    protocols: dict[Name, Protocol] = Field(
        min_length=1,
        description="How quality is measured. Tables of arms compare the numbers of the one called "
        "final, else of the first by name, in the first of its cells.",
    )
    only: Only | None = Field(
        None, description="Work on these arms alone; for command lines, as in --config 'only=...'."
    )
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

    @model_validator(mode="after")
    def _has_data(self) -> "Study":
        if self.dataset is None and not self.datasets:
            raise ValueError("dataset: missing; a study has `dataset`, or several as `datasets`")
        if self.dataset is not None and self.datasets:
            raise ValueError("dataset: the study has `datasets`, too; put it there")
        return self

    @property
    def data(self) -> dict[str, Dataset]:
        """The data sets by name, however many."""
        return self.datasets or {self.dataset.name: self.dataset}

    @property
    def extractors(self) -> dict[str, Options]:
        """The extractors of all protocols by kind, each with the options that it has first."""
        found: dict[str, Options] = {}
        for protocol in self.protocols.values():
            for one in protocol.extractors:
                found.setdefault(one.kind, one)
        return found

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        full = handler.resolve_ref_schema(handler(core))
        grid = full["properties"]["grid"]
        description = grid.pop("description")
        one = grid["items"]
        full["properties"]["grid"] = {"anyOf": [one, grid], "description": description}
        (named,) = full["properties"]["datasets"]["patternProperties"].items()
        dataset = handler.resolve_ref_schema(named[1])
        unnamed = {**dataset, "required": [key for key in dataset["required"] if key != "name"]}
        full["properties"]["datasets"]["patternProperties"] = {named[0]: unnamed}
        return full


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
    from study.spec.yamlfile import read as read_file

    return read_file(path)


def override(text: str) -> dict[str, Any]:
    """The content that ``key=value`` of a command line stands for, its value as in a study's file.

    ``training={steps: 24}`` is ``{"training": {"steps": 24}}``. Raises ``UserError``.
    """
    from study.spec.yamlfile import value

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
    if isinstance(study.get("datasets"), Mapping):
        study["datasets"] = _named(study["datasets"])
    if isinstance(study.get("protocols"), Mapping):
        study["protocols"] = _protocols(study["protocols"])
    try:
        result = check(Study, study)
    except UserError as error:
        raise UserError(*_once(str(error).splitlines(), content)) from None
    _check_sources(content)
    return result


def _named(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets with their keys as their names."""
    named = {}
    for key, one in datasets.items():
        if isinstance(one, Mapping) and one.get("name", key) != key:
            raise UserError(f"datasets.{key}.name: {one['name']!r}; leave it out, or write {key}")
        named[key] = {"name": key, **one} if isinstance(one, Mapping) else one
    return named


def _protocols(protocols: Mapping[str, Any]) -> dict[str, Any]:
    """The protocols with what they take from others, and every number of a sampler's steps."""
    whole: dict[str, Any] = {}
    for name, one in protocols.items():
        if isinstance(one, Mapping) and "like" in one:
            other = protocols.get(one["like"]) if isinstance(one["like"], str) else None
            if not isinstance(other, Mapping) or "like" in other:
                written = {k: v for k, v in protocols.items() if isinstance(v, Mapping)}
                full = (k for k, v in written.items() if "like" not in v)
                raise UserError(
                    f"protocols.{name}.like: {one['like']!r} is no protocol that is written in "
                    f"full; allowed: {', '.join(full) or 'none'}"
                )
            one = {**other, **{key: value for key, value in one.items() if key != "like"}}
        whole[name] = one
        sampler = one.get("sampler") if isinstance(one, Mapping) else None
        if isinstance(sampler, Mapping) and isinstance(sampler.get("steps"), list):
            each = [{**sampler, "steps": steps} for steps in sampler["steps"]]
            whole[name] = {**one, "sampler": each}
    return whole


def _once(lines: list[str], content: Mapping[str, Any]) -> list[str]:
    """The mistakes without those that a protocol has from another one, where they are told."""
    protocols = content.get("protocols")
    found = []
    for line in lines:
        place = re.match(r"protocols\.([^.:]+)\.(\w+)", line)
        one = protocols.get(place[1]) if place and isinstance(protocols, Mapping) else None
        if isinstance(one, Mapping) and "like" in one and place[2] not in one:
            continue
        found.append(line)
    return found or lines


def schema() -> dict[str, Any]:
    """The JSON schema of a study."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Study.model_json_schema(),
    }
