"""The backbone families: options, presets, and where their networks live.

To add one: write its network as ``study/backbones/<file>.py`` (a ``Backbone`` with
``from_options``), a model of its options here, and its row in ``FAMILIES``.
"""

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from study.files import UserError
from study.spec.base import Model
from study.spec.scalings import SkipScaling

NO_NULL_LABEL = "the network has no null label; set its option "


class BackboneOptions(Model):
    """Options of a backbone; defaults are those of the official constructor."""

    has_dropout: ClassVar[bool] = True
    augmentable: ClassVar[bool] = False
    """Whether the network takes labels of augmentations."""
    drops_labels: ClassVar[str] = ""
    """Where the network drops labels itself: that it does, and by which option."""

    def no_null_label(self) -> str | None:
        """Why the network, if it has classes, has no label for no class; ``None``: it has one."""
        return None

    def problem(
        self,
        *,
        resolution: int | None,
        channels: int | None,
        scaling: SkipScaling,
        outputs: int = 1,
    ) -> str | None:
        """Why these options cannot be on such images with such a skip scaling, if so.

        Cheap arithmetic only; ``None`` means that nothing is wrong as far as can be told without
        building the network. ``resolution`` or ``channels`` is ``None`` where not yet known;
        ``outputs`` is how many channels the network makes of each channel of an image.
        """
        return None

    def skip_shapes(self) -> list[tuple[int, int]] | None:
        """Relative width and level of the long skips, outermost first; ``None``: not told."""
        return None


class OwnOptions(BackboneOptions):
    """Options of a user's own backbone, which its class is given as they are."""

    model_config = ConfigDict(extra="allow")


# --- U-ViT -------------------------------------------------------------------------------------


