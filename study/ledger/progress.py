"""How far a running study is and how long it still takes: single lines, read from files alone.

The workflow's main process hands over the jobs that it is about to run. A thread watches their
logs (a job's log appears when it starts) and outputs (fresh ones mean that it is done), and says
where things stand when something has changed.
"""

import os
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from study.files import UserError, printable, read_json, write_json, write_text
from study.spec.extractors import EXTRACTORS
from study.spec.probes import PROBES

STOP_FILE = "results/.stop"

GROUPS = {
    "convert": "data",
    "extractor": "data",
    "reference": "data",
    "points": "data",
    "train": "train",
    **dict.fromkeys(("generate", "generate_grid", "generate_none"), "generate"),
    **{f"evaluate_{kind}": "evaluate" for kind in EXTRACTORS},
    **{f"probe_{kind}": "probe" for kind in PROBES},
    "aggregate": "report",
    "figures": "report",
    "notebook": "report",
    "report": "report",
}
"""What a rule counts as in the line."""

SERIAL = {"data", "report"}
"""Groups whose jobs wait for each other, however many slots there are."""

SECONDS = {
    "convert": 4.0,
    "extractor": 15.0,
    "reference": 5.0,
    "points": 4.0,
    "generate": 5.0,
    "evaluate": 6.0,
    "aggregate": 5.0,
    "figures": 15.0,
    "notebook": 15.0,
    "report": 5.0,
}
"""First guess of a job's duration, until jobs of its kind have finished."""


OVERHEAD = 1.0
"""Seconds of a slot that a job takes beyond what its files tell: starting, looking, scheduling."""


@dataclass
class Job:
    """A job that is to run: its rule, where it keeps its work, what it writes, what it should cost.

    ``kind`` groups jobs that should take equally long (such as one backbone's trainings);
    ``seconds`` is the first guess of its duration. ``submitted`` says that it was handed over to
    what runs it; a log that is older than ``since`` is that of an earlier attempt.
    """

    rule: str
    work: Path | None
    output: str
    log: str
    kind: str = ""
    seconds: float = 1.0
    since: float = 0.0
    submitted: bool = False
    started: float | None = None
    finished: float | None = None

    def submit(self, now: float) -> None:
        """It is handed over, for the first time or again."""
        self.submitted, self.since = True, now
        # Also if a job of a killed workflow has just written its outputs: it is made again.
        self.started = self.finished = None

    def begun(self) -> bool:
        """Whether its log has appeared since it was handed over."""
        return _fresh(self.log, self.since) is not None


def _fresh(path: str, since: float) -> float | None:
    """Time of the last change of ``path`` if it is not before ``since``.

    A folder counts from the mark that Snakemake leaves in it when its job has ended.
    """
    if os.path.isdir(path):
        path = os.path.join(path, ".snakemake_timestamp")
    try:
        changed = os.stat(path).st_mtime
    except OSError:
        return None
    return changed if changed >= since else None


