"""How far every run of a study is, told from its files; works beside a running workflow."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.arms import Run, probed
from study.arms import runs as resolve
from study.averaging import remark
from study.files import UserError, printable, read_json
from study.ledger import contents, digest
from study.ledger.progress import check_folder, duration, read_progress
from study.spec.guidance import guidance_options
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
class State:
    """Where one run stands. ``left`` is in seconds; ``note`` says more, for people."""

    run: Run
    state: str
    stage: str = ""
    step: int | None = None
    steps: int | None = None
    left: float | None = None
    note: str = ""


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except UserError:
        return None
    return content if isinstance(content, dict) else None


def outdated(run: Run, status: Mapping[str, Any], data: str | None = None) -> str:
    """Why a finished training is not what would be trained today; empty if it is.

    ``data`` is the hash of the data set as it is now, where that is known.
    """
    try:
        same = Spec.read(status["spec"]).key == run.spec.key
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


def _unlike(study: Study, stage: str, run: Run, facts: Mapping[str, Any]) -> str:
    """Why finished samples or metrics are not what would be made today; empty if they are."""
    protocol = study.generation
    if stage == "generate":
        code = digest.generation(run.spec, protocol.sampler)
    else:
        code = digest.stage("evaluate")
    if facts.get("code") not in (None, code):
        return "its code has changed"
    if stage == "evaluate":
        same = facts.get("protocol") in (None, study.evaluation.protocol())
        return "" if same else "made by another protocol"
    if facts.get("status") not in ("done", "diverged"):
        return ""
    guidance = guidance_options(
        protocol.guidance and protocol.guidance.model_dump(mode="json"), run.spec.formulation
    )
    drawn = facts["images"] + (facts.get("not_finite") or 0)
    wanted = {
        "sampler": protocol.sampler.model_dump(mode="json"),
        "guidance": guidance and guidance.model_dump(mode="json"),
        "seed": protocol.seed,
        "weights": protocol.weights,
        "images": protocol.images or drawn,
    }
    same = all({**facts, "images": drawn}.get(key) == value for key, value in wanted.items())
    return "" if same else "made by another protocol"


def _unlike_probe(probe: ProbeOptions, run: Run, facts: Mapping[str, Any]) -> str:
    """Why a finished probe is not what would be made today; empty if it is."""
    if facts.get("code") not in (None, digest.probe(probe.kind, [run.spec])):
        return "its code has changed"
    options = facts.get("options")
    return "" if not options or probe.agrees(options) else "made with other options"


def replaced(study: Study, results: Path) -> str:
    """Why the data set will be converted anew, and all runs with it; empty if it will not be."""
    archive = results / "datasets" / f"{study.dataset.name}.zip"
    former = contents.made_from(archive)
    same = former is None or contents.source(study.dataset.path, archive) == former
    return "" if same else "its data set's source has changed"


def state_of(
    run: Run,
    folder: Path,
    now: float | None = None,
    study: Study | None = None,
    source: str = "",
) -> State:
    """Where the run in ``folder`` stands; with its study, samples and probes are looked at too.

    ``source`` is what `replaced` says.
    """
    now = time.time() if now is None else now
    progress = read_progress(folder)
    status = _json(folder / "train" / "status.json")
    if progress is not None and not (status and progress["stage"] == "train"):
        step, steps = progress["step"], progress["steps"]
        # A training that leaves in order gives the run's lock back.
        held = (folder / "state" / "lock").exists()
        if step < steps and held and now - progress["time"] < ALIVE:
            left = (steps - step) * progress["seconds"] / max(step, 1)
            return State(run, "running", progress["stage"], step, steps, left)
    if status is None:
        if progress is not None and progress["stage"] == "train":
            step, steps = progress["step"], progress["steps"]
            return State(run, "stopped", "train", step, steps, note="the same command resumes")
        return State(run, "missing")
    step, steps = status.get("step"), status.get("steps")
    data = None
    if study is not None:
        archive = folder.parents[2] / "datasets" / f"{study.dataset.name}.zip"
        data = (_json(contents.described(archive)) or {}).get("sha256")
    why = outdated(run, status, data) or source
    if why:
        return State(run, "stale", "train", step, steps, note=why)
    diverged = status.get("status") == "diverged"
    reason = f"{status.get('reason')} at step {step}" if diverged else ""
    for stage, name in (("generate", "generate.json"), ("evaluate", "fidelity.json")):
        facts = _json(folder / stage / name)
        if facts is None:
            return State(run, "waiting", stage, step, steps, note=reason)
        why = "" if study is None else _unlike(study, stage, run, facts)
        if why:
            return State(run, "stale", stage, step, steps, note=f"{stage}: {why}")
        if stage == "generate" and not diverged:
            reason = facts.get("reason") or ""
    for probe in () if study is None else study.probes:
        if run.name not in probed({run.name: run}, probe):
            continue
        facts, name = _json(folder / "probes" / f"{probe.kind}.json"), probe.kind.replace("_", " ")
        if facts is None:
            return State(run, "waiting", "probe", step, steps, note=reason or name)
        why = _unlike_probe(probe, run, facts)
        if why:
            return State(run, "stale", "probe", step, steps, note=f"{name}: {why}")
    return State(run, "diverged" if diverged else "done", "", step, steps, note=reason)


def states(study: Study, results: Path = Path("results")) -> Iterator[State]:
    """Where every run of a study stands, in the study's order."""
    source = replaced(study, results)
    for run in resolve(study).values():
        folder = results / study.study / "runs" / run.name
        yield state_of(run, folder, study=study, source=source)


def _table(study: Study, found: list[State]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("arm", "seed", "state", "step", "left", ""):
        table.add_column(column, justify="right" if column in ("step", "left") else "left")
    averaged = study.generation.weights == "ema"
    for one in found:
        step = "" if one.step is None else f"{one.step}/{one.steps}"
        state = one.state + (f": {one.stage}" if one.stage and one.state != "stale" else "")
        table.add_row(
            Text(one.run.display),
            one.run.axes["seed"],
            Text(state, style=COLOURS[one.state]),
            step,
            "" if one.left is None else duration(one.left),
            Text(printable("; ".join(filter(None, (one.note, averaged and remark(one.run.spec)))))),
        )
    return table


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
    config: str | Path = "config.yaml",
    watch: bool = False,
    results: str | Path = "results",
    interval: float = 2.0,
) -> None:
    """Print where every run of a study stands; with ``watch`` until it is interrupted."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from study.ledger.checks import check, kept_archives, missing_files

    check_folder(results)
    study, results = load(config), Path(results)
    found = resolve(study)
    told = [
        *check(study, found, results),
        *missing_files(study, found, results),
        *kept_archives(study, results),
    ]
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)

    def picture() -> Group:
        found = list(states(study, results))
        if watch:  # a screen shows what moves; the finished and the missing are in the summary
            moving = [one for one in found if one.state not in ("done", "missing")]
            return Group(_table(study, moving[: max(console.height - 4, 1)]), summary(study, found))
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
