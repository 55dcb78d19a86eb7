"""Noise levels as training draws them, spread evenly instead of at random."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def even_draws(count: int, kind: str) -> Tensor:
    """Numbers [count] float32 for ``Formulation.levels``, in rising order.

    They are the quantiles (i + 1/2) / count of the distribution ``kind`` ("normal" or "uniform"),
    so that few samples cover all noise levels in training's proportions.
    """
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if kind == "normal":
        return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).float()
    return uniform.float()


def pieces(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``count`` samples."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def take(values: Tensor | None, piece: slice) -> Tensor | None:
    """A piece of a tensor that may be absent."""
    return None if values is None else values[piece]
