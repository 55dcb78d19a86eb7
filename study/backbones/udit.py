"""U-DiT: a U-shaped diffusion transformer whose attention runs on downsampled tokens.

Source: Tian et al. 2024, "U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers".
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from study.backbones.base import Backbone, attention, sinusoidal
from study.skips import LongSkips, SkipShape
from study.spec.backbones import BackboneOptions
from study.spec.scalings import SkipScaling

FREQUENCIES = 256
"""Sinusoidal features of the noise level."""

MAX_LOGIT_SCALE = 4.6052
"""Upper bound of the cosine attention's log scale, about ln 100."""


class PointwiseConv(nn.Conv2d):
    """1x1 convolution of maps [B, C, H, W], computed as a linear layer over channels.

    Faster than the general convolution where maps are stored channels-last, as they are here.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = functional.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return mixed.permute(0, 3, 1, 2)


class Modulation(nn.Sequential):
    """adaLN: condition [B, D] -> ``parts`` vectors of width D behind one another."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))


def vectors(modulation: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The ``parts`` vectors [B, 1, 1, D] of an adaLN output."""
    return modulation[:, None, None].chunk(parts, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Channel LayerNorm of a map [B, C, H, W] without affine part, then x (1 + scale) + shift."""
    normal = functional.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=1e-6)
    return torch.addcmul(shift, normal, 1 + scale).permute(0, 3, 1, 2)


