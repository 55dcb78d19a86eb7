"""What a study will cost, before anything starts: runs, steps, parameters, time and disk.

Times come from finished runs with the same backbone where there are any, else from the network's
floating-point operations and a table of speeds. torch is imported only to count
parameters and operations, on the meta device, once per network; the counts are kept on disk.
"""

import heapq
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from study.arms import Run, probed, selected, shorter
from study.arms import runs as resolve
from study.files import UserError, canonical_json, read_json, write_json
from study.ledger import checks, contents, digest
from study.ledger.progress import SECONDS, duration
from study.ledger.status import State, data_hashes, replaced, state_of, young
from study.protocols import Planned
from study.spec.guidance import nfe
from study.spec.probes import ProbeOptions
from study.spec.run import Spec
from study.spec.study import Study, load

SPEED = {
    # family: (one CPU core, one GPU), in GFLOP/s that training reaches. CPU: measured with the tiny
    # presets at batch 64 on an x86 server core. GPU: assumed, until runs on it are there to tell.
    "uvit": (25.0, 20e3),
    "udit": (12.0, 10e3),
    "patch_unet": (23.0, 15e3),
    "ddpmpp": (25.0, 15e3),
    "ncsnpp": (26.0, 15e3),
}
OTHER_SPEED = (20.0, 15e3)
"""Speed assumed for a family that is not in the table."""

TYPICAL_GFLOPS = 0.005
"""Forward pass of a network that has not been counted; serves progress lines only."""

STARTING = 3.0
"""Seconds until a job is at work."""

PROBE = 5.0
"""First guess of what a probe of a run takes."""

EVALUATION = {"inception": (0.03, 0.001), "digits": (0.001, 0.001)}
"""Seconds per image that is measured, on (one CPU core, one GPU)."""

COUNTED = Path(__file__).parent / "networks.json"
"""Counts that come with the package; ``make networks`` writes them."""


COUNT_UP_TO = 200
"""Runs of a study up to which its networks are counted without being asked."""


@dataclass(frozen=True)
class Network:
    """Size of a network: its parameters, and the operations of one image's forward pass."""

    parameters: int
    flops: float


@dataclass
class Row:
    """What one run will cost; ``None`` where it cannot be told. Seconds and bytes.

    ``why`` is empty if nothing is to be done, ``source`` says where the times come from.
    """

    run: Run
    state: State
    steps: int
    images_seen: int
    network: Network | None = None
    seconds: dict[str, float | None] = field(default_factory=dict)
    source: str = ""
    disk: float | None = None
    why: str = ""
    step_seconds: float | None = None

    @property
    def left(self) -> float | None:
        """Seconds that the run still takes on one slot."""
        known = [value for value in self.seconds.values() if value is not None]
        return sum(known) if len(known) == len(self.seconds) else None


# --- networks --------------------------------------------------------------------------------


def _scaling_kind(spec: Spec) -> str:
    """Constant factors have no parameters, so they make networks of the same size."""
    return spec.skip_scaling.method if spec.skip_scaling.learned else "constant"


def _network_key(spec: Spec, shape: tuple[int, int, int]) -> str:
    training = spec.training
    return canonical_json(
        [
            spec.backbone.family,
            spec.backbone.options.model_dump(mode="json"),
            _scaling_kind(spec),
            *shape,
            training.conditional,
            bool(training.augment),
            spec.formulation.kind,
            *([len(spec.models)] if len(spec.models) > 1 else []),
            digest.network(spec),
        ]
    )


def _shape(spec: Spec, results: Path) -> tuple[int, int, int] | None:
    """Resolution, channels and classes of the data, if they are known before conversion."""
    resolution, channels = spec.shape
    classes = spec.dataset.known_classes or 10
    if resolution is None or channels is None:
        return None
    return resolution, channels, classes


def count(spec: Spec, shape: tuple[int, int, int]) -> Network:
    """Count a network's parameters and operations on the meta device. Imports torch.

    Of networks that share the noise levels every image passes one.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from study.backbones import build
    from study.diffusion import formulations

    resolution, channels, classes = shape
    training = spec.training
    classes = classes if training.conditional else 0
    parts = formulations(spec.formulation)
    outputs = channels * parts[0].output_multiplier
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = build(
            spec.backbone,
            spec.skip_scaling,
            resolution=resolution,
            channels=channels,
            out_channels=outputs,
            num_classes=classes,
            augment_dim=9 if training.augment else 0,
        )
        image = torch.empty(1, channels, resolution, resolution)
        label = torch.zeros(1, dtype=torch.int64) if classes else None
        text = getattr(network, "context_shape", None)
        context = {"context": torch.empty(1, *text)} if text else {}
        network(image, torch.empty(1), label, **context)
    parameters = len(parts) * sum(parameter.numel() for parameter in network.parameters())
    return Network(parameters, float(counter.get_total_flops()))


class Networks:
    """Counts of networks: those of the studies that come with the package, and those made here.

    The latter are kept in ``results/.networks.json``. A changed backbone is counted again.
    """

    def __init__(self, results: Path, counting: bool) -> None:
        self.path, self.results, self.counting = results / ".networks.json", results, counting
        self.known: dict[str, Any] = {}
        for path in (COUNTED, self.path):
            with suppress(UserError):
                self.known |= read_json(path)
        self.changed = False
        self.missing: set[str] = set()

    def __call__(self, spec: Spec) -> Network | None:
        shape = _shape(spec, self.results)
        if shape is None:
            return None
        key = _network_key(spec, shape)
        if key not in self.known:
            if not self.counting:
                self.missing.add(key)
                return None
            network = count(spec, shape)
            self.known[key] = [network.parameters, network.flops]
            self.changed = True
        return Network(*self.known[key])

    def save(self) -> None:
        if self.changed:
            write_json(self.path, self.known)


def count_all(configs: Iterable[str | Path]) -> None:
    """Count the networks of studies for the package, where plans find them without torch."""
    networks = Networks(Path("results"), True)
    networks.known = {}
    for config in configs:
        for run in resolve(load(config)).values():
            networks(run.spec)
    write_json(COUNTED, networks.known)


# --- time ------------------------------------------------------------------------------------


def _backbone_key(spec: Spec) -> str:
    return canonical_json([spec.chosen["backbone"], spec.dataset.name, spec.shape])


class Measured:
    """Seconds per image of finished runs, by backbone and stage."""

    def __init__(self, folders: Iterable[Path], gpu: bool) -> None:
        found: dict[tuple[str, str], list[float]] = {}
        keys: dict[str, str] = {}  # most runs have the backbone of another one
        for folder in folders:
            try:
                status = read_json(folder / "train" / "status.json")
                known = repr([status["spec"][part] for part in ("backbone", "dataset")])
                if known not in keys:
                    keys[known] = _backbone_key(Spec.read(status["spec"]))
                key = keys[known]
                device = (status.get("provenance") or {}).get("device") or "cpu"
                if (device != "cpu") != gpu:
                    continue
                if status["images_seen"]:
                    seconds = status["train_seconds"] / status["images_seen"]
                    found.setdefault((key, "train"), []).append(seconds)
                made = next(iter(sorted(folder.glob("measurements/*/generate.json"))), None)
                made = {} if made is None else read_json(made)
                if made.get("images_per_second"):
                    seconds = 1 / (made["images_per_second"] * made["nfe"])
                    found.setdefault((key, "generate"), []).append(seconds)
            except (UserError, KeyError, TypeError):
                continue
        self.seconds = {key: statistics.median(values) for key, values in found.items()}

    def __call__(self, spec: Spec, stage: str) -> float | None:
        """Seconds per image: a training step's share, or one network evaluation in sampling."""
        return self.seconds.get((_backbone_key(spec), stage))


def _speed(family: str, gpu: bool) -> float:
    return SPEED.get(family, OTHER_SPEED)[gpu] * 1e9


def images_of(study: Study, dataset: str, results: Path = Path("results")) -> int | None:
    """Images of a data set, if they are known before it is converted."""
    described = study.data[dataset]
    known = described.images
    if known is None:
        try:
            known = read_json(contents.described(results / "datasets" / f"{dataset}.zip"))["images"]
        except (UserError, KeyError, TypeError):
            return None
    return min(known, described.max_images or known)


