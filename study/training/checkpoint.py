"""Resumable state of a run, in a folder that the workflow does not own."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from study import tensors
from study.files import UserError, atomic, canonical_json

NAME = "checkpoint.pt"
ASIDE = "checkpoint.*.pt"


def save(folder: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain containers) atomically."""
    with atomic(folder / NAME) as temporary:
        torch.save({"identity": canonical_json(identity), **state}, temporary)


def load(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The saved state if there is one of the same ``identity`` (spec, code, data), else ``None``.

    A checkpoint of another identity is set aside as ``checkpoint.<n>.pt``, and taken back when its
    identity is asked for again; only the newest of those set aside is kept. Only tensors and plain
    containers are read; nothing in the file is executed.
    """
    path, wanted = folder / NAME, canonical_json(identity)
    if path.exists():
        state = _read(path)
        if state.pop("identity") == wanted:
            return state
    state, found = None, None
    for aside in folder.glob(ASIDE):
        with suppress(UserError):
            state = _read(aside)
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


def _read(path: Path) -> dict[str, Any]:
    try:
        state = tensors.read_weights(path, "a checkpoint")
    except UserError as error:
        raise UserError(f"{error}; move it away to start anew") from None
    if not isinstance(state, dict) or "identity" not in state:
        raise UserError(
            f"{path}: not a checkpoint of this program's trainings; move it away to start anew"
        )
    return state
