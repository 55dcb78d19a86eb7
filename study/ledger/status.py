"""How far every run of a study is, told from its files; works beside a running workflow."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from study.arms import Run, probed, selected
from study.arms import runs as resolve
from study.averaging import remark
from study.files import JSON_BYTES, UserError, printable
from study.ledger import contents, digest
from study.ledger.progress import duration, read_progress
from study.protocols import Planned
from study.spec.probes import ProbeOptions
from study.spec.run import Spec
from study.spec.study import Study, load

STATES = ("done", "running", "diverged", "waiting", "stopped", "stale", "missing")
"""States of a run.

done: trained, sampled, measured and probed; diverged: the same for a run whose training diverged;
waiting: trained, but samples, metrics or probes are not there yet; running: a job wrote its
progress within the last minute; stopped: a checkpoint is there and nobody works on it; stale: made
by other settings or code than today's; missing: nothing is there.
"""

ALIVE = 60.0
"""Seconds after which a run that writes no progress counts as stopped."""

LISTED = 200
"""Runs up to which each has its row."""

COLOURS = {
    "done": "green",
    "running": "cyan",
    "diverged": "magenta",
    "waiting": "blue",
    "stopped": "yellow",
    "stale": "yellow",
    "missing": "dim",
}


@dataclass(frozen=True)
class Measured:
    """What is there of a run's measurements.

    ``to_sample`` has those without samples of today's code, ``to_measure`` those without metrics
    (with the extractor); ``stale`` says why something that is there is made again; ``reason`` why a
    number is missing.
    """

    to_sample: tuple[Planned, ...] = ()
    to_measure: tuple[tuple[Planned, str], ...] = ()
    stale: str = ""
    reason: str = ""


@dataclass(frozen=True)
class State:
    """Where one run stands. ``left`` is in seconds; ``note`` says more, for people."""

    run: Run
    state: str
    stage: str = ""
    step: int | None = None
    steps: int | None = None
    left: float | None = None
    note: str = ""
    measured: Measured = Measured()

    @property
    def counted(self) -> str:
        """How many of its measurements are there, of how many."""
        missing = {one.name for one, _ in self.measured.to_measure}
        number = len(self.run.measurements)
        return f"{number - len(missing)}/{number}"


def _json(path: str | Path) -> dict[str, Any] | None:
    """An object in a JSON file, if it is one. Studies have thousands: no more is asked here."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def outdated(run: Run, status: Mapping[str, Any], data: str | None = None) -> str:
    """Why a finished training is not what would be trained today; empty if it is.

    ``data`` is the hash of the data set as it is now, where that is known.
    """
    try:
        same = status["spec"] == run.spec.content() or (
            Spec.read(status["spec"]).key == run.spec.key  # another version wrote it
        )
    except (KeyError, TypeError, AttributeError, UserError):  # a spec of another version
        same = False
    if not same:
        return "made with other settings"
    code = status.get("code")
    if code is not None and code != digest.training(run.spec):
        return "the training code has changed"
    if data is not None and status.get("data_sha256", data) != data:
        return "the data set has changed"
    return ""