def rotary_table(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Unit complex numbers [rows * columns, 1, 1, width // 2] of 2-D rotary embedding.

    Frequencies are 10000^(-4i / width), i < width / 4; rotary pairs alternate between column and
    row position. ``width`` is that of a head.
    """
    index = torch.arange(width // 4, dtype=torch.float32, device=device)
    frequency = torch.exp(-math.log(10000.0) * 4 * index / width)
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device)[None].expand(rows, columns)
    position = torch.stack([column, row], dim=-1).reshape(rows * columns, 1, 2)
    angle = (position * frequency[:, None]).flatten(1)
    return torch.polar(torch.ones_like(angle), angle)[:, None, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate consecutive channel pairs of [batch, tokens, ., ., width] by ``table``'s angles."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2)


class DownSampler(nn.Module):
    """Depth-wise convolution, then the split into ``factor``^2 interleaved sub-grids.

    [B, C, H, W] -> [B, factor^2, H W / factor^2, C]. With ``shortcut`` the input is added to the
    convolution's output. No token is dropped.
    """

    def __init__(self, width: int, factor: int, kernel: int, shortcut: bool) -> None:
        super().__init__()
        self.factor = factor
        self.shortcut = shortcut
        self.layer = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) + x if self.shortcut else self.layer(x)
        batch, width, height, breadth = x.shape
        f, h, w = self.factor, height // self.factor, breadth // self.factor
        x = x.permute(0, 2, 3, 1).reshape(batch, h, f, w, f, width)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, f * f, h * w, width)


class DownSampledAttention(nn.Module):
    """Self-attention inside each sub-grid of a map, then interleaving and a 1x1 convolution.

    ``cosine`` attention normalises queries and keys and has a learned scale per head; otherwise
    it is the ordinary scaled dot product.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        factor: int,
        kernel: int,
        shortcut: bool,
        cosine: bool,
        kind: str,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.factor = factor
        self.kind = kind
        self.logit_scale = (
            nn.Parameter(torch.full((heads, 1, 1), math.log(10.0))) if cosine else None
        )
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = PointwiseConv(width, width)
        self.downsampler = DownSampler(width, factor, kernel, shortcut)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        batch, width, height, breadth = x.shape
        f, h, w = self.factor, height // self.factor, breadth // self.factor
        head = width // self.heads
        packed = self.to_qkv(self.downsampler(x)).view(batch * f * f, h * w, 3, self.heads, head)
        # Queries and keys are treated together: half as many small operations.
        pair, value = packed.split((2, 1), dim=2)
        if table is not None:
            pair = rotate(pair, table)
        scale = head**-0.5
        if self.logit_scale is not None:
            pair = functional.normalize(pair, dim=-1)
            scale = 1.0
        query, key = pair.permute(2, 0, 3, 1, 4).unbind(0)
        if self.logit_scale is not None:
            query = query * self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        query, key = query.to(value.dtype), key.to(value.dtype)
        value = value.squeeze(2).transpose(1, 2)
        mixed = attention(query, key, value, scale=scale, kind=self.kind)
        mixed = mixed.transpose(1, 2).reshape(batch, f, f, h, w, width)
        mixed = mixed.permute(0, 3, 1, 4, 2, 5).reshape(batch, height, breadth, width)
        return self.to_out(mixed.permute(0, 3, 1, 2))


class RepFFN(nn.Module):
    """Feed-forward network with a depth-wise 5x5 convolution.

    With ``rep`` every linear map is over-parametrised: 1x1 convolutions come in pairs, and the
    5x5 convolution has 3x3, 1x1 and identity branches beside it. ``merged()`` is the network
    without ``rep`` that computes the same.
    """

    def __init__(self, width: int, hidden: int, rep: bool) -> None:
        super().__init__()
        self.rep = rep
        if rep:
            half = hidden // 2
            self.project_in = nn.Sequential(PointwiseConv(width, half), PointwiseConv(half, hidden))
            self.dwconv = nn.ModuleList(
                [
                    nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
                    for kernel in (5, 3, 1)
                ]
            )
            self.project_out = nn.Sequential(
                PointwiseConv(hidden, half), PointwiseConv(half, width)
            )
        else:
            self.project_in = PointwiseConv(width, hidden)
            self.dwconv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
            self.project_out = PointwiseConv(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.project_in(x))
        if self.rep:
            # One convolution with the summed kernel instead of four branches: the same up to
            # rounding, and its gradient reaches every branch.
            kernel, bias = self.kernel()
            h = functional.conv2d(h, kernel, bias, padding=2, groups=h.shape[1])
        else:
            h = self.dwconv(h)
        return self.project_out(h)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """The 5x5 kernel [H, 1, 5, 5] and bias [H] of all branches and the identity together."""
        five, three, one = self.dwconv
        identity = functional.pad(torch.ones_like(one.weight), (2, 2, 2, 2))
        kernel = five.weight + functional.pad(three.weight, (1, 1, 1, 1))
        kernel = kernel + functional.pad(one.weight, (2, 2, 2, 2)) + identity
        return kernel, five.bias + three.bias + one.bias

    @torch.no_grad()
    def merged(self) -> "RepFFN":
        """A new network without ``rep`` and with the same output; ``self`` is unchanged."""
        if not self.rep:
            return copy.deepcopy(self)
        first = self.project_in[0]
        slim = RepFFN(first.in_channels, self.project_in[1].out_channels, rep=False)
        slim = slim.to(first.weight)
        for name in ("project_in", "project_out"):
            inner, outer = self.get_submodule(name)
            weight = outer.weight.flatten(1).double()
            merged = slim.get_submodule(name)
            merged.weight.copy_((weight @ inner.weight.flatten(1).double())[..., None, None])
            merged.bias.copy_(weight @ inner.bias.double() + outer.bias)
        kernel, bias = self.kernel()
        slim.dwconv.weight.copy_(kernel)
        slim.dwconv.bias.copy_(bias)
        return slim


class BasicFFN(nn.Module):
    """1x1 convolution, tanh-approximated GELU, 1x1 convolution."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(width, hidden)
        self.fc2 = PointwiseConv(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Two pairs of attention and feed-forward network, each with its own adaLN."""

    def __init__(
        self, width: int, mlp_ratio: float, ffn_type: str, rep: bool, **attending: Any
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)

        def ffn() -> nn.Module:
            return BasicFFN(width, hidden) if ffn_type == "basic" else RepFFN(width, hidden, rep)

        self.attn1 = DownSampledAttention(width, **attending)
        self.mlp1 = ffn()
        self.adaLN_modulation1 = Modulation(width, 6)
        self.attn2 = DownSampledAttention(width, **attending)
        self.mlp2 = ffn()
        self.adaLN_modulation2 = Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor, table: Tensor | None) -> Tensor:
        for attn, mlp, modulation in (
            (self.attn1, self.mlp1, self.adaLN_modulation1),
            (self.attn2, self.mlp2, self.adaLN_modulation2),
        ):
            shift1, scale1, gate1, shift2, scale2, gate2 = vectors(modulation(condition), 6)
            x = self._add(x, gate1, attn(modulated_norm(x, shift1, scale1), table))
            x = self._add(x, gate2, mlp(modulated_norm(x, shift2, scale2)))
        return x

    @staticmethod
    def _add(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(x, gate.permute(0, 3, 1, 2), branch)


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then a 3x3 convolution to the output channels."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.out_proj = nn.Conv2d(width, out_channels, 3, padding=1)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = vectors(self.adaLN_modulation(condition), 2)
        return self.out_proj(modulated_norm(x, shift, scale))


class PatchEmbed(nn.Module):
    """3x3 convolution from image channels to the width of level 1."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class NoiseEmbedder(nn.Module):
    """Noise level [N] -> vector [N, width]: sinusoidal features, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, noise: Tensor) -> Tensor:
        return self.mlp(sinusoidal(noise, FREQUENCIES).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Label [N] -> vector [N, width]; the null label's row exists only with ``null``."""

    def __init__(self, num_classes: int, width: int, null: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null, width)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


class Resample(nn.Module):
    """3x3 convolution without bias, then pixel-(un)shuffle by 2."""

    def __init__(self, inputs: int, outputs: int, shuffle: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), shuffle)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class UDiT(Backbone):
    """U-DiT: two encoder levels, a latent level and two decoder levels, with two long skips.

    Widths are D, 2D, 4D, 2D, 2D. Conditions are noise level plus label, embedded three times
    (widths D, 2D, 4D): encoder level 1 has its own, the latent too, all else shares the second.
    ``num_classes = 0`` (ours) has no label tables: the condition is the noise level alone.

    Arguments have their official names; ``down_factor`` may differ per level (five numbers, in
    the order of ``depth``), ``attn_type`` None is the same as "v1". ``scaling`` is the skip
    scaling of a spec; learned gates are per token (a token is a position of the map), the token
    gate of ScaleLong carried over to maps: ours, not published.

    ``forward(x [N, C, H, W], noise [N], label [N] int64 | None, label_drop_uniform=None)`` ->
    [N, C_out, H, W]. ``noise`` is the integer timestep 0 .. 999 officially. ``label=None`` means
    the null label where there is one (``class_dropout_prob > 0``). ``label_drop_uniform`` is a
    sequence of ``label_drops`` = 3 vectors [N] of uniform numbers: embedder k sees the null label
    where the k-th is below ``class_dropout_prob``. The official code draws them itself in training
    mode; here the caller does, so that a run's random numbers stay a function of seed and step,
    and without them no label is dropped.

    Raises ``ValueError`` for sizes that do not fit together.
    """

    label_drops = 3

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        out_channels: int,
        scaling: SkipScaling,
        down_factor: int | Sequence[int] = 2,
        hidden_size: int = 96,
        depth: Sequence[int] = (2, 5, 8, 5, 2),
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 0,
        rep: bool = True,
        ffn_type: str = "rep",
        attn_type: str | None = "v2",
        posemb_type: str | None = "rope2d",
        downsampler: str = "dwconv5",
        down_shortcut: bool = True,
        attention: str = "sdpa",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        factors = [down_factor] * 5 if isinstance(down_factor, int) else list(down_factor)
        if len(depth) != 5 or len(factors) != 5:
            raise ValueError("depth and down_factor need five numbers, one per level")
        if hidden_size % 2 or hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be even and a multiple of num_heads {num_heads}"
            )
        if posemb_type == "rope2d" and hidden_size // num_heads % 4:
            raise ValueError(
                f"rope2d needs heads whose width is a multiple of 4; hidden_size {hidden_size} "
                f"with {num_heads} heads gives {hidden_size // num_heads}"
            )
        for name, value, allowed in (
            ("ffn_type", ffn_type, ("rep", "basic")),
            ("attn_type", attn_type, (None, "v1", "v2")),
            ("posemb_type", posemb_type, (None, "rope2d")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown; allowed: {allowed}")
        if not downsampler or downsampler[:-1] != "dwconv" or downsampler[-1] not in "13579":
            raise ValueError(f"downsampler {downsampler!r} must be dwconv and an odd digit")
        self.factors = factors
        self.resolution = resolution
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob if num_classes else 0.0
        self.rotary = posemb_type == "rope2d"
        self.checkpointing = checkpointing
        self._check_grid(resolution, resolution)
        d = hidden_size

        def level(index: int, width: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(
                    width,
                    mlp_ratio,
                    ffn_type,
                    bool(rep),
                    heads=num_heads,
                    factor=factors[index],
                    kernel=int(downsampler[-1]),
                    shortcut=bool(down_shortcut),
                    cosine=attn_type == "v2",
                    kind=attention,
                )
                for _ in range(depth[index])
            )

        self.x_embedder = PatchEmbed(channels, d)
        for index, width in ((1, d), (2, 2 * d), (3, 4 * d)):
            self.add_module(f"t_embedder_{index}", NoiseEmbedder(width))
            if num_classes:
                embedder = LabelEmbedder(num_classes, width, class_dropout_prob > 0)
                self.add_module(f"y_embedder_{index}", embedder)
        self.encoder_level_1 = level(0, d)
        self.down1_2 = Resample(d, d // 2, nn.PixelUnshuffle(2))
        self.encoder_level_2 = level(1, 2 * d)
        self.down2_3 = Resample(2 * d, d, nn.PixelUnshuffle(2))
        self.latent = level(2, 4 * d)
        self.up3_2 = Resample(4 * d, 8 * d, nn.PixelShuffle(2))
        self.reduce_chan_level2 = PointwiseConv(4 * d, 2 * d)
        self.decoder_level_2 = level(3, 2 * d)
        self.up2_1 = Resample(2 * d, 4 * d, nn.PixelShuffle(2))
        self.reduce_chan_level1 = PointwiseConv(2 * d, 2 * d)
        self.decoder_level_1 = level(4, 2 * d)
        self.output = nn.Conv2d(2 * d, 2 * d, 3, padding=1)
        self.final_layer = FinalLayer(2 * d, out_channels)
        self._initialise()
        # As in U-ViT the gates come last and keep PyTorch's own initialisation.
        shapes = [SkipShape(resolution**2, 0), SkipShape((resolution // 2) ** 2, 1)]
        self.long_skips = LongSkips(scaling, shapes, pooling="tokens")
        if self.long_skips.gates is not None:
            self.se = self.long_skips.gates

    @torch.no_grad()
    def _initialise(self) -> None:
        """Official scheme: Xavier-uniform weights and zero biases, with these exceptions.

        Noise-level and label embeddings are normal with std 0.02; adaLN and the final convolution
        are zero, so that the untrained network outputs zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The first convolution is initialised as the linear layer that it is to each patch.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        for module in self.modules():
            if isinstance(module, NoiseEmbedder):
                nn.init.normal_(module.mlp[0].weight, std=0.02)
                nn.init.normal_(module.mlp[2].weight, std=0.02)
            elif isinstance(module, LabelEmbedder):
                nn.init.normal_(module.embedding_table.weight, std=0.02)
            elif isinstance(module, Modulation):
                nn.init.zeros_(module[1].weight)
        nn.init.zeros_(self.final_layer.out_proj.weight)

    def _check_grid(self, height: int, breadth: int) -> None:
        for level, factor in enumerate(self.factors):
            halvings = 2 - abs(2 - level)
            step = 2**halvings * factor
            if height % step or breadth % step:
                raise ValueError(
                    f"U-DiT halves the grid twice and splits each level by down_factor; level "
                    f"{level + 1} of 5 needs a multiple of {step}, but the grid is "
                    f"{height}x{breadth}"
                )

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
    ) -> "UDiT":
        """As in ``Backbone``. ``num_classes`` counts real classes."""
        if dropout:
            raise ValueError(f"U-DiT has no dropout, but dropout is {dropout}; it must be 0")
        if augment_dim:
            raise ValueError("U-DiT takes no augmentation labels; augmentation must be off")
        return cls(
            **options.model_dump(),
            resolution=resolution,
            channels=channels,
            out_channels=out_channels,
            scaling=scaling,
            num_classes=num_classes,
            attention=attention,
            checkpointing=checkpointing,
        )

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        *,
        label_drop_uniform: Sequence[Tensor] | None = None,
    ) -> Tensor:
        height, breadth = x.shape[2:]
        if (height, breadth) != (self.resolution, self.resolution):
            self._check_grid(height, breadth)
            if self.long_skips.gates is not None:
                raise ValueError(
                    f"the learned gates of this U-DiT are for {self.resolution}x{self.resolution} "
                    f"grids, not {height}x{breadth}"
                )
        c1, c2, c3 = self._conditions(noise, self._label(label, x), label_drop_uniform)
        x = x.to(self.x_embedder.proj.weight.dtype, memory_format=torch.channels_last)
        skip1 = self._level(self.encoder_level_1, 0, self.x_embedder(x), c1)
        skip2 = self._level(self.encoder_level_2, 1, self.down1_2(skip1), c2)
        h = self._level(self.latent, 2, self.down2_3(skip2), c3)
        h = self.reduce_chan_level2(self.long_skips.fuse(2, self.up3_2(h), skip2))
        h = self._level(self.decoder_level_2, 3, h, c2)
        h = self.reduce_chan_level1(self.long_skips.fuse(1, self.up2_1(h), skip1))
        h = self._level(self.decoder_level_1, 4, h, c2)
        return self.final_layer(self.output(h), c2).float()

    @torch.no_grad()
    def merged(self) -> "UDiT":
        """The evaluation form: a copy whose re-parametrised layers are merged (fewer operations).

        The output is the same up to rounding. ``self`` is not changed, so that this may be called
        at any time and any number of times; the copy is a snapshot of the present weights, in
        evaluation mode and without gradients, and cannot load the un-merged form's weights. (The
        official code merges into its own parameters instead, which a second call breaks.)
        """
        observer, self.long_skips.observer = self.long_skips.observer, None
        try:
            network = copy.deepcopy(self)
        finally:
            self.long_skips.observer = observer
        for block in network.modules():
            if isinstance(block, Block) and isinstance(block.mlp1, RepFFN):
                block.mlp1 = block.mlp1.merged()
                block.mlp2 = block.mlp2.merged()
        return network.eval().requires_grad_(False)

    def _label(self, label: Tensor | None, x: Tensor) -> Tensor | None:
        if not self.num_classes:
            return None
        if label is not None:
            return label
        if not self.class_dropout_prob:
            raise ValueError("this U-DiT has no null label; it needs a label for every image")
        return torch.full((x.shape[0],), self.num_classes, device=x.device)

    def _conditions(
        self, noise: Tensor, label: Tensor | None, uniform: Sequence[Tensor] | None
    ) -> list[Tensor]:
        conditions = []
        for index in range(3):
            condition = self.get_submodule(f"t_embedder_{index + 1}")(noise)
            if label is not None:
                seen = label
                if uniform is not None and self.class_dropout_prob:
                    dropped = uniform[index] < self.class_dropout_prob
                    seen = torch.where(dropped, self.num_classes, label)
                condition = condition + self.get_submodule(f"y_embedder_{index + 1}")(seen)
            conditions.append(condition)
        return conditions

    def _level(self, blocks: nn.ModuleList, level: int, x: Tensor, condition: Tensor) -> Tensor:
        table = None
        if self.rotary:
            rows, columns = (side // self.factors[level] for side in x.shape[2:])
            table = rotary_table(rows, columns, x.shape[1] // self.num_heads, x.device)
        for block in blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, table, use_reentrant=False)
            else:
                x = block(x, condition, table)
        return x

    def blocks(self) -> dict[str, nn.Module]:
        levels = (
            "encoder_level_1",
            "encoder_level_2",
            "latent",
            "decoder_level_2",
            "decoder_level_1",
        )
        return {
            f"{level}.{index}": block
            for level in levels
            for index, block in enumerate(self.get_submodule(level))
        }

    def decoder_blocks(self) -> list[nn.Module]:
        return [self.reduce_chan_level1, self.reduce_chan_level2]
