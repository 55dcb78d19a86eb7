"""What is written down while a network trains: losses, norms of long skips, gates, gradients."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from study.backbones.base import Backbone
from study.files import atomic

SIGMA_EDGES = [0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 10.0, 80.0]
"""Bin edges of the loss by noise level, in EDM's sigma; the outer bins take what lies beyond."""
BINS = [
    f"{math.sqrt(low * high):.3g}" for low, high in zip(SIGMA_EDGES, SIGMA_EDGES[1:], strict=False)
]
"""Geometric centre of every bin."""


class Table:
    """A tidy log: rows of (step, quantity, where, value), kept as columns."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {"step": [], "quantity": [], "where": [], "value": []}

    def add(self, step: int, quantity: str, value: float, where: str = "") -> None:
        """Append one row."""
        for column, item in zip(
            self.columns.values(), (step, quantity, where, float(value)), strict=True
        ):
            column.append(item)

    def write(self, path: str | Path) -> None:
        """Write as Parquet, atomically; equal tables give equal bytes."""
        import pyarrow
        import pyarrow.parquet

        types = [pyarrow.int64(), pyarrow.string(), pyarrow.string(), pyarrow.float64()]
        schema = pyarrow.schema(list(zip(self.columns, types, strict=True)))
        table = pyarrow.table(self.columns, schema=schema)
        with atomic(path) as temporary:
            pyarrow.parquet.write_table(table, temporary, compression="zstd")


def _read(numbers: list[Tensor]) -> list[float]:
    """Numbers of a device, read at once."""
    if not numbers:
        return []
    device = next((one.device for one in numbers if one.device.type != "cpu"), "cpu")
    return torch.stack([one.to(device) for one in numbers]).tolist()


def _norms(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over samples of the L2 norm, and the L2 norm of the whole batch."""
    per_sample = torch.linalg.vector_norm(tensor.detach().float().flatten(1), dim=1)
    return per_sample.mean(), torch.linalg.vector_norm(per_sample)


class SkipObserver:
    """Measures every fusion of one forward pass while it is attached.

    Sums over micro-batches are combined as a mean over samples (``*_norm*``) and as a root of
    summed squares (``decoder_frobenius_after``).
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.samples: dict[tuple[str, str], list[tuple[Tensor, int]]] = {}
        self.gates: dict[int, list[Tensor]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "SkipObserver":
        self.backbone.long_skips.observer = self._fusion
        for index, block in enumerate(self.backbone.decoder_blocks(), start=1):
            self._hooks.append(block.register_forward_hook(self._after(index)))
        return self

    def __exit__(self, *exception: object) -> None:
        self.backbone.long_skips.observer = None
        for hook in self._hooks:
            hook.remove()

    def _note(self, quantity: str, index: int, value: Tensor, count: int) -> None:
        self.samples.setdefault((quantity, str(index)), []).append((value, count))

    def _fusion(
        self, index: int, main: Tensor, skip: Tensor, scaled: Tensor, gate: Tensor | None
    ) -> None:
        for quantity, tensor in (
            ("skip_norm", skip),
            ("skip_norm_scaled", scaled),
            ("decoder_norm_before", main),
        ):
            self._note(quantity, index, _norms(tensor)[0], len(tensor))
        if gate is not None:
            self.gates.setdefault(index, []).append(gate.detach().float().flatten())

    def _after(self, index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            mean, whole = _norms(tensor)
            self._note("decoder_norm_after", index, mean, len(tensor))
            self._note("decoder_frobenius_after", index, whole, len(tensor))

        return hook

    def log(self, table: Table, step: int) -> None:
        """Append what was measured."""
        values = iter(_read([value for notes in self.samples.values() for value, _ in notes]))
        read = {
            key: [(next(values), count) for _, count in notes]
            for key, notes in self.samples.items()
        }
        for (quantity, where), notes in sorted(read.items()):
            if quantity == "decoder_frobenius_after":
                value = math.sqrt(sum(value**2 for value, _ in notes))
            else:
                value = sum(v * n for v, n in notes) / sum(n for _, n in notes)
            table.add(step, quantity, value, where)
        for index, parts in sorted(self.gates.items()):
            gate = torch.cat(parts)
            found = _read([gate.mean(), gate.std(correction=0), gate.min(), gate.max()])
            for name, value in zip(("mean", "std", "min", "max"), found, strict=True):
                table.add(step, f"gate_{name}", value, str(index))


class Blocks:
    """Parameters of a backbone grouped by block, for norms of gradients and updates.

    Parameters outside every block form the group ``other``.
    """

    def __init__(self, backbone: Backbone) -> None:
        prefixes = list(backbone.blocks())
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in [*prefixes, "other"]}
        for key, parameter in backbone.named_parameters():
            owner = next((name for name in prefixes if key.startswith(name + ".")), "other")
            groups[owner].append(parameter)
        self.groups = {name: parameters for name, parameters in groups.items() if parameters}

    @staticmethod
    def norm(tensors: list[Tensor]) -> Tensor:
        """L2 norm of several tensors together, a number on their device."""
        if not tensors:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))

    def log_gradients(self, table: Table, step: int) -> None:
        """Append the gradient norm of every block, before clipping."""
        norms = [
            self.norm([p.grad for p in parameters if p.grad is not None])
            for parameters in self.groups.values()
        ]
        for name, norm in zip(self.groups, _read(norms), strict=True):
            table.add(step, "grad_norm_block", norm, name)

    def copy(self) -> dict[str, list[Tensor]]:
        """The weights of every block as they are now."""
        return {name: [p.detach().clone() for p in ps] for name, ps in self.groups.items()}

    def log_updates(self, table: Table, step: int, before: dict[str, list[Tensor]]) -> None:
        """Append ||change|| / ||weights|| of every block since ``before``."""
        weights = _read([self.norm(before[name]) for name in self.groups])
        changes = _read(
            [
                self.norm(list(torch._foreach_sub([p.detach() for p in ps], before[name])))
                for name, ps in self.groups.items()
            ]
        )
        for name, weight, change in zip(self.groups, weights, changes, strict=True):
            if weight > 0:
                table.add(step, "update_ratio", change / weight, name)


class LossByNoise:
    """Sums of losses by noise level, and how many there are."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(BINS), dtype=torch.float64)
        self.counts = torch.zeros(len(BINS), dtype=torch.float64)
        self._edges = torch.tensor(SIGMA_EDGES[1:-1], dtype=torch.float64)

    def add(self, sigma: Tensor, loss: Tensor) -> None:
        """Add per-sample losses [B] at noise levels sigma [B], both on the CPU."""
        bins = torch.bucketize(sigma.double(), self._edges)
        self.sums.index_add_(0, bins, loss.double())
        self.counts.index_add_(0, bins, torch.ones_like(loss, dtype=torch.float64))