def _unlike(run: Run, one: Planned, facts: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """Why finished samples are not what would be made today; empty if they are.

    Settings are in the measurement's name; ``trained`` are the weights as they are now.
    """
    code = facts.get("generation_code", facts.get("code"))
    if code not in (None, digest.generation(run.spec, one.cell.sampler)):
        return "generate: its code has changed"
    drawn, now = facts.get("weights_sha256"), _weights(one, trained)
    return "" if None in (drawn, now) or drawn == now else "generate: the run was trained again"


def _weights(one: Planned, trained: Mapping[str, Any]) -> str | None:
    """The hash of the weights that a measurement looks at, where a training's status tells it."""
    which = one.cell.weights
    if one.last and which in ("ema", "raw"):
        return trained.get({"ema": "weights_sha256", "raw": "raw_sha256"}[which])
    return ((trained.get("snapshots") or {}).get(str(one.step)) or {}).get(which)


def _unlike_metrics(one: Planned, kind: str, facts: Mapping[str, Any]) -> str:
    """Why finished metrics are not what would be measured today; empty if they are."""
    if facts.get("code") not in (None, digest.stage("evaluate")):
        return "evaluate: its code has changed"
    wanted = {"extractor": kind, "metrics": list(one.extractors[kind])}
    return "" if facts.get("protocol") in (None, wanted) else "evaluate: other metrics are wanted"


def measured(run: Run, folder: Path, trained: Mapping[str, Any]) -> Measured:
    """Look at the measurements of the run in ``folder``, whose training says ``trained``."""
    to_sample, to_measure = [], []
    stale = reason = ""
    for one in run.measurements:
        place, drawn = f"{folder}/measurements/{one.name}", False
        for kind in one.extractors:
            facts = _json(f"{place}/{kind}.json")
            if facts is None:
                to_measure.append((one, kind))
                facts = None if drawn else _json(f"{place}/generate.json")
                again = "" if facts is None else _unlike(run, one, facts, trained)
                missing = not os.path.exists(f"{place}/samples.npz")  # they may have been dropped
            else:
                again, missing, drawn = _unlike(run, one, facts, trained), False, True
                unlike = again or _unlike_metrics(one, kind, facts)
                if unlike:
                    to_measure.append((one, kind))
                    stale = stale or unlike
                reason = reason or facts.get("reason") or ""
            stale = stale or again
            if (missing or again) and one not in to_sample:
                to_sample.append(one)
    return Measured(tuple(to_sample), tuple(to_measure), stale, reason)


def _unlike_probe(probe: ProbeOptions, run: Run, facts: Mapping[str, Any]) -> str:
    """Why a finished probe is not what would be made today; empty if it is."""
    if facts.get("code") not in (None, digest.probe(probe.kind, [run.spec])):
        return "its code has changed"
    options = facts.get("options")
    return "" if not options or probe.agrees(options) else "made with other options"


def replaced(study: Study, results: Path) -> dict[str, str]:
    """By data set: why it is converted anew, and all its runs with it; empty if it is not."""
    found = {}
    for name, dataset in study.data.items():
        archive = results / "datasets" / f"{name}.zip"
        former = contents.made_from(archive)
        same = former is None or contents.source(dataset.path, archive) == former
        found[name] = "" if same else "its data set's source has changed"
    return found


def _at_work(run: Run, folder: Path, now: float) -> State | None:
    """What a living job says of its progress; a training that stopped, too."""
    state = folder / "state"
    waiting, measuring = [(state, "lock")], state / "measurements"
    for name in sorted(os.listdir(measuring)) if measuring.is_dir() else ():
        if name.endswith(".json"):
            stem = name.removesuffix(".json")
            waiting.append((measuring / stem, f"{stem}.lock"))
    for work, lock in waiting:
        progress = read_progress(work)
        if progress is None:
            continue
        # A training that leaves in order gives the run's lock back.
        held = (work / lock if work == state else work.with_name(lock)).exists()
        step, steps = progress["step"], progress["steps"]
        if step < steps and held and now - progress["time"] < ALIVE:
            left = (steps - step) * progress["seconds"] / max(step, 1)
            return State(run, "running", progress["stage"], step, steps, left)
    return None


def state_of(
    run: Run,
    folder: Path,
    now: float | None = None,
    study: Study | None = None,
    source: Mapping[str, str] | None = None,
    data: Mapping[str, str | None] | None = None,
) -> State:
    """Where the run in ``folder`` stands; with its study, its probes are looked at too.

    ``source`` is what `replaced` says, ``data`` the hashes of data sets as they are now.
    """
    now = time.time() if now is None else now
    status = _json(folder / "train" / "status.json")
    running = _at_work(run, folder, now)
    if running is not None and not (status and running.stage == "train"):
        return replace(running, measured=measured(run, folder, status or {}))
    if status is None:
        progress = read_progress(folder / "state")
        if progress is not None:
            step, steps = progress["step"], progress["steps"]
            note = "the same command resumes"
            return State(run, "stopped", "train", step, steps, note=note, measured=_all(run))
        return State(run, "missing", measured=_all(run))
    step, steps = status.get("step"), status.get("steps")
    name = run.spec.dataset.name
    why = outdated(run, status, (data or {}).get(name)) or (source or {}).get(name)
    if why:
        return State(run, "stale", "train", step, steps, note=why, measured=_all(run))
    diverged = status.get("status") == "diverged"
    found = measured(run, folder, status)
    reason = f"{status.get('reason')} at step {step}" if diverged else found.reason
    at = (run, "waiting", "", step, steps)
    here = State(*at, note=reason, measured=found)
    if found.stale:
        stage = "generate" if found.to_sample else "evaluate"
        return replace(here, state="stale", stage=stage, note=found.stale)
    if found.to_sample or found.to_measure:
        return replace(here, stage="generate" if found.to_sample else "evaluate")
    for probe in () if study is None else study.probes:
        if run.name not in probed({run.name: run}, probe):
            continue
        facts, name = _json(folder / "probes" / f"{probe.kind}.json"), probe.kind.replace("_", " ")
        if facts is None:
            return replace(here, stage="probe", note=reason or name)
        why = _unlike_probe(probe, run, facts)
        if why:
            return replace(here, state="stale", stage="probe", note=f"{name}: {why}")
    return replace(here, state="diverged" if diverged else "done")


def _all(run: Run) -> Measured:
    """Nothing is there yet."""
    wanted = tuple((one, kind) for one in run.measurements for kind in one.extractors)
    return Measured(run.measurements, wanted)


def data_hashes(study: Study, results: Path) -> dict[str, str | None]:
    """The hashes of a study's data sets as they are now, where that is known."""
    return {
        name: (_json(contents.described(results / "datasets" / f"{name}.zip")) or {}).get("sha256")
        for name in study.data
    }


def states(study: Study, results: Path = Path("results")) -> Iterator[State]:
    """Where every run of a study stands, in the study's order."""
    source, data = replaced(study, results), data_hashes(study, results)
    for run in selected(study, resolve(study)).values():
        folder = results / study.study / "runs" / run.name
        yield state_of(run, folder, study=study, source=source, data=data)


def _table(study: Study, found: list[State]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("arm", "seed", "state", "step", "measured", "left", ""):
        right = column in ("step", "measured", "left")
        table.add_column(column, justify="right" if right else "left")
    for one in found:
        step = "" if one.step is None else f"{one.step}/{one.steps}"
        state = one.state + (f": {one.stage}" if one.stage and one.state != "stale" else "")
        table.add_row(
            Text(one.run.display),
            one.run.axes["seed"],
            Text(state, style=COLOURS[one.state]),
            step,
            one.counted,
            "" if one.left is None else duration(one.left),
            Text(printable("; ".join(filter(None, (one.note, young(one.run)))))),
        )
    return table


def young(run: Run) -> str:
    """What to say of an average that has hardly begun, where the run is measured with it."""
    main = next(iter(run.measurements), None)
    return remark(run.spec, main.cell.weights, main.step) if main else ""


def summary(study: Study, found: list[State]) -> str:
    """One line: how many runs are in which state."""
    count = Counter(one.state for one in found)
    parts = [f"{count[state]} {state}" for state in STATES if count[state]]
    return f"{study.study}: {len(found)} runs: {', '.join(parts)}"


def checkpoints(study: Study, results: Path = Path("results")) -> str:
    """What the checkpoints of a study take on disk, for people; empty where there are none."""
    runs = results / study.study / "runs"
    sizes = [path.stat().st_size for path in runs.glob("*/state/checkpoint*.pt")]
    if not sizes:
        return ""
    return (
        f"{len(sizes)} checkpoints take {sum(sizes) / 1e6:,.1f} MB under {runs}/*/state; a "
        "finished run needs its own only to write lost weights again without training"
    )


def show(
    config: str | Path | Mapping[str, Any] = "config.yaml",
    watch: bool = False,
    results: str | Path = "results",
    interval: float = 2.0,
) -> None:
    """Print where every run of a study stands; with ``watch`` until it is interrupted."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from study.ledger.checks import check, kept_archives, missing_files

    study, results = load(config), Path(results)
    found = resolve(study)
    told = [
        *check(study, found, results),
        *missing_files(study, selected(study, found), results),
        *kept_archives(study, results),
    ]
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)

    def picture() -> Group:
        found = list(states(study, results))
        # What moves; the finished and the missing are in the summary.
        moving = [one for one in found if one.state not in ("done", "missing")]
        if watch:
            return Group(_table(study, moving[: max(console.height - 4, 1)]), summary(study, found))
        if len(found) > LISTED:
            return Group(
                _table(study, moving[:LISTED]),
                Text(summary(study, found)),
                Text(f"of more than {LISTED} runs those are listed that move; --only chooses some"),
            )
        return Group(
            _table(study, found), Text(summary(study, found)), Text(checkpoints(study, results))
        )

    if not watch:
        console.print(picture())
        for line in told:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        return
    try:
        with Live(picture(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(picture(), refresh=True)
    except KeyboardInterrupt:
        pass