def duration(seconds: float) -> str:
    """``1:05`` for 65 seconds, ``2:03:04`` from an hour on, ``3 d 4 h`` from two days on."""
    seconds = round(seconds)
    if seconds >= 2 * 86400:
        return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Progress:
    """The state of a set of jobs, brought up to date from files by ``look``.

    ``totals`` counts the jobs of each rule in the whole study, finished ones included; ``slots``
    is how many run at a time, ``None`` where a cluster's queue decides and nobody can say how long
    anything will take; ``begun`` the time since when outputs count as fresh.
    """

    def __init__(
        self,
        results: str | Path,
        jobs: Iterable[Job],
        totals: Mapping[str, int],
        slots: int | None,
        begun: float,
    ) -> None:
        self.results, self.jobs, self.slots, self.begun = Path(results), list(jobs), slots, begun
        for job in self.jobs:
            job.since = max(job.since, begun)
        self.before: dict[str, int] = defaultdict(int)  # done before this start
        self.totals: dict[str, int] = defaultdict(int)
        for rule, count in totals.items():
            self.totals[GROUPS.get(rule, rule)] += count
        self.before.update(self.totals)
        for job in self.jobs:
            self.before[GROUPS.get(job.rule, job.rule)] -= 1

    def look(self, now: float) -> None:
        """Bring every job's start and end up to date."""
        for job in self.jobs:
            if job.finished is not None:
                continue
            if job.started is None and job.begun():
                job.started = now
            job.finished = _fresh(job.output, job.since)
            if job.finished is not None and job.started is None:
                job.started = job.finished

    def _costs(self) -> dict[tuple[str, str], float]:
        """Expected seconds of a job by rule and kind, from those that have finished."""
        measured: dict[tuple[str, str], list[float]] = defaultdict(list)
        guessed: dict[str, float] = defaultdict(float)
        spent: dict[str, float] = defaultdict(float)
        for job in self.jobs:
            if job.finished is not None:
                took = max(job.finished - job.started, 0.0) + OVERHEAD
                measured[job.rule, job.kind].append(took)
                spent[job.rule] += took
                guessed[job.rule] += job.seconds
        # What one kind of job teaches about all others is how fast the machine is, no more.
        everywhere = sum(spent.values()) / sum(guessed.values()) if spent else 1.0
        everywhere = min(max(everywhere, 0.5), 2.0)
        costs = {}
        for job in self.jobs:
            key = job.rule, job.kind
            if key in costs:
                continue
            if key in measured:
                costs[key] = sum(measured[key]) / len(measured[key])
            elif job.rule in spent:
                costs[key] = job.seconds * spent[job.rule] / guessed[job.rule]
            else:
                costs[key] = job.seconds * everywhere
        return costs

    def _remaining(self, job: Job, cost: float, now: float) -> float:
        """Seconds that a job still takes by itself."""
        if job.finished is not None:
            return 0.0
        if job.started is None:
            return cost
        if job.work is not None:
            facts = read_progress(job.work)
            if facts and facts["time"] >= self.begun:
                left = (facts["steps"] - facts["step"]) * facts["seconds"] / max(facts["step"], 1)
                return max(left - (now - facts["time"]), 0.0)
        return max(cost - (now - job.started), 0.05 * cost)

    def left(self, now: float) -> tuple[dict[str, float], float, float]:
        """Seconds left per group and for the whole, and the share that is done (0 to 1)."""
        costs = self._costs()
        groups: dict[str, float] = defaultdict(float)
        done = work = longest = 0.0
        for job in self.jobs:
            group = GROUPS.get(job.rule, job.rule)
            cost = costs[job.rule, job.kind]
            remaining = self._remaining(job, cost, now)
            if job.finished is not None:
                cost = max(job.finished - job.started, 0.0) + OVERHEAD
            done += max(cost - remaining, 0.0)
            work += max(cost, remaining)
            longest = max(longest, remaining)
            groups[group] += remaining / (1 if group in SERIAL else max(self.slots, 1))
        whole = sum(groups.values())
        return dict(groups), max(whole, longest), done / work if work else 1.0

    def line(self, now: float) -> str:
        """Where the study stands, for people."""
        elapsed = f"{duration(now - self.begun)} elapsed"
        if self.slots is None:
            return f"{self._counts(self._at_work())} | {elapsed}"
        groups, whole, share = self.left(now)
        left = {group: f"{duration(seconds)} left" for group, seconds in groups.items()}
        text = f"{self._counts(left)} | {100 * share:.0f} % | {elapsed}"
        return text + (f", about {duration(whole)} left" if whole else "")

    def _counts(self, remarks: Mapping[str, str]) -> str:
        """How many jobs of every group are done, with a remark on those that are not all done."""
        finished: dict[str, int] = defaultdict(int)
        for job in self.jobs:
            finished[GROUPS.get(job.rule, job.rule)] += job.finished is not None
        parts = []
        for group in dict.fromkeys(GROUPS.values()):
            if not self.totals[group]:
                continue
            count = self.before[group] + finished[group]
            part = f"{group} {count}/{self.totals[group]}"
            if count < self.totals[group] and remarks.get(group):
                part += f" ({remarks[group]})"
            parts.append(part)
        return " · ".join(parts)

    def _at_work(self) -> dict[str, str]:
        """What is known of the jobs that a cluster has: who has begun, who waits in its queue."""
        count: dict[str, dict[str, int]] = defaultdict(lambda: {"running": 0, "queued": 0})
        for job in self.jobs:
            if job.submitted and job.finished is None:
                state = "queued" if job.started is None else "running"
                count[GROUPS.get(job.rule, job.rule)][state] += 1
        return {
            group: ", ".join(f"{number} {state}" for state, number in states.items() if number)
            for group, states in count.items()
        }

    def counts(self) -> tuple[int, ...]:
        """Changes whenever a job is handed over, starts or ends."""
        return (
            sum(job.submitted for job in self.jobs),
            sum(job.started is not None for job in self.jobs),
            sum(job.finished is not None for job in self.jobs),
        )


def read_progress(work: Path) -> dict[str, Any] | None:
    """How far the training or generation is that keeps its work in a folder, if it says so.

    A training keeps it in ``state/``, a generation in ``state/measurements/<measurement>/``.
    """
    path = work / "progress.json" if work.name == "state" else work.with_name(f"{work.name}.json")
    try:
        facts = read_json(path)
    except (UserError, OSError):
        return None
    if not isinstance(facts, dict) or not isinstance(facts.get("stage"), str):
        return None
    numbers = (facts.get(key) for key in ("step", "steps", "seconds", "time"))
    return facts if all(isinstance(number, int | float) for number in numbers) else None


def kept(work: Path) -> int:
    """A number that grows whenever more is kept of the work there: a checkpoint, some samples."""
    times = [0]
    for path in (work / "checkpoint.pt", *work.glob("[!.]*.npz")):
        with suppress(OSError):
            times.append(path.stat().st_mtime_ns)
    return max(times)


