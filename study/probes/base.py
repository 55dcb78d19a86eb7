"""What probes look at, what they give back, and the one way in: ``probe``."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from study.backbones.base import Backbone, check_attention
from study.data import Archive, order
from study.diffusion.base import Denoiser
from study.files import UserError, atomic, read_object, sha256, write_json
from study.network import arithmetic, build_network
from study.probes.columns import MEASURED
from study.provenance import Stopwatch, provenance
from study.randomness import generator
from study.spec.base import implementation
from study.spec.explain import check
from study.spec.probes import PROBES, ProbeOptions
from study.spec.run import Spec
from study.trained import BrokenWeights, denoiser_of, load_weights, read_status, weights_file


@dataclass(frozen=True)
class Measured:
    """A probe's result: tidy columns of equal length, and facts that hold for all rows.

    Columns hold Python numbers, texts, or ``None`` for a missing number. Units belong into a
    column's name or the probe's docstring.
    """

    columns: Mapping[str, Sequence[Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], **facts: Any) -> "Measured":
        """From rows that all have the same keys."""
        names = list(rows[0]) if rows else []
        return cls({name: [row[name] for row in rows] for name in names}, facts)


@dataclass(frozen=True)
class DatasetSubject:
    """A data set, and where to compute."""

    archive: Archive
    device: torch.device

    def images(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """The same ``count`` images for equal seeds: x [count, C, H, W] float32 in [-1, 1] (or
        latents) and labels [count] int64 or ``None``, on the device; with ``count`` beyond the
        size of the data set, images return. Latents that are stored as moments are drawn.
        """
        draw = None
        if self.archive.moments:
            shape = (count, self.archive.channels, *[self.archive.resolution] * 2)
            draw = torch.randn(shape, generator=generator(seed, "probe", "latent"))
        x, labels = self.archive.batch(order(seed, 0, count, len(self.archive)), draw)
        return x.to(self.device), None if labels is None else labels.to(self.device)

    def noise(self, shape: Sequence[int], *names: int | str) -> Tensor:
        """Standard normal numbers that are a function of ``names``, float32 on the device."""
        return torch.randn(tuple(shape), generator=generator(*names)).to(self.device)


@dataclass(frozen=True)
class ArmSubject(DatasetSubject):
    """An arm with its seeds: its resolved spec and its network at initialisation."""

    spec: Spec

    def network(self, checkpointing: bool = False) -> Backbone:
        """The network as training starts it, on the device, in training mode."""
        check_attention(self.spec.training.attention, self.device)
        return build_network(self.spec, self.archive, checkpointing).to(self.device)

    def denoiser(self, network: Backbone) -> Denoiser:
        """D(x; sigma) of a network of this arm, in the arm's precision."""
        return denoiser_of(self.spec, network, self.device)

    def images(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """As for a data set, without labels where the arm is unconditional."""
        x, labels = super().images(count, seed)
        return x, labels if self.spec.training.conditional else None


@dataclass(frozen=True)
class RunSubject(ArmSubject):
    """A run that was trained or imported: ``train`` is its folder of weights."""

    train: Path
    status: dict[str, Any]

    def network(self, checkpointing: bool = False, weights: str = "ema") -> Backbone:
        """The trained network (``ema`` or ``raw`` weights) on the device, in evaluation mode."""
        network = super().network(checkpointing)
        load_weights(network, self.train, weights)
        return network.eval()


@dataclass(frozen=True)
class StudySubject(DatasetSubject):
    """A study: the resolved specs of all its runs."""

    specs: tuple[Spec, ...]

    def arm(self, spec: Spec) -> ArmSubject:
        """One of them as a subject of its own."""
        return ArmSubject(self.archive, self.device, spec)


def _finite(measured: Measured) -> tuple[Measured, str | None]:
    """The same without measured numbers that are not finite, and a sentence that counts them."""
    columns, lost = dict(measured.columns), []
    for name in MEASURED:
        if name not in columns:
            continue
        broken = [isinstance(one, float) and not math.isfinite(one) for one in columns[name]]
        if any(broken):
            kept = zip(columns[name], broken, strict=True)
            columns[name] = [None if bad else one for one, bad in kept]
            lost.append(f"{sum(broken)} of {len(broken)} in column {name}")
    reason = f"left out because they are not finite: {', '.join(lost)}" if lost else None
    return Measured(columns, measured.facts), reason


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _write(out: Path, measured: Measured) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({name: list(values) for name, values in measured.columns.items()})
    with atomic(out) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


def _skip(out: Path, reason: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run leaves that has nothing to be looked at: a table without rows, and why."""
    print(f"study: {reason}: nothing is measured", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, Measured({}))
    result = {"status": "skipped", "reason": reason, **facts, "provenance": provenance()}
    write_json(out.with_suffix(".json"), result)
    return result


def probe(
    kind: str,
    data: str | Path,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    run_dir: str | Path | None = None,
    spec: Spec | dict[str, Any] | None = None,
    manifest: str | Path | None = None,
    threads: int | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Measure with one probe; write ``out`` (Parquet, tidy) and, last, ``out`` with ``.json``.

    A probe of runs takes ``run_dir`` (which holds ``train/``), one of arms takes ``spec`` or the
    ``run_dir`` of a run that was trained with it, one of a study takes ``manifest``
    (``study.json``). A run that diverged, or whose weights are not finite, gives a table without
    rows and the status "skipped". A measured number that is not finite is left out, and ``reason``
    counts such numbers. Returns what the JSON holds. Raises ``UserError`` for an unknown probe and
    for a subject that is missing.
    """
    if threads:
        torch.set_num_threads(threads)
    if kind not in PROBES:
        raise UserError(f"probe: {kind!r} is unknown; allowed: {', '.join(PROBES)}")
    model = PROBES[kind]
    chosen = check(model, dict(options or {}), f"{kind}.")
    out, device, archive = Path(out), _device(), Archive(data)
    if model.subject == "arm" and spec is None and run_dir is not None:
        spec = read_status(Path(run_dir) / "train")["spec"]
    given = {"run": run_dir, "arm": spec, "dataset": data, "study": manifest}[model.subject]
    if given is None:
        what, option = {
            "run": ("a run", "--run-dir"),
            "arm": ("an arm", "--run-dir or --spec"),
            "study": ("a study", "--manifest"),
        }[model.subject]
        raise UserError(f"probe {kind}: looks at {what}; {option} is missing")
    facts: dict[str, Any] = {"kind": kind, "options": chosen.model_dump(mode="json")}
    facts |= {"code": code, "data_sha256": archive.sha256}
    subject: DatasetSubject
    if model.subject == "run":
        train = Path(given) / "train"
        status = read_status(train)
        facts |= {"spec": status["spec"], "trained_on_sha256": status.get("data_sha256")}
        if status["status"] == "diverged":
            reason = f"training diverged at step {status['step']}: {status['reason']}"
            return _skip(out, reason, facts)
        described = Spec.read(status["spec"])
        subject = RunSubject(archive, device, described, train, status)
        weights = weights_file(train, getattr(chosen, "weights", "ema"))
        facts |= {"weights_sha256": sha256(weights)}
    elif model.subject == "arm":
        described = Spec.read(spec)
        subject = ArmSubject(archive, device, described)
        facts |= {"spec": described.content()}
    elif model.subject == "study":
        listed = read_object(manifest).get("runs")
        if not isinstance(listed, list) or not all(
            isinstance(entry, dict) and "spec" in entry for entry in listed
        ):
            raise UserError(f"{manifest}: lists no runs; it should be results/<study>/study.json")
        specs = tuple(Spec.read(entry["spec"]) for entry in listed)
        facts |= {"networks": len({s.backbone.model_dump_json() for s in specs})}
        subject = StudySubject(archive, device, specs)
    else:
        subject = DatasetSubject(archive, device)
    precision = subject.spec.training.precision if isinstance(subject, ArmSubject) else "fp32"
    stopwatch = Stopwatch(device)
    try:
        with arithmetic(precision):
            measured, reason = _finite(implementation(chosen.implementation)(subject, chosen))
    except BrokenWeights as error:
        return _skip(out, str(error), facts)
    if reason:
        print(f"study: probe {kind}: numbers {reason}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, measured)
    result = {
        "status": "done",
        "reason": reason,
        **facts,
        "facts": dict(measured.facts),
        "rows": len(next(iter(measured.columns.values()), ())),
        "seconds": stopwatch.seconds,
        "peak_memory_mib": stopwatch.peak_memory_mib,
        "provenance": provenance(device),
    }
    write_json(out.with_suffix(".json"), result)
    return result


__all__ = [
    "ArmSubject",
    "DatasetSubject",
    "Measured",
    "ProbeOptions",
    "RunSubject",
    "StudySubject",
    "probe",
]
