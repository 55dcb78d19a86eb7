"""Which weights does a training keep, and are they whole?

A checkpoint lists what was kept before it, with hashes; what it does not list is written anew.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from study.files import atomic, sha256
from study.spec.run import Spec
from study.weights import SNAPSHOTS, snapshot

Weights = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, of every average and of ``raw``."""

Record = dict[str, dict[str, str]]
"""SHA-256 of kept files, by step and by what the weights are called."""


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Write weights atomically; returns the hash of the file."""
    with atomic(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in weights.items()}, temporary)
    return sha256(path)


class Snapshots:
    """The kept weights of a run, in the folder ``snapshots`` of its ``train/``."""

    def __init__(self, spec: Spec, train: Path) -> None:
        self.train = train
        self.steps = frozenset(spec.snapshots[:-1])
        kept = spec.training.snapshots
        self.names = (*spec.averages, *(("raw",) if kept is not None and kept.raw else ()))
        self.record: Record = {}

    def due(self, step: int) -> bool:
        """Whether ``step`` is one of those that are kept, and is not yet."""
        return step in self.steps and str(step) not in self.record

    def keep(self, step: int, weights: Weights) -> None:
        """Write those of ``weights`` that are kept."""
        self._write(step, self.names, weights)

    def keep_last(self, step: int, weights: Weights) -> None:
        """Write the further averages of the step at which the training ended."""
        further = [name for name in weights if name not in ("ema", "raw", *self.at(step))]
        if further:
            self._write(step, further, weights)

    def at(self, step: int) -> dict[str, str]:
        """What is kept of a step."""
        return self.record.get(str(step), {})

    def _write(self, step: int, names: Iterable[str], weights: Weights) -> None:
        written = {
            name: save_weights(snapshot(self.train, name, step), weights[name]) for name in names
        }
        self.record[str(step)] = self.at(step) | written

    def restore(self, record: Record) -> bool:
        """Go on after a checkpoint that lists ``record``; whether all of it is there and whole."""
        self.record = record
        return all(
            _is(snapshot(self.train, name, int(step)), digest)
            for step, files in record.items()
            for name, digest in files.items()
        )

    def take(self, step: int, record: Record, train: Path) -> bool:
        """Copy what is kept before ``step`` from another run; whether all could be had.

        ``record`` is what the other one's checkpoint lists, ``train`` where its files lie.
        """
        self.record = {}
        for one in sorted(one for one in self.steps if one < step):
            for name in self.names:
                digest = record.get(str(one), {}).get(name)
                source = snapshot(train, name, one)
                if digest is None or not _copied(source, snapshot(self.train, name, one), digest):
                    return False
                self.record.setdefault(str(one), {})[name] = digest
        return True

    def sweep(self) -> None:
        """Remove what is not listed: of a training with other code or data, or after a kill."""
        listed = {
            snapshot(self.train, name, int(step))
            for step, files in self.record.items()
            for name in files
        }
        for path in (self.train / SNAPSHOTS).glob("*.safetensors"):
            if path not in listed:
                path.unlink()


def _copied(source: Path, path: Path, digest: str) -> bool:
    """Copy a file; whether it was there, and is the one with this hash."""
    try:
        with atomic(path) as temporary:
            shutil.copyfile(source, temporary)
            if sha256(temporary) != digest:
                raise ValueError(f"{source}: not what its training wrote")
    except (OSError, ValueError):
        return False
    return True


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest
