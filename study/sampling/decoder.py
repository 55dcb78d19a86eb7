"""The decoder of Stable Diffusion's autoencoder: from latents to images.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". Latent
backbones are trained on what its encoder makes of images; their samples become images here. The
weights are the user's: no file is downloaded, and nothing in a file is executed.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from study import tensors
from study.backbones.base import attention
from study.files import UserError

PIECE = 16
"""Images that are decoded at a time: a decoder's activations are far larger than its latents."""

# From diffusers' names to the original ones, in this order; {up} counts from the other end.
_RENAMED = (
    (r"^decoder\.mid_block\.resnets\.(\d)\.", lambda m, _: f"decoder.mid.block_{int(m[1]) + 1}."),
    (r"^decoder\.mid_block\.attentions\.0\.", lambda m, _: "decoder.mid.attn_1."),
    (r"\.group_norm\.", lambda m, _: ".norm."),
    (r"\.(?:to_)?(q|k|v)(?:uery|ey|alue)?\.(?=weight|bias)", lambda m, _: f".{m[1]}."),
    (r"\.(?:to_out\.0|proj_attn)\.", lambda m, _: ".proj_out."),
    (
        r"^decoder\.up_blocks\.(\d+)\.resnets\.",
        lambda m, levels: f"decoder.up.{levels - 1 - int(m[1])}.block.",
    ),
    (
        r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.",
        lambda m, levels: f"decoder.up.{levels - 1 - int(m[1])}.upsample.",
    ),
    (r"\.conv_shortcut\.", lambda m, _: ".nin_shortcut."),
    (r"^decoder\.conv_norm_out\.", lambda m, _: "decoder.norm_out."),
)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class _Residual(nn.Module):
    """Twice GroupNorm, SiLU, 3x3 convolution, and the input (through 1x1 where widths differ)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """Self-attention of one head over all positions of a map [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (
            layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)
        )
        mixed = attention(query, key, value, scale=x.shape[1] ** -0.5, kind="sdpa")
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(x.shape))


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = _Residual(width, width)
        self.attn_1 = _Attention(width)
        self.block_2 = _Residual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    def __init__(self, width_in: int, width: int, blocks: int, finest: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [_Residual(width_in if number == 0 else width, width) for number in range(blocks)]
        )
        if not finest:
            self.upsample = _Upsample(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class _Decoder(nn.Module):
    def __init__(self, channels: int, widths: list[int], blocks: int) -> None:
        super().__init__()
        coarsest = widths[-1]
        self.conv_in = nn.Conv2d(channels, coarsest, 3, padding=1)
        self.mid = _Middle(coarsest)
        into = [*widths[1:], coarsest]
        self.up = nn.ModuleList(
            [_Level(into[k], widths[k], blocks, finest=k == 0) for k in range(len(widths))]
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class LatentDecoder(nn.Module):
    """Latents [B, C, h, w], as a data set holds them -> images [B, 3, H, W], nominally in [-1, 1].

    ``channels`` of the latents (4), ``widths`` of the levels, finest first (128, 256, 512, 512),
    ``blocks`` residual blocks per level (3); in brackets Stable Diffusion's, which make 8 x 8
    pixels of a position. ``scale`` is what the latents were multiplied by when they were made.
    State-dict keys are those of the original code.
    """

    def __init__(self, channels: int, widths: list[int], blocks: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = _Decoder(channels, widths, blocks)

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents / self.scale))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As ``forward``, a few at a time and without gradients, float32."""
        return torch.cat([self(piece).float() for piece in latents.float().split(PIECE)])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tensors.read_weights(path)
    except UserError as error:
        raise UserError(f"generation.decoder.weights: {error}") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return tensors.tensors_in(content) if isinstance(content, dict) else {}


def _original(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors under the original names, from either naming."""
    numbers = [re.match(r"decoder\.up(?:_blocks)?\.(\d+)\.", key) for key in found]
    levels = 1 + max((int(match[1]) for match in numbers if match), default=-1)
    result = {}
    for key, value in found.items():
        if "up_blocks" in key or "mid_block" in key or "conv_norm_out" in key:
            for pattern, name in _RENAMED:
                key = re.sub(pattern, lambda match, name=name: name(match, levels), key)
        if re.fullmatch(r"decoder\.mid\.attn_1\.(q|k|v|proj_out)\.weight", key):
            value = value.reshape(*value.shape[:2], 1, 1)
        result[key] = value
    return result


def load_decoder(path: str | Path, scale: float) -> LatentDecoder:
    """The decoder with the weights in ``path``; its sizes are those of the tensors there.

    ``path`` is a ``.safetensors`` file or one that torch saved: the autoencoder alone, or a whole
    Stable Diffusion checkpoint; names as in the original code or in diffusers. Raises
    ``UserError`` where it holds no such decoder.
    """
    path = Path(path)
    prefix = re.compile(r"^first_stage_model\.")
    found = {prefix.sub("", key): value for key, value in _read(path).items()}
    wanted = ("decoder.", "post_quant_conv.")
    try:
        found = _original({k: v for k, v in found.items() if k.startswith(wanted)})
        numbers = {int(key.split(".")[2]) for key in found if key.startswith("decoder.up.")}
        levels = len(numbers)
        first = [found[f"decoder.up.{level}.block.0.conv1.weight"] for level in range(levels)]
        blocks = sum(bool(re.match(r"decoder\.up\.0\.block\.\d+\.conv1\.weight", k)) for k in found)
        channels = found["post_quant_conv.weight"].shape[0]
        # Without memory: the shapes there may belong to tensors without a single number.
        with torch.device("meta"):
            decoder = LatentDecoder(channels, [len(weight) for weight in first], blocks, scale)
        decoder.load_state_dict(found, assign=True)
        decoder.float()
        for key, value in decoder.state_dict().items():
            if value.is_complex() or not value.isfinite().all():
                raise ValueError(f"{key} holds numbers that are complex or not finite")
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(
            f"generation.decoder.weights: {path}: not the decoder of a Stable Diffusion "
            f"autoencoder ({reason})"
        ) from None
    return decoder.requires_grad_(False).eval()