def _drawn(images: int | None, one: Planned, spec: Spec) -> float | None:
    """Network evaluations of a measurement; ``images`` are those of its data set."""
    guidance = one.cell.guidance
    guidance = guidance and guidance.model_dump(mode="json")
    return _product(one.cell.images or images, nfe(one.cell.sampler, guidance, spec.formulation))


def guess(rule: str, study: Study, run: Run | None, one: Planned | None = None) -> float:
    """First guess of a job's seconds, without counting; only ratios matter much."""
    gpu = study.machine.gpus > 0
    if run is None or not rule.startswith(("train", "generate")):
        return SECONDS.get(rule, SECONDS.get(rule.partition("_")[0], 5.0))
    per_image = TYPICAL_GFLOPS * 1e9 / _speed(run.spec.backbone.family, gpu)
    if one is None:
        images = run.spec.steps * run.spec.training.batch
        return STARTING + 3 * per_image * images
    images = images_of(study, run.spec.dataset.name) or 10_000
    return STARTING + per_image * (_drawn(images, one, run.spec) or 0.0)


# --- the plan --------------------------------------------------------------------------------


def plan(study: Study, results: str | Path = "results", counting: bool | None = None) -> list[Row]:
    """What every run of a study will cost.

    ``counting`` says whether networks that are not yet counted are (which imports torch); by
    default they are in studies of up to ``COUNT_UP_TO`` runs.
    """
    results = Path(results)
    gpu = study.machine.gpus > 0
    found = selected(study, resolve(study))
    folder = results / study.study / "runs"
    networks = Networks(results, len(found) <= COUNT_UP_TO if counting is None else counting)
    measured = Measured(sorted(results.glob("*/runs/*")), gpu)
    images = {name: images_of(study, name, results) for name in study.data}
    probes = {probe.kind: _probe_seconds(probe, results) for probe in study.probes}
    looked_at = {probe.kind: set(probed(found, probe)) for probe in study.probes}
    source, data = replaced(study, results), data_hashes(study, results)
    rows = []
    before = shorter(found)
    for run in found.values():
        state = state_of(run, folder / run.name, study=study, source=source, data=data)
        known = images[run.spec.dataset.name]
        begun = found[before[run.name][-1]].spec.steps if run.name in before else 0
        row = _row(study, run, state, networks, measured, known, begun)
        again = state.state == "stale" and state.stage == "train"
        todo = [
            seconds(row)
            for kind, seconds in probes.items()
            if run.name in looked_at[kind]
            and (again or not (folder / run.name / "probes" / f"{kind}.json").exists())
        ]
        if todo:
            row.seconds["probe"] = _total(todo)
        rows.append(row)
    networks.save()
    return rows


def _probe_seconds(probe: ProbeOptions, results: Path) -> Callable[[Row], float | None]:
    """Seconds of a run's job of a probe: from those made here with its options, or a first guess.

    Short trainings cost what their steps cost, up to the largest rate: an upper end.
    """
    if probe.kind == "stability_frontier":
        steps = len(probe.lr) * probe.steps
        return lambda row: row.step_seconds and STARTING + steps * row.step_seconds
    paths = sorted(results.glob(f"*/runs/*/probes/{probe.kind}.json"))
    alike = (
        found["seconds"]
        for found in map(read_json, paths)
        if found.get("seconds") is not None and probe.agrees(found.get("options", {}))
    )
    known = list(islice(alike, 50))
    seconds = STARTING + (statistics.median(known) if known else PROBE)
    return lambda row: seconds