class UViT(BackboneOptions):
    """U-ViT (Bao et al. 2023), names as in the official constructor."""

    has_dropout = False

    patch_size: int = Field(2, ge=1, description="Side of a patch, in pixels.")
    embed_dim: int = Field(512, ge=1, description="Width of the tokens.")
    depth: int = Field(
        12,
        ge=2,
        le=1000,
        multiple_of=2,
        description="In- and out-blocks together; one mid block is added.",
    )
    num_heads: int = Field(8, ge=1, description="Attention heads; must divide embed_dim.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of the MLP over embed_dim.")
    qkv_bias: bool = Field(False, description="Bias in the query/key/value projection.")
    mlp_time_embed: bool = Field(False, description="Two-layer MLP on the time embedding.")
    conv: bool = Field(True, description="3x3 convolution after the last linear layer.")
    skip: bool = Field(True, description="Long skips; false is the paper's ablation.")
    context_dim: int | None = Field(
        None, ge=1, description="Width of text-encoder tokens (text-to-image); null = none."
    )
    context_tokens: int = Field(77, ge=1, description="Number of text-encoder tokens.")
    null_label: bool = Field(
        True,
        description="Class-conditional networks only: a null label, which guidance needs; "
        "false as in the published ImageNet 64x64 models.",
    )

    def no_null_label(self) -> str | None:
        return None if self.null_label else NO_NULL_LABEL + "null_label: true"

    def problem(
        self,
        *,
        resolution: int | None,
        channels: int | None,
        scaling: SkipScaling,
        outputs: int = 1,
    ) -> str | None:
        if self.embed_dim % self.num_heads:
            return f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}"
        if not self.skip and scaling.method != "none":
            return f"skip is false, so there is no long skip for {scaling} to scale"
        if resolution is None:
            return None
        if resolution % self.patch_size:
            return f"patch_size {self.patch_size} does not divide resolution {resolution}"
        patches = (resolution // self.patch_size) ** 2
        tokens = 2 + patches + (0 if self.context_dim is None else self.context_tokens)
        if scaling.learned and tokens < 16:
            return f"learned scaling needs 16 tokens; {patches} patches are too few"
        return None

    def skip_shapes(self) -> list[tuple[int, int]]:
        return [(1, 0)] * (self.depth // 2 if self.skip else 0)


UVIT: dict[str, dict[str, Any]] = {
    "tiny": {
        "patch_size": 2,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "mlp_time_embed": True,
    },
    "cifar10-S2": {"patch_size": 2, "embed_dim": 512, "depth": 12, "num_heads": 8},
    "celeba64-S4": {"patch_size": 4, "embed_dim": 512, "depth": 12, "num_heads": 8},
    "imagenet64-M4": {
        "patch_size": 4,
        "embed_dim": 768,
        "depth": 16,
        "num_heads": 12,
        "null_label": False,
    },
    "imagenet64-L4": {
        "patch_size": 4,
        "embed_dim": 1024,
        "depth": 20,
        "num_heads": 16,
        "null_label": False,
    },
    "imagenet256-L2": {"patch_size": 2, "embed_dim": 1024, "depth": 20, "num_heads": 16},
    "imagenet256-H2": {
        "patch_size": 2,
        "embed_dim": 1152,
        "depth": 28,
        "num_heads": 16,
        "conv": False,
    },
    "imagenet512-L4": {"patch_size": 4, "embed_dim": 1024, "depth": 20, "num_heads": 16},
    "imagenet512-H4": {
        "patch_size": 4,
        "embed_dim": 1152,
        "depth": 28,
        "num_heads": 16,
        "conv": False,
    },
    "mscoco-S2": {
        "patch_size": 2,
        "embed_dim": 512,
        "depth": 12,
        "num_heads": 8,
        "context_dim": 768,
    },
    "mscoco-S2-deep": {
        "patch_size": 2,
        "embed_dim": 512,
        "depth": 16,
        "num_heads": 8,
        "context_dim": 768,
    },
}

# --- U-DiT -------------------------------------------------------------------------------------


Count = Annotated[int, Field(ge=1, le=1000)]
Depth = Annotated[int, Field(ge=0, le=1000)]


class UDiT(BackboneOptions):
    """U-DiT (Tian et al. 2024), names as in the official constructor."""

    has_dropout = False
    drops_labels = "U-DiT drops labels itself, with its option class_dropout_prob"

    down_factor: Count | tuple[Count, Count, Count, Count, Count] = Field(
        2, description="Token downsampling of every attention, or of each of the five levels."
    )
    hidden_size: int = Field(
        96, ge=2, multiple_of=2, description="Width of level 1; doubled on each level."
    )
    depth: tuple[Count, Depth, Count, Depth, Depth] = Field(
        (2, 5, 8, 5, 2), description="Blocks: encoder 1, encoder 2, latent, decoder 2, decoder 1."
    )
    num_heads: int = Field(4, ge=1, description="Attention heads, the same on every level.")
    mlp_ratio: float = Field(2.0, gt=0, description="Hidden width of the FFN over the width.")
    class_dropout_prob: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Class-conditional networks only: chance that each label embedder sees the "
        "null label in training; 0 = there is no null label.",
    )
    rep: bool = Field(True, description="Re-parametrised FFN (three parallel convolutions).")
    ffn_type: Literal["rep", "basic"] = Field(
        "rep", description="Feed-forward network with (rep) or without depth-wise convolutions."
    )
    attn_type: Literal["v1", "v2"] | None = Field(
        "v2", description="Cosine attention (v2); v1 or null = ordinary scaled dot product."
    )
    posemb_type: Literal["rope2d"] | None = Field("rope2d", description="Position embedding.")
    downsampler: str = Field(
        "dwconv5", pattern=r"^dwconv[13579]$", description="Depth-wise convolution; digit = kernel."
    )
    down_shortcut: bool = Field(True, description="Add the input to the downsampler's output.")

    def no_null_label(self) -> str | None:
        return None if self.class_dropout_prob else NO_NULL_LABEL + "class_dropout_prob above 0"

    def problem(
        self,
        *,
        resolution: int | None,
        channels: int | None,
        scaling: SkipScaling,
        outputs: int = 1,
    ) -> str | None:
        head, rest = divmod(self.hidden_size, self.num_heads)
        if rest:
            return f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
        if self.posemb_type == "rope2d" and head % 4:
            return f"rope2d needs heads whose width is a multiple of 4, not {head}"
        if resolution is None:
            return None
        same = isinstance(self.down_factor, int)
        factors = (self.down_factor,) * 5 if same else self.down_factor
        for level, factor in enumerate(factors):
            step = 2 ** (2 - abs(2 - level)) * factor
            if resolution % step:
                return (
                    f"resolution {resolution} must be a multiple of {step}: two halvings of the "
                    f"grid and down_factor {factor} on level {level + 1} of 5"
                )
        if scaling.learned and (resolution // 2) ** 2 < 16:
            return "learned scaling needs 16 tokens on the inner long skip: resolution 8 or more"
        return None

    def skip_shapes(self) -> list[tuple[int, int]]:
        return [(4, 0), (1, 1)]


UDIT: dict[str, dict[str, Any]] = {
    # Small enough for 8x8 images and one CPU core: plain feed-forward networks, and all four
    # tokens of the 2x2 latent grid in one attention.
    "tiny": {
        "down_factor": (2, 2, 1, 2, 2),
        "hidden_size": 12,
        "depth": (1, 0, 1, 1, 0),
        "num_heads": 1,
        "ffn_type": "basic",
        "downsampler": "dwconv3",
    },
    # Ours: pixels of 32x32, about the size of U-ViT's CIFAR-10 network.
    "cifar10": {"hidden_size": 96, "depth": (2, 4, 6, 4, 2), "num_heads": 4},
    "S": {"hidden_size": 96, "num_heads": 4},
    "B": {"hidden_size": 192, "num_heads": 8},
    "L": {"hidden_size": 384, "num_heads": 16},
}

# --- Patched U-Net -----------------------------------------------------------------------------


class PatchUNet(BackboneOptions):
    """Patched U-Net (Luhman & Luhman 2022), names as in the official constructor.

    Two things follow the published command line instead: ``attention_resolutions`` are sides of
    the patched grid, and what the constructor has no default for has the command line's.
    """

    patch_size: int = Field(4, ge=1, description="Space-to-depth factor before the network.")
    model_channels: int = Field(128, ge=32, description="Base width.")
    channel_mult: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1, 2, 4, 8),
        min_length=1,
        max_length=12,
        description="Width over model_channels per level, finest first; must not decrease.",
    )
    num_res_blocks: int = Field(2, ge=1, le=1000, description="Residual blocks per level.")
    attention_resolutions: tuple[Count, ...] = Field(
        (16, 8), description="Resolutions of the patched grid that have attention."
    )
    num_heads: int = Field(1, ge=1, description="Attention heads, unless num_head_channels.")
    num_head_channels: int = Field(-1, ge=-1, description="Width of a head; -1 = use num_heads.")
    num_heads_upsample: int = Field(
        -1, ge=-1, description="Heads in the decoder; -1 = as num_heads."
    )
    resblock_updown: bool = Field(False, description="Residual blocks for down- and upsampling.")
    use_new_attention_order: bool = Field(False, description="qkv packed (3, heads, width).")
    conv_resample: bool = Field(True, description="Learned down- and upsampling.")
    classifier_free: bool = Field(
        True, description="Null label of a conditional network, which guidance needs."
    )

    def no_null_label(self) -> str | None:
        return None if self.classifier_free else NO_NULL_LABEL + "classifier_free: true"

    def problem(
        self,
        *,
        resolution: int | None,
        channels: int | None,
        scaling: SkipScaling,
        outputs: int = 1,
    ) -> str | None:
        widths = [int(mult * self.model_channels) for mult in self.channel_mult]
        if any(width < 32 or width % 32 for width in widths):
            return f"every width (channel_mult x model_channels) must be a multiple of 32: {widths}"
        if any(coarse < fine for fine, coarse in pairwise(widths)):
            return f"channel_mult must not decrease; here the widths are {widths}"
        if outputs == 2 and widths[0] != self.model_channels:
            return f"a learned variance needs channel_mult[0] = 1, not {self.channel_mult[0]:g}"
        if not (self.conv_resample or self.resblock_updown) and len(set(widths)) > 1:
            return f"conv_resample false needs the same width on every level, not {widths}"
        upward = self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample
        for key, heads in (("num_heads", self.num_heads), ("num_heads_upsample", upward)):
            for width in widths if self.num_head_channels == -1 else ():
                if heads < 1 or width % heads:
                    return f"{key} {heads} does not divide the width {width}"
        for width in widths if self.num_head_channels != -1 else ():
            if self.num_head_channels < 1 or width % self.num_head_channels:
                return f"num_head_channels {self.num_head_channels} does not divide {width}"
        step = self.patch_size * 2 ** (len(widths) - 1)
        if resolution is not None and resolution % step:
            return (
                f"patch_size {self.patch_size} and {len(widths)} levels (channel_mult) need a "
                f"resolution that is a multiple of {step}; here it is {resolution}"
            )
        return None

    def skip_shapes(self) -> list[tuple[int, int]]:
        widths = [int(mult * self.model_channels) for mult in self.channel_mult]
        return [
            (width, level)
            for level, width in enumerate(widths)
            for _ in range(self.num_res_blocks + 1)
        ]


