"""The training loop.

Everything random is a function of (seed, step, sample), and nothing in a state knows the end: the
numbers do not depend on processes, micro-batches or interruptions, and a longer training goes on
from a shorter one (``study.training.lineage``).
"""

import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from study.data import Archive
from study.files import Stopped, write_json
from study.network import arithmetic, repeatable
from study.processes import listen
from study.provenance import Stopwatch, provenance
from study.spec.run import Spec
from study.training.progress import Progress
from study.training.trainer import Trainer

SAVING = 0.02
"""Share of the time that checkpoints may take; where one takes long, there are fewer."""


class Interrupted(Stopped):
    """Asked to stop; a checkpoint was written and the same command resumes."""


class _Wish:
    """Who wants this training to stop: a signal, or a file, which is looked for once a second."""

    def __init__(self, stop_file: str | Path | None) -> None:
        self.stop_file, self.looked, self.who = stop_file, -math.inf, ""
        listen(self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.who = signal.Signals(number).name

    def __bool__(self) -> bool:
        now = time.monotonic()
        if not self.who and self.stop_file and now - self.looked > 1:
            self.looked = now
            self.who = str(self.stop_file) if Path(self.stop_file).exists() else ""
        return bool(self.who)


def _is_sound(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in module.parameters())


def train(
    spec: Spec,
    data: str | Path,
    out: str | Path,
    state: str | Path,
    *,
    machine: dict[str, Any] | None = None,
    threads: int | None = None,
    stop_file: str | Path | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Train one run and write its folder; resume where an earlier attempt stopped.

    ``data`` is a dataset archive, ``out`` the run's ``train/`` folder
    and ``state`` the folder of its checkpoint. ``machine`` holds settings that only concern
    speed. Returns what ``status.json`` holds; a run that diverges is a result, not an error.

    Raises ``Interrupted`` after SIGTERM, SIGINT, SIGHUP, SIGUSR1 or when ``stop_file`` appears (a
    checkpoint is then written), ``UserError`` for settings that cannot be.
    """
    if threads:
        torch.set_num_threads(threads)
    spec = Spec.read(spec)
    machine, out, state = machine or {}, Path(out), Path(state)
    archive = Archive(data)
    if archive.fits(machine.get("resident_mib", 4096) * 2**20):
        archive.resident()
    trainer = Trainer(spec, archive, out, state, machine)
    identity = {"spec": spec.key, "lineage": spec.lineage, "code": code, "data": archive.sha256}
    trainer.resume(identity)
    wish, start = _Wish(stop_file), trainer.step  # until here there is nothing to save
    stopwatch = Stopwatch(trainer.device, before=trainer.seconds)
    # Around all steps: batches that are made meanwhile are part of the numbers, too.
    with arithmetic(spec.training.precision), repeatable(strict=False):
        reason = _advance(trainer, identity, stopwatch, wish)
    if reason is None and not _is_sound(trainer.backbone):
        reason = "non-finite weights"
    if reason is None and trainer.step > start:
        trainer.save(identity)
    trainer.wait()
    status = {
        "status": "done" if reason is None else "diverged",
        "step": trainer.step,
        "steps": trainer.steps,
        "reason": reason,
        "run": out.parent.name,
        "spec": spec.content(),
        "code": code,
        "data_sha256": archive.sha256,
        "seeds": spec.seeds.model_dump(),
        **trainer.facts(stopwatch.seconds),
        "peak_memory_mib": stopwatch.peak_memory_mib,
        "provenance": provenance(trainer.device),
    }
    if trainer.main:
        status |= trainer.write(out)
        write_json(out / "status.json", status)
        where = f"step {trainer.step} of {trainer.steps}"
        print(f"{status['status']} at {where}" + (f": {reason}" if reason else ""), flush=True)
    trainer.accelerator.end_training()
    return status


def _advance(
    trainer: Trainer, identity: dict[str, Any], stopwatch: Stopwatch, wish: _Wish
) -> str | None:
    """Train to the end; returns why the run has diverged, or ``None``.

    Snapshots and checkpoints are written on the way. ``Interrupted`` is raised where any process
    wishes the training to stop.
    """
    steps, every = trainer.steps, trainer.machine.get("save_every", 60.0)
    progress = Progress(trainer.folder, trainer.step, steps, trainer.seconds, trainer.main)
    saving, logged, begun = time.monotonic() + every, trainer.step, time.perf_counter()
    reason = None
    while trainer.step < steps and reason is None:
        due = trainer.main and time.monotonic() > saving
        reason = trainer.advance(stop=bool(wish), due=due)
        trainer.seconds = stopwatch.seconds
        progress(trainer.step, trainer.watch.last_finite.get("loss", math.nan))
        if trainer.step - logged >= trainer.log.every:
            now = time.perf_counter()
            seconds = (now - begun) / (trainer.step - logged)
            trainer.timing.add(trainer.step, "step_seconds", seconds)
            logged, begun = trainer.step, now
        if reason is not None:
            break
        trainer.keep()
        alone = trainer.accelerator.num_processes == 1
        if (trainer.asked or (alone and wish)) and trainer.step < steps:
            trainer.save(identity)
            trainer.wait()
            trainer.accelerator.end_training()
            progress.bar.close()
            raise Interrupted(
                f"stopped by {wish.who or 'another process'} at step {trainer.step} of {steps}; "
                "the same command resumes"
            )
        if trainer.due:
            trainer.save(identity)
            saving = time.monotonic() + max(every, trainer.saver.seconds / SAVING)
    progress.bar.close()
    return reason