def _row(
    study: Study,
    run: Run,
    state: State,
    networks: Networks,
    measured: Measured,
    images: int | None,
    begun: int,
) -> Row:
    """What is left of a run; ``begun`` steps are those of a shorter run, which it goes on from."""
    gpu = study.machine.gpus > 0
    steps = run.spec.steps
    if state.state in ("running", "stopped") and state.stage == "train":
        begun = max(begun, state.step or 0)
    row = Row(run, state, steps, steps * run.spec.training.batch)
    row.network = networks(run.spec)
    per_image, source = {}, "measured here"
    for stage, passes in (("train", 3), ("generate", 1)):
        per_image[stage] = measured(run.spec, stage)
        if per_image[stage] is None and row.network is not None:
            speed = _speed(run.spec.backbone.family, gpu)
            per_image[stage] = passes * row.network.flops / speed
            source = "counted operations and a table of speeds"
        elif per_image[stage] is None:
            source = "unknown"
    row.source = source
    row.step_seconds = _product(per_image["train"], row.run.spec.training.batch)
    wanted = {
        "train": _product(per_image["train"], (steps - begun) * run.spec.training.batch),
        "generate": _total(
            _jobs(_product(per_image["generate"], _drawn(images, one, run.spec)))
            for one in state.measured.to_sample
        ),
        "evaluate": _total(
            _jobs(_product(EVALUATION.get(kind, (0.01, 0.001))[gpu], one.cell.images or images))
            for one, kind in state.measured.to_measure
        ),
    }
    wanted["train"] = _jobs(wanted["train"]) if _to_train(state) else 0.0
    row.seconds = wanted
    if state.state not in ("done", "diverged"):
        row.why = state.note or state.state
    row.disk = _disk(study, run, row.network, images)
    return row


def _jobs(seconds: float | None) -> float | None:
    """With what it takes until the job is at work."""
    return None if seconds is None else seconds + STARTING


def _to_train(state: State) -> bool:
    """Whether the run is to be trained, or trained on."""
    return state.state == "missing" or (
        state.state in ("running", "stopped", "stale") and state.stage == "train"
    )


def _disk(study: Study, run: Run, network: Network | None, images: int | None) -> float | None:
    """Bytes that a run leaves: snapshots, its checkpoint, samples that are kept."""
    spec = run.spec
    resolution, channels = spec.shape
    dataset = study.data[spec.dataset.name]
    if dataset.decoder is not None:
        resolution, channels = dataset.measured.shape
    drawn = _total(one.cell.images or images for one in run.measurements if one.keep == "samples")
    samples = _product(drawn, resolution, resolution, channels)
    if network is None or samples is None:
        return None
    # Weights at every snapshot; the checkpoint has weights, averages and two moments.
    kept = sum(len(spec.kept(step)) for step in spec.snapshots)
    return 4.0 * network.parameters * (kept + 3 + len(spec.averages)) + samples


def _total(values: Iterable[float | None]) -> float | None:
    """The sum; ``None`` where one cannot be told."""
    known = list(values)
    return None if None in known else float(sum(known))


def _product(*factors: float | None) -> float | None:
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result


