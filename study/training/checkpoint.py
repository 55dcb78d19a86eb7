"""Resumable state of a run, in a folder that the workflow does not own.

Its ``identity`` (spec, lineage, code, data) says whose it is.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from study import tensors
from study.files import UserError, atomic, canonical_json, write_json

NAME = "checkpoint.pt"
ASIDE = "checkpoint.*.pt"
NOTE = "lineage.json"
"""Of which lineage a checkpoint is, and at which step; small, for other runs to look at."""

PARTS = {
    *("step", "seconds", "model", "averages", "optimizer", "scaler", "watch"),
    *("log", "timing", "snapshots", "origins"),
}
"""What a checkpoint holds beside the identity."""


def save(folder: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain containers, among them ``step``) atomically."""
    with atomic(folder / NAME) as temporary:
        torch.save({"identity": canonical_json(identity), **state}, temporary)
    lineage = {key: value for key, value in identity.items() if key != "spec"}
    write_json(folder / NOTE, {**lineage, "step": state["step"]})


class Saver:
    """Saves checkpoints in a folder; ``beside`` the training, which goes on while one is written.

    ``seconds``: how long the last one held the training up.
    """

    def __init__(self, folder: Path, beside: bool) -> None:
        self.folder, self.seconds = folder, 0.0
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="study-save") if beside else None
        self.writing: Future | None = None

    def save(self, identity: dict[str, Any], state: dict[str, Any]) -> None:
        """Save the state as it is now, when the one before it is written."""
        begun = time.perf_counter()
        self.wait()
        if self.pool is None:
            save(self.folder, identity, state)
        else:
            self.writing = self.pool.submit(save, self.folder, identity, _copied(state))
        self.seconds = time.perf_counter() - begun

    def wait(self) -> None:
        """Until the last checkpoint is written. Raises what writing it has raised."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None


def _copied(state: Any) -> Any:
    """The state in memory of its own, tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_copied, state))
    return state


def related(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of one lineage, code and data."""
    return all(key in one and one[key] == other[key] for key in ("lineage", "code", "data"))


def load(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The saved state if there is one of the same ``identity``, else ``None``.

    A checkpoint of another identity is set aside as ``checkpoint.<n>.pt``, and taken back when its
    identity is asked for again; only the newest of those set aside is kept. Only tensors and plain
    containers are read; nothing in the file is executed.
    """
    path, wanted = folder / NAME, canonical_json(identity)
    if path.exists():
        state = read(path)
        if state.pop("identity") == wanted:
            return state
    state, found = None, None
    for aside in folder.glob(ASIDE):
        with suppress(UserError):
            state = read(aside)
            if state.pop("identity") == wanted:
                found = aside
                break
    if path.exists():
        number = 1
        while (aside := path.with_name(ASIDE.replace("*", str(number)))).exists():
            number += 1
        path.rename(aside)
        os.utime(aside)  # the newest is the one that was set aside last
        why = "made with other settings, code or data; set aside as"
        print(f"{path}: {why} {aside.name}", flush=True)
    if found is not None:
        found.rename(path)
        print(f"{path}: {found.name} is of these settings, code and data; taken back", flush=True)
    by_age = sorted(folder.glob(ASIDE), key=lambda aside: aside.stat().st_mtime)
    for older in by_age[:-1]:
        older.unlink()
        print(f"{older}: removed; {by_age[-1].name}, set aside later, is kept", flush=True)
    return state if found is not None else None


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds. Raises ``UserError`` where it is none, or damaged."""
    try:
        state = tensors.read_weights(path, "a checkpoint")
    except UserError as error:
        raise UserError(f"{error}; move it away to start anew") from None
    if not isinstance(state, dict) or "identity" not in state:
        raise UserError(
            f"{path}: not a checkpoint of this program's trainings; move it away to start anew"
        )
    return state