_PUBLISHED_PATCH: dict[str, Any] = {
    "patch_size": 4,
    "model_channels": 256,
    "num_res_blocks": 2,
    "attention_resolutions": (16, 8),
    "num_head_channels": 64,
    "use_new_attention_order": True,
}

PATCH: dict[str, dict[str, Any]] = {
    "tiny": {
        "patch_size": 2,
        "model_channels": 32,
        "channel_mult": (1, 1),
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
    },
    # Ours: the published shape of lsun_p4 for a 16x16 grid.
    "cifar10": {
        **_PUBLISHED_PATCH,
        "patch_size": 2,
        "model_channels": 128,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 3,
    },
    "lsun_p2": {
        **_PUBLISHED_PATCH,
        "patch_size": 2,
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 4, 4),
    },
    "lsun_p4": {**_PUBLISHED_PATCH, "channel_mult": (1, 1, 2, 2)},
    "lsun_p8": {
        **_PUBLISHED_PATCH,
        "patch_size": 8,
        "channel_mult": (1, 1.5, 2),
        "num_res_blocks": 3,
    },
    "imagenet256_p4": {**_PUBLISHED_PATCH, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 3},
    "ffhq1024_p4": {
        **_PUBLISHED_PATCH,
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 4, 4, 4),
    },
}

