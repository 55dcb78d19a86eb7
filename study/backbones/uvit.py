"""U-ViT: a vision transformer with long skips.

Source: Bao et al. 2023, "All are Worth Words: A ViT Backbone for Diffusion Models" (pixel,
class-conditional and text-to-image networks), and Huang et al. 2023, "ScaleLong" (the same network
with scaled long skips).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from study.backbones.base import Backbone, attention, sinusoidal
from study.skips import LongSkips, SkipShape
from study.spec.backbones import BackboneOptions
from study.spec.scalings import UNSCALED, SkipScaling


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, T, D]; qkv packed as (3, heads, D // heads)."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, kind: str) -> None:
        super().__init__()
        self.heads = heads
        self.kind = kind
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        packed = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        scale = (width // self.heads) ** -0.5
        mixed = attention(query, key, value, scale=scale, kind=self.kind)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; ``fused`` blocks first map a fusion [B, T, 2 D] to [B, T, D]."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, fused: bool, kind: str
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias, kind)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.skip_linear = nn.Linear(2 * width, width) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(x)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Linear embedding of patches: [B, C, H, W] -> [B, T, D], patches in row-major order."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(Backbone):
    """U-ViT.

    Tokens are [label,] time, [context,] patches. The outputs of the first half of the blocks are
    long skips: the second half consumes them, last one first, through ``long_skips.fuse`` and a
    linear layer.

    ``labels`` is the number of rows of the label table (0 = none) and ``num_classes`` the number
    of classes; with ``labels = num_classes + 1`` the last row is the null label. ``scaling`` is
    the skip scaling of a spec. The other arguments have their official names, except that
    ``context_dim`` and ``context_tokens`` describe the text encoder's output.

    ``forward(x [N, C, H, W], noise [N], label [N] int64 | None, context [N, context_tokens,
    context_dim] | None)`` -> [N, C_out, H, W]. ``noise`` is 999 t (t in [0, 1]) in the published
    pixel models and the step 1 .. 1000 in the discrete latent ones. ``label=None`` means the null
    label where there is one. A network without classes ignores labels.

    Raises ``ValueError`` for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        out_channels: int,
        scaling: SkipScaling,
        patch_size: int = 2,
        embed_dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        conv: bool = True,
        skip: bool = True,
        labels: int = 0,
        num_classes: int = 0,
        context_dim: int | None = None,
        context_tokens: int = 77,
        attention: str = "sdpa",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if resolution % patch_size:
            raise ValueError(
                f"resolution {resolution} is not a multiple of patch_size {patch_size}"
            )
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.image_shape = (channels, resolution, resolution)
        self.out_channels = out_channels
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.num_classes = num_classes
        self.labels = labels
        self.checkpointing = checkpointing
        self.context_shape = None if context_dim is None else (context_tokens, context_dim)
        self.extras = 1 + bool(labels) + (0 if context_dim is None else context_tokens)
        tokens = self.extras + (resolution // patch_size) ** 2
        half = depth // 2

        def block(fused: bool) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, fused, attention)

        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.patch_embed = PatchEmbed(channels, embed_dim, patch_size)
        if mlp_time_embed:
            self.time_embed = nn.Sequential(
                nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim)
            )
        else:
            self.time_embed = nn.Identity()
        if labels:
            self.label_emb = nn.Embedding(labels, embed_dim)
        if context_dim is not None:
            self.context_embed = nn.Linear(context_dim, embed_dim)
        self.in_blocks = nn.ModuleList([block(False) for _ in range(half)])
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList([block(skip) for _ in range(half)])
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * out_channels)
        self.final_layer = (
            nn.Conv2d(out_channels, out_channels, 3, padding=1) if conv else nn.Identity()
        )
        self._initialise()
        # The gates come after the initialisation pass: officially they keep PyTorch's own.
        shapes = [SkipShape(tokens) for _ in range(half if skip else 0)]
        self.long_skips = LongSkips(scaling, shapes, pooling="tokens")
        if self.long_skips.gates is not None:
            self.se = self.long_skips.gates

    @torch.no_grad()
    def _initialise(self) -> None:
        """Official scheme: normal weights of std 0.02 and zero biases in every linear layer.

        Convolutions and the label table keep PyTorch's defaults. (The official normal is cut at
        100 standard deviations, which changes nothing.)
        """
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

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
    ) -> "UViT":
        """As in ``Backbone``; ``num_classes`` counts real classes, the null label is one more."""
        if dropout:
            raise ValueError(f"U-ViT has no dropout, but dropout is {dropout}; it must be 0")
        if augment_dim:
            raise ValueError("U-ViT takes no augmentation labels; augmentation must be off")
        given = options.model_dump()
        null_label = given.pop("null_label")
        if not options.skip and scaling != UNSCALED:
            raise ValueError("there is no long skip to scale (skip is false); use method none")
        return cls(
            **given,
            resolution=resolution,
            channels=channels,
            out_channels=out_channels,
            scaling=scaling,
            labels=num_classes + bool(null_label) if num_classes else 0,
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
        context: Tensor | None = None,
    ) -> Tensor:
        if x.shape[1:] != self.image_shape:
            raise ValueError(
                f"U-ViT was built for images {self.image_shape}, not {tuple(x.shape[1:])}"
            )
        dtype = self.pos_embed.dtype
        time = self.time_embed(sinusoidal(noise, self.embed_dim).to(dtype))
        tokens = [time[:, None], self.patch_embed(x.to(dtype))]
        if self.context_shape is not None:
            if context is None or context.shape[1:] != self.context_shape:
                raise ValueError(
                    f"text-to-image U-ViT needs context [N, {self.context_shape[0]}, "
                    f"{self.context_shape[1]}]"
                )
            tokens.insert(1, self.context_embed(context.to(dtype)))
        if self.labels:
            tokens.insert(0, self.label_emb(self._label(label, x))[:, None])
        h = torch.cat(tokens, dim=1) + self.pos_embed

        skips = []
        for block in self.in_blocks:
            h = self._run(block, h)
            skips.append(h)
        h = self._run(self.mid_block, h)
        for block in self.out_blocks:
            skip = skips.pop()
            if len(self.long_skips):
                h = self.long_skips.fuse(len(skips) + 1, h, skip)
            h = self._run(block, h)

        h = self.decoder_pred(self.norm(h))[:, self.extras :]
        return self.final_layer(self._unpatch(h)).float()

    def _label(self, label: Tensor | None, x: Tensor) -> Tensor:
        if label is not None:
            return label
        if self.labels == self.num_classes:
            raise ValueError("this U-ViT has no null label; it needs a label for every image")
        return torch.full((x.shape[0],), self.num_classes, device=x.device)

    def _run(self, block: Block, h: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, h, use_reentrant=False)
        return block(h)

    def _unpatch(self, h: Tensor) -> Tensor:
        """[B, patches, (row, column, channel)] -> [B, C, H, W]."""
        size, side = self.patch_size, self.image_shape[1] // self.patch_size
        h = h.reshape(h.shape[0], side, side, size, size, self.out_channels)
        h = h.permute(0, 5, 1, 3, 2, 4)
        return h.reshape(h.shape[0], self.out_channels, side * size, side * size)

    def blocks(self) -> dict[str, nn.Module]:
        named = {f"in_blocks.{i}": block for i, block in enumerate(self.in_blocks)}
        named["mid_block"] = self.mid_block
        return named | {f"out_blocks.{i}": block for i, block in enumerate(self.out_blocks)}

    def decoder_blocks(self) -> list[nn.Module]:
        return list(self.out_blocks)[::-1] if len(self.long_skips) else []
