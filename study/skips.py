"""Long skips and how they are scaled, written once for every backbone.

A backbone with N long skips names them 1 (outermost, shallowest) to N (innermost). Before a skip
is fused with the decoder it is multiplied by a factor:

========== ====================================================================================
method     factor of long skip i
========== ====================================================================================
none       1
inv_sqrt2  2^(-1/2)
cs         kappa^(i-1) (ScaleLong's constant scaling: the outermost keeps 1)
ls         a learned gate in (0, 1), shared by all long skips of equal shape
ls_unshared  a learned gate in (0, 1) for each long skip
========== ====================================================================================

Source: Huang et al. 2023, "ScaleLong: Towards More Stable Training of Diffusion Model via Scaling
Network Long Skip Connection". Its released code holds the token gate only; the channel gate of
convolutional backbones is squeeze-and-excitation (Hu et al. 2018) and our reading of the paper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from study.spec.scalings import SkipScaling

REDUCTION = 16
"""Width of a gate's input divided by the width of its hidden layer, as in ScaleLong's code."""


@dataclass(frozen=True)
class SkipShape:
    """What scaling needs to know of one long skip.

    ``width`` is the length of the gate's vector: tokens for token gates, channels for channel
    gates. ``level`` counts resolutions from the finest (0); skips of one resolution share it.
    """

    width: int
    level: int = 0


class Gate(nn.Module):
    """One number in (0, 1) per token or per channel of a long skip.

    The skip is averaged over all other axes to a vector of length ``width``, which passes
    Linear(width, width // 16), ReLU, Linear(width // 16, width), sigmoid.

    ``pooling`` is

    - ``"tokens"``: skips [B, T, D] (or maps [B, D, H, W] with T = H W) are averaged over channels.
      Published: ScaleLong's released U-ViT code.
    - ``"channels"``: maps [B, C, H, W] are averaged over space. Ours, for convolutional backbones.

    The output broadcasts against the skip. Raises ``ValueError`` where ``width`` is below 16.
    """

    def __init__(self, width: int, pooling: str) -> None:
        super().__init__()
        if width < REDUCTION:
            what = "tokens" if pooling == "tokens" else "channels"
            raise ValueError(
                f"learned skip scaling needs at least {REDUCTION} {what} in every long skip; "
                f"here one has {width}"
            )
        self.pooling = pooling
        self.layer1 = nn.Linear(width, width // REDUCTION)
        self.layer2 = nn.Linear(width // REDUCTION, width)

    def forward(self, skip: Tensor) -> Tensor:
        if self.pooling == "channels":
            pooled = skip.mean(dim=(2, 3))
        elif skip.dim() == 3:
            pooled = skip.mean(dim=2)
        else:
            pooled = skip.mean(dim=1).flatten(1)
        gate = torch.sigmoid(self.layer2(torch.relu(self.layer1(pooled))))
        if self.pooling == "channels":
            return gate[:, :, None, None]
        if skip.dim() == 3:
            return gate[:, :, None]
        return gate.view(skip.shape[0], 1, *skip.shape[2:])


def constant_factors(scaling: SkipScaling, levels: Sequence[int]) -> list[float] | None:
    """Factors of the long skips, outermost first, or ``None`` where they are learned.

    ``levels`` holds the resolution level of every skip, outermost first. For ``cs`` the exponent
    of skip i is i - 1 (``per_skip``, published), its level's rank (``per_level``: skips of one
    resolution share a factor), or (i - 1) m / (N - 1) (``normalised``: the innermost of N skips
    gets kappa^m with m = ``innermost`` on every backbone, so that depths can be compared).
    """
    return None if scaling.learned else CONSTANT[scaling.method](scaling, levels)


def _kappa_factors(scaling: SkipScaling, levels: Sequence[int]) -> list[float]:
    count, exponent = len(levels), scaling.exponent
    if exponent == "per_skip":
        powers = [float(i) for i in range(count)]
    elif exponent == "per_level":
        ranks = {level: rank for rank, level in enumerate(dict.fromkeys(levels))}
        powers = [float(ranks[level]) for level in levels]
    else:
        powers = [scaling.innermost * i / max(count - 1, 1) for i in range(count)]
    return [scaling.kappa**power for power in powers]


CONSTANT: dict[str, Callable[[SkipScaling, Sequence[int]], list[float]]] = {
    "none": lambda scaling, levels: [1.0] * len(levels),
    "inv_sqrt2": lambda scaling, levels: [2.0**-0.5] * len(levels),
    "cs": _kappa_factors,
}
"""Factors of the long skips, outermost first, of every scaling that is not learned."""

Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], None]
"""Called as observer(index, main, skip, scaled skip, gate or None) at every fusion."""


class LongSkips:
    """The long skips of one backbone: scaling, fusion, and a window for probes.

    Not a module: the learned gates live in ``gates`` and are registered by the backbone (as
    ``self.se``), whose state dict then has the official keys. A backbone with shapes outermost
    first does::

        self.long_skips = LongSkips(scaling, shapes, pooling="channels")
        self.se = self.long_skips.gates
        ...
        x = self.long_skips.fuse(i, x, skip)      # i from N down to 1

    ``gates`` is ``None`` for constant factors; a single ``Gate`` for ``ls`` where all shapes are
    equal; otherwise a ``ModuleList`` in the order of fusion (innermost first), one entry per
    shape (``ls``) or per skip (``ls_unshared``).
    """

    def __init__(self, scaling: SkipScaling, shapes: Sequence[SkipShape], pooling: str) -> None:
        self.scaling = scaling
        self.shapes = list(shapes)
        self.factors = constant_factors(scaling, [shape.level for shape in shapes])
        self.observer: Observer | None = None
        self.gates: nn.Module | None = None
        self._gate_of: list[int] = []
        if self.factors is not None or not self.shapes:
            return
        innermost_first = self.shapes[::-1]
        if scaling.shared:
            distinct = list(dict.fromkeys(innermost_first))
            self._gate_of = [distinct.index(shape) for shape in self.shapes]
        else:
            distinct = innermost_first
            self._gate_of = list(range(len(self.shapes)))[::-1]
        gates = [Gate(shape.width, pooling) for shape in distinct]
        single = scaling.shared and len(gates) == 1
        self.gates = gates[0] if single else nn.ModuleList(gates)

    def __len__(self) -> int:
        return len(self.shapes)

    def gate(self, index: int) -> Gate:
        """The learned gate of long skip ``index`` (1 = outermost)."""
        if isinstance(self.gates, nn.ModuleList):
            return self.gates[self._gate_of[index - 1]]
        return self.gates

    def scale(self, index: int, skip: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scaled skip and, for learned scaling, the gate that scaled it."""
        if self.factors is None:
            gate = self.gate(index)(skip)
            return skip * gate, gate
        factor = self.factors[index - 1]
        return (skip if factor == 1.0 else skip * factor), None

    def fuse(self, index: int, main: Tensor, skip: Tensor) -> Tensor:
        """Concatenation [main, factor * skip] on the channel axis.

        Tokens are [B, T, D] (axis 2), maps [B, C, H, W] (axis 1).
        """
        scaled, gate = self.scale(index, skip)
        if self.observer is not None:
            self.observer(index, main, skip, scaled, gate)
        return torch.cat([main, scaled], dim=-1 if main.dim() == 3 else 1)