# --- SongUNet: DDPM++ and NCSN++ ---------------------------------------------------------------


class SongUNet(BackboneOptions):
    """SongUNet (Song et al. 2021 in the form of Karras et al. 2022)."""

    augmentable = True

    model_channels: int = Field(128, ge=1, description="Base width.")
    channel_mult: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (2, 2, 2),
        min_length=1,
        max_length=12,
        description="Width over model_channels per resolution, finest first.",
    )
    channel_mult_emb: int = Field(4, ge=1, description="Width factor of the embedding vector.")
    num_blocks: int = Field(4, ge=1, le=1000, description="Residual blocks per resolution.")
    attn_resolutions: tuple[Count, ...] = Field((16,), description="Resolutions with attention.")
    embedding_type: Literal["positional", "fourier"] = Field(
        "positional", description="Features of the noise level."
    )
    channel_mult_noise: int = Field(1, ge=1, description="Width factor of the noise features.")
    encoder_type: Literal["standard", "skip", "residual"] = Field(
        "standard", description="How the downsampled input enters the encoder."
    )
    decoder_type: Literal["standard", "skip"] = Field(
        "standard", description="Image made at the finest resolution, or summed over all (skip)."
    )
    resample_filter: tuple[int, ...] = Field(
        (1, 1), min_length=1, description="Resampling filter taps; an even number of them."
    )

    def problem(
        self,
        *,
        resolution: int | None,
        channels: int | None,
        scaling: SkipScaling,
        outputs: int = 1,
    ) -> str | None:
        if self.model_channels * self.channel_mult_noise % 2:
            return "model_channels x channel_mult_noise must be even"
        levels = len(self.channel_mult)
        if levels > 1 and len(self.resample_filter) % 2:
            return "resample_filter needs an even number of taps"
        if levels > 1 and sum(self.resample_filter) == 0:
            return "resample_filter: taps that add up to 0 cannot be normalised"
        shapes = self.skip_shapes()
        width = self.model_channels * self.channel_mult[-1]
        widths = {width, *(width for width, _ in shapes)}
        for skip, level in reversed(shapes):
            widths |= {width + skip}
            width = self.model_channels * self.channel_mult[level]
        for width in sorted(widths):
            groups = min(32, width // 4)
            if groups < 1 or width % groups:
                return (
                    f"a layer of {width} channels cannot be normalised in groups of 4 (or in 32 "
                    "groups); choose model_channels so that every width is a multiple of 32"
                )
        if scaling.learned and min(width for width, _ in shapes) < 16:
            return "learned scaling needs 16 channels in every long skip"
        if resolution is not None and resolution % 2 ** (levels - 1):
            return (
                f"{levels} levels (channel_mult) halve the resolution {levels - 1} times, but "
                f"{resolution} is not a multiple of {2 ** (levels - 1)}"
            )
        return None

    def skip_shapes(self) -> list[tuple[int, int]]:
        shapes, width = [], self.model_channels
        for level, mult in enumerate(self.channel_mult):
            shapes.append((width, level))
            width = self.model_channels * mult
            shapes += [(width, level)] * self.num_blocks
        return shapes


class DDPMpp(SongUNet):
    """SongUNet as DDPM++."""


class NCSNpp(SongUNet):
    """SongUNet as NCSN++."""

    embedding_type: Literal["positional", "fourier"] = "fourier"
    channel_mult_noise: int = 2
    encoder_type: Literal["standard", "skip", "residual"] = "residual"
    resample_filter: tuple[int, ...] = (1, 3, 3, 1)


DDPMPP: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_channels": 16,
        "channel_mult": (1, 1),
        "channel_mult_emb": 8,
        "num_blocks": 1,
        "attn_resolutions": (4,),
    },
    "cifar10": {},
    "64px": {"channel_mult": (1, 2, 2, 2)},
}
NCSNPP: dict[str, dict[str, Any]] = DDPMPP


