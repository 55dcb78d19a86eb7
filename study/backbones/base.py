"""What every backbone is, and the layers that more than one of them uses."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from study.files import UserError
from study.skips import LongSkips
from study.spec.backbones import BackboneOptions
from study.spec.scalings import SkipScaling


class Backbone(nn.Module):
    """A raw network F with long skips.

    ``forward(x [N, C, H, W], noise [N], label [N] int64 | None, **conditioning)`` returns
    [N, C_out, H, W]; float32 in and out. ``noise`` is the number that tells the network its noise
    level, in the units that the formulation hands over. Label ``num_classes`` is the null label
    where the network has one; a network without classes has ``num_classes`` 0 and ignores labels.

    Sub-classes set the attributes below and build their decoder through ``long_skips.fuse``.
    """

    long_skips: LongSkips
    num_classes: int = 0

    @classmethod
    def from_options(
        cls,
        options: BackboneOptions,
        *,
        scaling: SkipScaling,
        resolution: int,
        channels: int,
        out_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        attention: str = "sdpa",
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> "Backbone":
        """Build from a spec's options plus what data set, formulation and training decide."""
        raise NotImplementedError

    def blocks(self) -> dict[str, nn.Module]:
        """Encoder, middle and decoder blocks in order of execution; name = state-dict prefix."""
        raise NotImplementedError

    def decoder_blocks(self) -> list[nn.Module]:
        """The block (or layer) that consumes long skip i's fusion, outermost first."""
        raise NotImplementedError

    def merged(self) -> "Backbone":
        """The network that samples: its outputs up to rounding, with fewer operations if it can."""
        return self


def sinusoidal(
    position: Tensor, width: int, *, last_divisor: bool = False, sine_first: bool = False
) -> Tensor:
    """Sinusoidal features [N, width] of positions [N].

    Frequencies are 10000^(-i / half) for i = 0 .. half - 1, or 10000^(-i / (half - 1)) with
    ``last_divisor``; cosines come first unless ``sine_first``. An odd width is padded with a zero.
    """
    half = width // 2
    divisor = max(half - 1, 1) if last_divisor else half
    index = torch.arange(half, dtype=torch.float32, device=position.device)
    # This order of operations rounds as the official codes do; at position 999 another one differs
    # by more than their recorded outputs allow.
    angle = position.float()[:, None] * torch.exp(-math.log(10000.0) * index / divisor)[None]
    parts = [angle.sin(), angle.cos()] if sine_first else [angle.cos(), angle.sin()]
    features = torch.cat(parts, dim=-1)
    return functional.pad(features, (0, width % 2)) if width % 2 else features


def _math(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    weights = torch.softmax((query * scale) @ key.transpose(-2, -1), dim=-1)
    return weights @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, scale=scale)


def _xformers(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # xformers wants [batch, tokens, heads, width]; we keep heads in front as SDPA does.
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return memory_efficient_attention(q, k, v, scale=scale).transpose(1, 2)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "sdpa": _sdpa,
    "xformers": _xformers,
    "math": _math,
}


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, kind: str) -> Tensor:
    """Softmax attention over [batch, heads, tokens, width] tensors.

    ``kind`` is ``sdpa`` (PyTorch's fused kernel), ``xformers``, or ``math`` (the formula itself,
    the reference in tests). ``scale`` multiplies the scores.
    """
    return ATTENTION[kind](query, key, value, scale)


def check_attention(kind: str, device: torch.device) -> None:
    """Raise ``UserError`` where attention ``kind`` cannot run on ``device``."""
    if kind not in ATTENTION:
        raise UserError(f"training.attention: {kind!r} is unknown; allowed: {', '.join(ATTENTION)}")
    if kind != "xformers":
        return
    if device.type != "cuda":
        raise UserError(
            f"training.attention: xformers needs an NVIDIA GPU, but this job runs on "
            f"{device.type}; use 'sdpa', or run where a GPU is visible"
        )
    try:
        query = torch.zeros(1, 1, 1, 8, device=device, dtype=torch.float16)
        _xformers(query, query, query, 1.0)
    except Exception as error:  # every failure of the import or of its kernels means "not usable"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"training.attention: xformers is asked for but not usable here ({reason}); "
            "install a build of xformers that matches this torch, or use 'sdpa'"
        ) from None
