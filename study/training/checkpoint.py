"""Resumable state of a run, in a folder that the workflow does not own."""

from pathlib import Path
from typing import Any

import torch

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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: the checkpoint cannot be read ({reason}); move it away to start anew"
        ) from None
    if state.pop("identity") == canonical_json(identity):
        return state
    number = 1
    while (aside := path.with_name(f"checkpoint.{number}.pt")).exists():
        number += 1
    path.rename(aside)
    print(f"{path}: made with other settings, code or data; set aside as {aside.name}", flush=True)
    return None