@dataclass(frozen=True)
class Family:
    """Where a backbone lives and which options it takes.

    ``network`` is "module:Class"; ``presets`` are options by name.
    """

    network: str
    options: type[BackboneOptions]
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return self.network.partition(":")[0]

    @property
    def own(self) -> Path | None:
        """The file of a user's own backbone, ``None`` of those that come with the package."""
        if self.options is not OwnOptions:
            return None
        found = find_spec(self.module)
        return Path(found.origin) if found and found.origin else None


FAMILIES: dict[str, Family] = {
    "uvit": Family("study.backbones.uvit:UViT", UViT, UVIT),
    "udit": Family("study.backbones.udit:UDiT", UDiT, UDIT),
    "patch_unet": Family("study.backbones.patch_unet:PatchUNet", PatchUNet, PATCH),
    "ddpmpp": Family("study.backbones.songunet:SongUNet", DDPMpp, DDPMPP),
    "ncsnpp": Family("study.backbones.songunet:SongUNet", NCSNpp, NCSNPP),
}


def family(name: str) -> Family:
    """The family called ``name``, or a user's own: ``package.module:Class``.

    Raises ``UserError`` naming the known ones, or the module that is not there. Nothing of a user's
    own is run but the packages that its module lies in.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        known = ", ".join(FAMILIES)
        raise UserError(f"{name!r} is unknown; allowed: {known}, or package.module:Class")
    one = Family(name, OwnOptions)
    try:
        there = one.own is not None
    except Exception:  # of the packages that it lies in
        there = False
    if not there:
        raise UserError(
            f"there is no module {one.module}; put {one.module.replace('.', '/')}.py beside the "
            "Snakefile"
        )
    return one