class _Watcher(threading.Thread):
    """Writes a line when something has changed, and now and then when nothing has."""

    def __init__(
        self, progress: Progress, stream: TextIO, tend: Callable[[], None] | None = None
    ) -> None:
        super().__init__(name="study-progress", daemon=True)
        self.progress, self.stream, self.tend = progress, stream, tend
        self.ended = threading.Event()

    def run(self) -> None:
        said, last = 0.0, self.progress.counts()
        while not self.ended.wait(1.0 if len(self.progress.jobs) < 1000 else 5.0):
            now = time.time()
            self.progress.look(now)
            if self.tend is not None:
                self.tend()
            counts = self.progress.counts()
            # Long studies get few lines: every ten seconds at first, every five minutes at last.
            quiet = min(max(10.0, (now - self.progress.begun) / 30), 300.0)
            if now - said >= (quiet if counts != last else 3 * quiet):
                said, last = now, counts
                self.say(now)

    def say(self, now: float) -> None:
        # One write, so that the line cannot land inside one of Snakemake's.
        self.stream.write(f"study: {self.progress.line(now)}\n")
        self.stream.flush()


_watchers: list[_Watcher] = []


def start(
    results: str | Path,
    jobs: Iterable[Job],
    totals: Mapping[str, int],
    slots: int | None,
    stop_file: str | Path = STOP_FILE,
    tend: Callable[[], None] | None = None,
) -> None:
    """Withdraw an old request to stop, and report on ``jobs`` until ``stop``.

    ``tend`` is called again and again meanwhile.
    """
    Path(stop_file).unlink(missing_ok=True)
    watcher = _Watcher(Progress(results, jobs, totals, slots, time.time()), sys.stderr, tend)
    _watchers.append(watcher)
    watcher.start()


def stop() -> None:
    """Say once more where things stand, and no more."""
    while _watchers:
        watcher = _watchers.pop()
        watcher.ended.set()
        watcher.join(10)
        watcher.progress.look(time.time())
        watcher.say(time.time())


def check_folder(results: str | Path = "results") -> None:
    """Raise ``UserError`` in a folder where no study can have run."""
    if not Path(results).is_dir() and not Path("Snakefile").is_file():
        raise UserError(
            f"{Path.cwd()}: neither a Snakefile nor {results}/ is here; go to the project's "
            "folder, or to the one in which its studies ran"
        )


def request_stop(stop_file: str | Path = STOP_FILE) -> None:
    """Ask all trainings of this folder to write a checkpoint and leave."""
    check_folder(Path(stop_file).parent)
    write_text(stop_file, "trainings that see this file write a checkpoint and leave\n")
    print("Trainings will write a checkpoint and leave; the same command goes on from there.")


def remember(path: str | Path, content: Any) -> None:
    """Write a JSON file unless it says the same already."""
    try:
        if read_json(path) == content:
            return
    except UserError:
        pass
    write_json(path, content)


@dataclass
class Failure:
    """A failed job: its log, whether that was begun, and what a cluster said, in words and logs."""

    log: str
    begun: bool = True
    said: str = ""
    logs: Sequence[str] = ()


def explain_failure(
    results: str | Path, stop_file: str | Path, failures: Iterable[str | Failure] = ()
) -> None:
    """What went wrong, for people: whether a stop was asked for, else where to read on.

    Where the log of a job says nothing, that of the cluster is shown.
    """
    if Path(stop_file).exists():
        print("study: stopped as asked; the same command goes on from there", file=sys.stderr)
        return
    if os.path.isdir(results) and shutil.disk_usage(results).free < 1 << 20:
        # Logs could not say so.
        print(f"study: {results}: less than 1 MiB is left on this disk", file=sys.stderr)
    failures = [Failure(one) if isinstance(one, str) else one for one in failures]
    for failure in failures[:10]:
        for line in _explain(failure):
            print(f"study: {line}", file=sys.stderr)
    if len(failures) > 10:
        print(f"study: and {len(failures) - 10} more under {results}/", file=sys.stderr)
    print("study: what is finished stays; the same command goes on from there", file=sys.stderr)


def _explain(failure: Failure) -> Iterator[str]:
    lines = _last_lines(failure.log) if failure.begun else []
    if lines:
        yield f"failed, see {failure.log}"
    elif failure.begun:
        yield f"failed; {failure.log} is empty"
    else:
        yield f"failed before it began {failure.log}"
    yield from (f"  {line}" for line in lines)
    if failure.said:
        yield f"  {failure.said}"
    for log in failure.logs:
        others = _last_lines(log)
        if others:
            yield f"  see {'also ' if lines else ''}{log}"
            yield from (f"  {line}" for line in others if not lines)


def _last_lines(path: str | Path, count: int = 3) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [printable(line[-300:]) for line in text.splitlines() if line.strip()][-count:]
