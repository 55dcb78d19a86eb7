"""Resumable state of a run, in a folder that the workflow does not own."""

from pathlib import Path
from typing import Any

import torch

from study import tensors
from study.files import UserError, atomic, canonical_json

NAME = "checkpoint.pt"


def save(folder: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain containers) atomically."""
    with atomic(folder / NAME) as temporary:
        torch.save({"identity": canonical_json(identity), **state}, temporary)


def load(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The saved state if there is one of the same ``identity`` (spec, code, data), else ``None``.

    A checkpoint of another identity is set aside as ``checkpoint.<n>.pt``, never deleted. Only
    tensors and plain containers are read; nothing in the file is executed.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = tensors.read_weights(path, "a checkpoint")
    except UserError as error:
        raise UserError(f"{error}; move it away to start anew") from None
    if not isinstance(state, dict) or "identity" not in state:
        raise UserError(
            f"{path}: not a checkpoint of this program's trainings; move it away to start anew"
        )
    if state.pop("identity") == canonical_json(identity):
        return state
    number = 1
    while (aside := path.with_name(f"checkpoint.{number}.pt")).exists():
        number += 1
    path.rename(aside)
    print(f"{path}: made with other settings, code or data; set aside as {aside.name}", flush=True)
    return None
