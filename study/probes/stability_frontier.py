"""Short trainings at rising learning rates: the largest rate that trains, and where runs diverge.

The arm is trained anew with its own settings and seeds at every learning rate of the list, from
the smallest on, for a few steps and with a warm-up short enough to reach the rate. The frontier is
about training as it is, with its optimiser, clipping, targets and rule of divergence; that is why
this probe calls the trainer itself, ``study.training.train``, and not a copy of its loop. Nothing
that a training writes is kept.

Outcomes:

- ``diverged``: the trainer says so (a non-finite loss, gradient or weight, or a smoothed loss above
  ``training.divergence`` times its best);
- ``trained``: it came to its last step, and the mean of the losses of the last quarter of the steps
  is below ``below`` times the loss of the first step, before any update;
- ``stalled``: it came to its last step without that.

After a rate that diverged, ``beyond`` more are tried: larger rates are taken to diverge as well.
Split networks are trained one after another, each with the same rate, steps and warm-up; a run has
then trained if every one of them has, and its losses are those of the one that learned least.

A learning rate that survives a few steps may be too large for a long training: the frontier orders
arms, it does not recommend rates. Arms whose weights are imported have no training settings, hence
no rows.

Rows: ``lr``, ``steps`` (optimiser steps planned), ``outcome``, ``step`` (where it ended),
``first_loss`` (of the first step: squared error with the formulation's weight, mean over pixels
and the batch), ``final_loss`` (mean of the last quarter of the steps; of a diverged training the
last finite loss, None if there was none), ``reason`` (why it diverged, else empty).
"""

import io
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet
from tqdm import tqdm

from study.probes.base import ArmSubject, Measured
from study.processes import STOP_SIGNALS
from study.spec.probes import StabilityFrontier
from study.spec.run import Spec
from study.training import Interrupted, train

RESIDENT_MIB = 64
"""Data sets up to this size are decoded whole; of larger ones few steps need few images."""


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Give the process back its handlers of the signals that the trainer listens to."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: set by other code than Python's, which cannot be told
                signal.signal(number, handler)


def _with_rate(spec: Spec, lr: float, options: StabilityFrontier) -> Spec:
    """The arm's spec with this rate, few steps and a short warm-up, for each of its networks."""
    training = spec.training
    short = {"lr": lr, "steps": options.steps, "warmup": min(training.warmup, options.warmup)}
    own = dict.fromkeys(short)  # null: as for all networks
    listed = [{**model.model_dump(mode="json"), **own} for model in training.models]
    return spec.changed(training={**short, "models": listed})


def _losses(table: Path, networks: int) -> list[list[float]]:
    """The logged losses of each of the networks that were trained one after another."""
    columns = pyarrow.parquet.read_table(table, columns=["quantity", "value"]).to_pydict()
    losses = [
        value
        for quantity, value in zip(columns["quantity"], columns["value"], strict=True)
        if quantity == "loss"
    ]
    size = max(1, -(-len(losses) // networks))
    return [losses[start : start + size] for start in range(0, len(losses), size)]


def _ends(losses: list[float]) -> tuple[float, float]:
    """The first logged loss, and the mean of the last quarter of them (at least of one)."""
    last = losses[-max(1, len(losses) // 4) :]
    return losses[0], sum(last) / len(last)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _attempt(subject: ArmSubject, options: StabilityFrontier, lr: float) -> dict[str, Any]:
    """Train once at this rate, in a folder that goes away, and say how it went."""
    spec = _with_rate(subject.spec, lr, options)
    networks = len(spec.models)
    machine = {
        # A row of the log holds the mean loss since the row before; the first is the first step's.
        # Rows that span quarters cost the least time, but would mix the losses of two networks.
        "log_every": 1 if networks > 1 else math.ceil(options.steps / 4),
        "save_every": math.inf,
        "resident_mib": RESIDENT_MIB,
        "micro_batch": options.micro_batch,
    }
    with TemporaryDirectory(prefix="stability-frontier-") as name, _own_handlers():
        folder = Path(name)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            status = train(
                spec, subject.archive.path, folder / "train", folder / "state", machine=machine
            )
        losses = _losses(folder / "train" / "dynamics.parquet", networks)
    row = {"lr": lr, "steps": status["steps"], "step": status["step"]}
    if status["status"] == "diverged":
        ends = losses[0][0], status["final_loss"]
        row |= {"outcome": "diverged", "reason": status["reason"]}
    else:
        ends = max(map(_ends, losses), key=lambda pair: pair[1] / pair[0])
        trained = ends[1] < options.below * ends[0]
        row |= {"outcome": "trained" if trained else "stalled", "reason": ""}
    return row | {"first_loss": _finite(ends[0]), "final_loss": _finite(ends[1])}


def measure(subject: ArmSubject, options: StabilityFrontier) -> Measured:
    """One row for every rate that was tried."""
    if subject.spec.checkpoint is not None:
        return Measured({}, {"left_out": "imported weights have no training settings"})
    rows: list[dict[str, Any]] = []
    lost = 0
    interval = 0.5 if sys.stderr.isatty() else 20.0
    with tqdm(options.lr, desc="learning rates", mininterval=interval) as bar:
        for lr in bar:
            try:
                rows.append(_attempt(subject, options, lr))
            except Interrupted:
                raise Interrupted(
                    f"stopped at learning rate {lr:g}; the same command starts the scan anew"
                ) from None
            bar.set_postfix_str(f"{lr:g}: {rows[-1]['outcome']}")
            lost += rows[-1]["outcome"] == "diverged"
            if lost > options.beyond:
                break
    columns = ("lr", "steps", "outcome", "step", "first_loss", "final_loss", "reason")
    left = [lr for lr in options.lr if lr > rows[-1]["lr"]]
    warmup = min(subject.spec.training.warmup, options.warmup)
    return Measured(
        {name: [row[name] for row in rows] for name in columns},
        {"not_tried": left, "warmup": warmup},
    )
