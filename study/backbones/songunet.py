"""SongUNet, the network behind the backbones ``ddpmpp`` and ``ncsnpp``.

Sources: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential
Equations" (DDPM++ and NCSN++); Karras et al. 2022, "Elucidating the Design Space of
Diffusion-Based Generative Models", whose form of both networks this is: state-dict keys, shapes
and initialisation are those of its ``SongUNet``.

The factor sqrt(1/2) of this network sits on residual branches. The long skips themselves are
unscaled in the published networks, so every skip scaling is a real treatment here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from study.backbones.base import Backbone, attention
from study.skips import LongSkips, SkipShape
from study.spec.backbones import BackboneOptions
from study.spec.scalings import UNSCALED, SkipScaling

HALF = math.sqrt(0.5)
"""Factor of every residual sum: it keeps the variance of two independent summands."""


def _xavier(weight: Tensor, gain: float = 1.0) -> nn.Parameter:
    """The tensor as a parameter, Xavier-uniform times ``gain``."""
    return nn.Parameter(nn.init.xavier_uniform_(weight, gain=gain))


class Linear(nn.Module):
    """Affine map of the last axis; Xavier-uniform weight, zero bias."""

    def __init__(self, width_in: int, width_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = _xavier(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Conv(nn.Module):
    """Convolution after, or fused with, resampling by a separable filter.

    ``kernel`` 0 resamples only. ``taps`` are the filter's one-dimensional weights, normalised
    here; ``resample`` is "down", "up" or None. ``fused`` (down only) convolves first, padded for
    both kernels, and then filters without padding. Weight: Xavier-uniform times ``gain``.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: int,
        *,
        resample: str | None = None,
        taps: Sequence[float] = (1, 1),
        fused: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.fused = fused
        self.weight = self.bias = None
        if kernel:
            self.weight = _xavier(torch.empty(width_out, width_in, kernel, kernel), gain)
            self.bias = nn.Parameter(torch.zeros(width_out))
        self.padding = kernel // 2
        self.filter_padding = (len(taps) - 1) // 2
        # Equal pairs of taps are plain averaging and repetition, for which CPUs have fast kernels.
        self.boxed = len(taps) == 2 and taps[0] == taps[1]
        line = torch.tensor([float(tap) for tap in taps])
        line = line / line.sum()
        square = torch.outer(line, line)[None, None] if resample else None
        self.register_buffer("resample_filter", square)

    def _down(self, x: Tensor, padding: int) -> Tensor:
        if self.boxed and padding == 0:
            return functional.avg_pool2d(x, 2)
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        return functional.conv2d(x, taps, stride=2, padding=padding, groups=channels)

    def _up(self, x: Tensor) -> Tensor:
        if self.boxed:
            return functional.interpolate(x, scale_factor=2.0, mode="nearest")
        channels = x.shape[1]
        # Each output pixel sees a quarter of the taps, hence the factor 4.
        taps = (self.resample_filter.to(x.dtype) * 4).expand(channels, -1, -1, -1)
        return functional.conv_transpose2d(
            x, taps, stride=2, padding=self.filter_padding, groups=channels
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            padding = self.padding + self.filter_padding
            return self._down(functional.conv2d(x, self.weight, self.bias, padding=padding), 0)
        if self.resample == "down":
            x = self._down(x, self.filter_padding)
        elif self.resample == "up" and self.boxed and self.padding == 0:
            # Repeating pixels commutes with a 1x1 convolution, which costs a quarter before it.
            return self._up(self._convolve(x))
        elif self.resample == "up":
            x = self._up(x)
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        return functional.conv2d(x, self.weight, self.bias, padding=self.padding)


def _norm(width: int) -> nn.GroupNorm:
    groups = min(32, width // 4)
    if groups < 1 or width % groups:
        raise ValueError(
            f"a layer of {width} channels cannot be normalised in groups of 4 (or in 32 groups); "
            "choose model_channels so that every width, concatenations with skips included, is a "
            "multiple of 4, and of 32 from 128 on"
        )
    return nn.GroupNorm(groups, width, eps=1e-6)


class Block(nn.Module):
    """Residual block with optional resampling and single-head attention.

    Maps x [N, width_in, H, W] and embedding [N, E] to [N, width_out, H', W'].
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        embedding: int,
        *,
        resample: str | None = None,
        taps: Sequence[float] = (1, 1),
        attends: bool = False,
        dropout: float = 0.0,
        kind: str = "sdpa",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width_out = width_out
        self.dropout = dropout
        self.attends = attends
        self.kind = kind
        self.checkpointing = checkpointing
        self.norm0 = _norm(width_in)
        self.conv0 = Conv(width_in, width_out, 3, resample=resample, taps=taps)
        self.affine = Linear(embedding, width_out)
        self.norm1 = _norm(width_out)
        self.conv1 = Conv(width_out, width_out, 3, gain=1e-5)
        self.skip = None
        if width_in != width_out or resample:
            self.skip = Conv(width_in, width_out, 1, resample=resample, taps=taps)
        if attends:
            self.norm2 = _norm(width_out)
            self.qkv = Conv(width_out, 3 * width_out, 1, gain=math.sqrt(0.2))
            self.proj = Conv(width_out, width_out, 1, gain=1e-5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, embedding, use_reentrant=False)
        return self._forward(x, embedding)

    def _forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv0(functional.silu(self.norm0(x)))
        hidden = hidden + self.affine(embedding)[:, :, None, None]
        hidden = functional.silu(self.norm1(hidden))
        if self.dropout:
            hidden = functional.dropout(hidden, self.dropout, self.training)
        hidden = self.conv1(hidden)
        x = (hidden + (x if self.skip is None else self.skip(x))) * HALF
        return self._attend(x) if self.attends else x

    def _attend(self, x: Tensor) -> Tensor:
        count, width, height, breadth = x.shape
        # Packed channel by channel: q, k and v of one channel are neighbours. Made contiguous,
        # because batched products of strided tensors are slow on CPUs.
        packed = self.qkv(self.norm2(x)).view(count, 1, width, 3, height * breadth)
        query, key, value = packed.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        mixed = attention(query, key, value, scale=width**-0.5, kind=self.kind)
        mixed = mixed.transpose(2, 3).reshape(count, width, height, breadth)
        return (self.proj(mixed) + x) * HALF


class Positional(nn.Module):
    """Cosines, then sines, of the noise number at frequencies 1 down to 1/10000 [N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.half = width // 2

    def forward(self, noise: Tensor) -> Tensor:
        exponent = torch.arange(self.half, dtype=torch.float32, device=noise.device)
        angle = torch.outer(noise, (1.0 / 10000.0) ** (exponent / max(self.half - 1, 1)))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Fourier(nn.Module):
    """Cosines, then sines, of the noise number at fixed random frequencies [N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * 16.0)

    def forward(self, noise: Tensor) -> Tensor:
        angle = torch.outer(noise, 2 * math.pi * self.freqs)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class SongUNet(Backbone):
    """DDPM++ (``positional``, ``standard``) and NCSN++ (``fourier``, ``residual``).

    ``forward(x [N, C, H, W], noise [N], label, augment_labels=None)`` returns [N, C_out, H, W].
    ``label`` is int64 [N] (``num_classes`` = null label), a float tensor [N, num_classes] of
    one-hot or soft labels, or None; the null label and None are the zero vector.
    ``augment_labels`` [N, augment_dim] tells the network how its input was augmented; where it is
    left out, or the network has no such input, nothing is added.

    Encoder types: ``skip`` adds a 1x1 convolution of the downsampled input image to every
    downsampling block's output; ``residual`` adds a convolution of a running auxiliary tensor
    and renormalises. Decoder type ``skip`` sums an image made at every resolution, upsampled on
    the way, instead of making one at the finest. Attention: encoder blocks of the resolutions in
    ``attn_resolutions``, the last decoder block of each of them, and the first block between
    encoder and decoder in any case.

    Raises ``ValueError`` where the resolution cannot be halved often enough, a width cannot be
    normalised, or the resampling filter has an odd number of taps.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_emb: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        label_dropout: float,
        embedding_type: str,
        channel_mult_noise: int,
        encoder_type: str,
        decoder_type: str,
        resample_filter: Sequence[float],
        scaling: SkipScaling = UNSCALED,
        attention: str = "sdpa",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check("embedding_type", embedding_type, ("positional", "fourier"))
        _check("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check("decoder_type", decoder_type, ("standard", "skip"))
        levels = len(channel_mult)
        if levels < 1:
            raise ValueError("channel_mult needs at least one entry")
        if img_resolution % 2 ** (levels - 1):
            raise ValueError(
                f"{levels} levels (channel_mult) halve the resolution {levels - 1} times, "
                f"but {img_resolution} is not a multiple of {2 ** (levels - 1)}"
            )
        if levels > 1 and len(resample_filter) % 2:
            raise ValueError(
                "resample_filter needs an even number of taps: with "
                f"{len(resample_filter)} the decoder's resolutions do not match the encoder's"
            )
        noise_width = model_channels * channel_mult_noise
        if noise_width % 2:
            raise ValueError(
                f"model_channels x channel_mult_noise must be even; here it is {noise_width}"
            )
        self.num_classes = label_dim
        self.label_dropout = label_dropout
        self.encoder_type = encoder_type
        self.decoder_type = decoder_type
        self.num_blocks = num_blocks
        self.resolutions = [img_resolution >> level for level in range(levels)]

        embedding = model_channels * channel_mult_emb
        features = Positional if embedding_type == "positional" else Fourier
        self.map_noise = features(noise_width)
        self.map_label = Linear(label_dim, noise_width) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_width, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_width, embedding)
        self.map_layer1 = Linear(embedding, embedding)

        taps = tuple(resample_filter)
        common = {
            "taps": taps,
            "dropout": dropout,
            "kind": attention,
            "checkpointing": checkpointing,
        }
        self.enc = nn.ModuleDict()
        shapes: list[SkipShape] = []
        width, auxiliary = model_channels, in_channels
        for level, (resolution, mult) in enumerate(zip(self.resolutions, channel_mult)):
            at = f"{resolution}x{resolution}_"
            if level == 0:
                self.enc[at + "conv"] = Conv(in_channels, width, 3)
            else:
                self.enc[at + "down"] = Block(width, width, embedding, resample="down", **common)
                if encoder_type == "skip":
                    self.enc[at + "aux_down"] = Conv(
                        auxiliary, auxiliary, 0, resample="down", taps=taps
                    )
                    self.enc[at + "aux_skip"] = Conv(auxiliary, width, 1)
                elif encoder_type == "residual":
                    self.enc[at + "aux_residual"] = Conv(
                        auxiliary, width, 3, resample="down", taps=taps, fused=True
                    )
                    auxiliary = width
            shapes.append(SkipShape(width, level))
            for index in range(num_blocks):
                narrow, width = width, model_channels * mult
                self.enc[f"{at}block{index}"] = Block(
                    narrow, width, embedding, attends=resolution in attn_resolutions, **common
                )
                shapes.append(SkipShape(width, level))

        self.dec = nn.ModuleDict()
        unused = list(shapes)
        for level in reversed(range(levels)):
            resolution = self.resolutions[level]
            at = f"{resolution}x{resolution}_"
            if level == levels - 1:
                self.dec[at + "in0"] = Block(width, width, embedding, attends=True, **common)
                self.dec[at + "in1"] = Block(width, width, embedding, **common)
            else:
                self.dec[at + "up"] = Block(width, width, embedding, resample="up", **common)
            for index in range(num_blocks + 1):
                fused, width = width + unused.pop().width, model_channels * channel_mult[level]
                last = index == num_blocks
                self.dec[f"{at}block{index}"] = Block(
                    fused,
                    width,
                    embedding,
                    attends=last and resolution in attn_resolutions,
                    **common,
                )
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < levels - 1:
                    self.dec[at + "aux_up"] = Conv(
                        out_channels, out_channels, 0, resample="up", taps=taps
                    )
                self.dec[at + "aux_norm"] = _norm(width)
                self.dec[at + "aux_conv"] = Conv(width, out_channels, 3, gain=1e-5)

        self.long_skips = LongSkips(scaling, shapes, pooling="channels")
        if self.long_skips.gates is not None:
            self.se = self.long_skips.gates

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
    ) -> "SongUNet":
        """Build from a spec's options. Keys left out take DDPM++'s published values."""
        return cls(
            img_resolution=resolution,
            in_channels=channels,
            out_channels=out_channels,
            label_dim=num_classes,
            augment_dim=augment_dim,
            dropout=dropout,
            label_dropout=0.0,
            scaling=scaling,
            attention=attention,
            checkpointing=checkpointing,
            **options.model_dump(),
        )

    def blocks(self) -> dict[str, nn.Module]:
        return {
            f"{part}.{name}": module
            for part, modules in (("enc", self.enc), ("dec", self.dec))
            for name, module in modules.items()
            if "aux" not in name
        }

    def decoder_blocks(self) -> list[nn.Module]:
        return [
            self.dec[f"{resolution}x{resolution}_block{index}"]
            for resolution in self.resolutions
            for index in reversed(range(self.num_blocks + 1))
        ]

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        x = x.float()
        embedding = self._embed(x, noise, label, augment_labels)
        skips: list[Tensor] = []
        x = self._encode(x, embedding, skips)
        return self._decode(x, embedding, skips).float()

    def _embed(
        self, x: Tensor, noise: Tensor, label: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        cosine, sine = self.map_noise(noise.reshape(-1).float()).chunk(2, dim=1)
        embedding = torch.cat([sine, cosine], dim=1)
        if self.map_label is not None:
            vector = self._label_vector(x, label)
            if self.training and self.label_dropout:
                kept = torch.rand(x.shape[0], 1, device=x.device) >= self.label_dropout
                vector = vector * kept
            embedding = embedding + self.map_label(vector * math.sqrt(self.num_classes))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels.float())
        embedding = functional.silu(self.map_layer0(embedding))
        return functional.silu(self.map_layer1(embedding))

    def _label_vector(self, x: Tensor, label: Tensor | None) -> Tensor:
        """One-hot rows [N, num_classes]; zeros for the null label and for no label."""
        if label is None:
            return x.new_zeros(x.shape[0], self.num_classes)
        if label.is_floating_point():
            return label
        return functional.one_hot(label, self.num_classes + 1)[:, :-1].to(x.dtype)

    def _encode(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        auxiliary = x
        for level, resolution in enumerate(self.resolutions):
            at = f"{resolution}x{resolution}_"
            if level == 0:
                x = self.enc[at + "conv"](x)
            else:
                x = self.enc[at + "down"](x, embedding)
                if self.encoder_type == "skip":
                    auxiliary = self.enc[at + "aux_down"](auxiliary)
                    x = x + self.enc[at + "aux_skip"](auxiliary)
                elif self.encoder_type == "residual":
                    auxiliary = (x + self.enc[at + "aux_residual"](auxiliary)) * HALF
                    x = auxiliary
            skips.append(x)
            for index in range(self.num_blocks):
                x = self.enc[f"{at}block{index}"](x, embedding)
                skips.append(x)
        return x

    def _decode(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        image: Tensor | None = None
        for level in reversed(range(len(self.resolutions))):
            at = f"{self.resolutions[level]}x{self.resolutions[level]}_"
            if level == len(self.resolutions) - 1:
                x = self.dec[at + "in0"](x, embedding)
                x = self.dec[at + "in1"](x, embedding)
            else:
                x = self.dec[at + "up"](x, embedding)
            for index in range(self.num_blocks + 1):
                number = len(skips)
                fused = self.long_skips.fuse(number, x, skips.pop())
                x = self.dec[f"{at}block{index}"](fused, embedding)
            if self.decoder_type == "skip" or level == 0:
                made = self.dec[at + "aux_conv"](functional.silu(self.dec[at + "aux_norm"](x)))
                image = made if image is None else made + self.dec[at + "aux_up"](image)
        return image


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is unknown; allowed: {', '.join(allowed)}")