def slots(study: Study) -> tuple[int, str]:
    """How many jobs run at a time here, and on what."""
    machine = study.machine
    if machine.gpus:
        return max(1, machine.gpus * machine.jobs_per_gpu // machine.processes), "GPU"
    return max(1, (os.cpu_count() or 1) // (machine.threads * machine.processes)), "CPU"


def packed(seconds: Iterable[float], slots: int) -> float:
    """Time until all jobs are done on ``slots``, the longest first."""
    ends = [0.0] * slots
    for value in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + value)
    return max(ends)


# --- printing --------------------------------------------------------------------------------


COUNTS, BYTES = ",k,M,G,T", "B,kB,MB,GB,TB"


def _amount(value: float | None, units: str, step: float = 1000.0) -> str:
    if value is None:
        return "?"
    names = units.split(",")
    for name in names:
        if value < step or name == names[-1]:
            break
        value /= step
    return f"{value:.3g} {name}".strip()


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else duration(seconds)


def _table(rows: list[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm")
    columns = ("runs", "steps", "images seen", "parameters", "FLOPs/image", "train", "generate")
    for column in (*columns, "disk"):
        table.add_column(column, justify="right")
    table.add_column("to do")
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row.run.arm, []).append(row)
    for group in arms.values():
        first = group[0]
        network = first.network
        notes = dict.fromkeys(row.why or "-" for row in group)
        table.add_row(
            Text(first.run.display),
            str(len(group)),
            str(first.steps),
            _amount(first.images_seen, COUNTS),
            _amount(network and network.parameters, COUNTS),
            _amount(network and network.flops, COUNTS),
            _time(_total(row.seconds["train"] for row in group)),
            _time(_total(row.seconds["generate"] for row in group)),
            _amount(_total(row.disk for row in group), BYTES),
            Text("; ".join(notes)),
        )
    return table


def _young_averages(rows: list[Row]) -> list[str]:
    """A line for every kind of average that has not begun when its training ends."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(young(row.run), {})[row.run.arm] = row.run.display
    found.pop("", None)
    lines = []
    for text, arms in found.items():
        first, *more = arms.values()
        whose = f"{first} and {len(more)} more arms" if more else first
        lines.append(f"{whose}: {text}; training.ema with rampup: 0.05 forgets them")
    return lines


def summary(study: Study, rows: list[Row], missing: int = 0) -> list[str]:
    """The plan in a few lines."""
    todo = [row for row in rows if row.why]
    arms = len({row.run.arm for row in rows})
    measured = sum(len(row.run.measurements) for row in rows)
    lines = [
        f"{study.study}: {len(rows)} runs of {arms} arms, {len(todo)} of them to do, with "
        f"{measured} measurements"
    ]
    stale = sum(row.state.state == "stale" for row in rows)
    if stale:
        lines[0] += f" ({stale} again: settings or code have changed)"
    steps = sum(row.steps for row in todo)
    known = [row.left for row in todo if row.left is not None]
    number, kind = slots(study)
    probes = sum(row.seconds.get("probe") or 0.0 for row in todo)
    others = [probe.kind for probe in study.probes if probe.subject not in ("run", "arm")]
    if todo and len(known) == len(todo):
        lines.append(
            f"{steps:,} steps; {duration(sum(known))} of one {kind} slot"
            + (f" ({duration(probes)} of it probes of runs)" if probes else "")
            + f", about {duration(packed(known, number))} on the {number} of this machine, and a "
            "minute or two for data, tables and figures"
            + (f"; not counted: {', '.join(others)}" if others else "")
        )
        sources = ", ".join(dict.fromkeys(row.source for row in todo))
        disk = _amount(_total(row.disk for row in rows), BYTES)
        states = _total(
            row.network and 4.0 * row.network.parameters * (3 + len(row.run.spec.averages))
            for row in rows
        )
        states = _amount(states, BYTES)
        lines.append(f"Times: {sources}. Disk: {disk}, checkpoints {states} of it")
        # Weights, gradients, two moments, averages.
        memory = [
            row.network and 4.0 * row.network.parameters * (4 + len(row.run.spec.averages))
            for row in rows
        ]
        if None not in memory:
            lines.append(f"Memory of a training beside activations: {_amount(max(memory), BYTES)}")
    elif todo:
        lines.append(f"{steps:,} steps; no estimate of the time for {len(todo) - len(known)} runs")
    problems = [row.run.spec.unsupported for row in rows]
    problems += _young_averages(rows)
    lines += dict.fromkeys(problem for problem in problems if problem)
    if missing:
        lines.append(f"{missing} networks are not counted yet; `study plan --count` does it")
    return lines


def show(
    config: str | Path | Mapping[str, Any] = "config.yaml",
    arms: bool | None = None,
    results: str | Path = "results",
    counting: bool | None = None,
) -> None:
    """Print what a study will cost; ``arms``: a row for each, by default up to ``COUNT_UP_TO``."""
    from rich.console import Console

    study, results = load(config), Path(results)
    runs = resolve(study)
    told = checks.check(study, runs, results)
    rows = plan(study, results, counting)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if len(rows) <= COUNT_UP_TO if arms is None else arms:
        console.print(_table(rows))
    uncounted = {
        _backbone_key(row.run.spec) + _scaling_kind(row.run.spec)
        for row in rows
        if row.network is None
    }
    for line in [
        *summary(study, rows, len(uncounted)),
        *told,
        *checks.missing_files(study, selected(study, runs), results),
        *checks.changed_sources(study, results),
        *checks.kept_archives(study, results),
    ]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
