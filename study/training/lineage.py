"""Can a training go on from another one that differs only in how long it trains?

It can from any checkpoint of its lineage, made by the same code with the same data, that is not
beyond its own end: every step is a function of the state before it, and nothing in a state knows
the end. What may not go on:

- a training that is not told which code it is of, or whose folder is not among ``runs``;
- several networks that are trained one after another: where one begins depends on how long the
  others train (their lineages include the steps, ``Spec.lineage``);
- a log whose rows are not those of the longer training, nor closer by a power of two, because the
  machine's ``log_every`` says so: rows that were not written cannot be had.

The files of another run are read while that run may write them, so nothing is taken from them that
the checkpoint itself does not prove: its settings, its step, and the hashes of what was kept.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from study.files import UserError, read_object
from study.training import checkpoint
from study.training.log import Log
from study.training.snapshots import Snapshots


def go_on(
    folder: Path, identity: dict[str, Any], every: int, steps: int, snapshots: Snapshots
) -> dict[str, Any] | None:
    """The furthest state of another run from which a run of ``steps`` steps may go on, or ``None``.

    ``folder`` is the run's own state folder, which gets the state as its checkpoint; ``every`` the
    spacing of its log. What it keeps of earlier steps is copied.
    """
    for _, other in sorted(_candidates(folder, identity, steps), reverse=True):
        state = _fitting(other / checkpoint.NAME, identity, every, steps)
        if state is None:
            continue
        step = state["step"]
        if snapshots.take(step, state["snapshots"], other.parent / "train"):
            if snapshots.due(step):
                snapshots.keep(step, {**state["averages"], "raw": state["model"]})
            state["snapshots"] = snapshots.record
            state["origins"] = [*state["origins"], {"run": other.parent.name, "step": step}]
            checkpoint.save(folder, identity, state)
            print(f"goes on from {other.parent.name} at step {step} of {steps}", flush=True)
            return state
    snapshots.record = {}
    return None


def _candidates(folder: Path, identity: dict[str, Any], steps: int) -> list[tuple[int, Path]]:
    """Steps and state folders of runs beside this one whose notes say that they fit."""
    own, found = folder.resolve(), []
    if own.parent.parent.name != "runs" or identity["code"] is None:
        return found
    for note in own.parent.parent.glob(f"*/{own.name}/{checkpoint.NOTE}"):
        with suppress(UserError, TypeError):  # being written, or not a note
            told = read_object(note, "step")
            fits = checkpoint.related(told, identity) and 0 < told["step"] <= steps
            if fits and note.parent != own:
                found.append((told["step"], note.parent))
    return found


def _fitting(path: Path, identity: dict[str, Any], every: int, steps: int) -> dict[str, Any] | None:
    """The state in a checkpoint, with the log of the longer training, if it fits."""
    try:
        state = checkpoint.read(path)
        told, step = json.loads(state.pop("identity")), state["step"]
        if (
            not checkpoint.related(told, identity)
            or step > steps
            or state.keys() != checkpoint.PARTS
        ):
            return None
        log = Log.restored(state["log"]).coarser(every, steps - 1)
    except (UserError, KeyError, TypeError, ValueError):  # damaged, or not whole
        return None
    if log is None or (step == steps and steps - 1 not in log.rows.columns["step"][-1:]):
        return None  # the last step has a row, which this state has passed without
    return {**state, "log": log.state_dict()}
