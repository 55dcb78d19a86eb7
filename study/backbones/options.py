"""Options and presets of every backbone family. No torch here: plans and workflows read it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Options of a backbone; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def problem(
        self, *, resolution: int | None, channels: int | None, scaling: str
    ) -> str | None:
        """Why these options cannot be on such images with such a skip scaling, if so.

        Cheap arithmetic only; ``None`` means that nothing is wrong as far as can be told without
        building the network. ``resolution`` or ``channels`` is ``None`` where not yet known.
        """
        return None


# --- U-ViT -------------------------------------------------------------------------------------


class UViT(Options):
    """U-ViT (Bao et al. 2023), names as in the official constructor."""

    patch_size: int = Field(2, ge=1, description="Side of a patch, in pixels.")
    embed_dim: int = Field(512, ge=1, description="Width of the tokens.")
    depth: int = Field(
        12, ge=2, multiple_of=2, description="In- and out-blocks together; one mid block is added."
    )
    num_heads: int = Field(8, ge=1, description="Attention heads; must divide embed_dim.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of the MLP over embed_dim.")
    qkv_bias: bool = Field(False, description="Bias in the query/key/value projection.")
    mlp_time_embed: bool = Field(False, description="Two-layer MLP on the time embedding.")
    conv: bool = Field(True, description="3x3 convolution after the last linear layer.")
    skip: bool = Field(True, description="Long skips; false is the paper's ablation.")
    context_dim: int | None = Field(
        None, description="Width of text-encoder tokens (text-to-image); null = none."
    )
    context_tokens: int = Field(77, ge=1, description="Number of text-encoder tokens.")
    null_label: bool = Field(
        True,
        description="Class-conditional networks only: a null label, which guidance needs; "
        "false as in the published ImageNet 64x64 models.",
    )

    def problem(
        self, *, resolution: int | None, channels: int | None, scaling: str
    ) -> str | None:
        if self.embed_dim % self.num_heads:
            return f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}"
        if not self.skip and scaling != "none":
            return f"skip is false, so there is no long skip for {scaling} to scale"
        if resolution is None:
            return None
        if resolution % self.patch_size:
            return f"patch_size {self.patch_size} does not divide resolution {resolution}"
        patches = (resolution // self.patch_size) ** 2
        tokens = 2 + patches + (0 if self.context_dim is None else self.context_tokens)
        if scaling in ("ls", "ls_unshared") and tokens < 16:
            return f"learned scaling needs 16 tokens; {patches} patches are too few"
        return None


UVIT: dict[str, dict[str, Any]] = {
    "tiny": {"patch_size": 2, "embed_dim": 48, "depth": 6, "num_heads": 3, "mlp_ratio": 2.0},
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


class UDiT(Options):
    """U-DiT (Tian et al. 2024), names as in the official constructor."""

    down_factor: int = Field(2, ge=1, description="Token downsampling of every attention.")
    hidden_size: int = Field(96, ge=1, description="Width of level 1; doubled on each level.")
    depth: tuple[int, int, int, int, int] = Field(
        (2, 5, 8, 5, 2), description="Blocks: encoder 1, encoder 2, latent, decoder 2, decoder 1."
    )
    num_heads: int = Field(4, ge=1, description="Attention heads, the same on every level.")
    mlp_ratio: float = Field(2.0, gt=0, description="Hidden width of the FFN over the width.")
    rep: bool = Field(True, description="Re-parametrised FFN (three parallel convolutions).")
    ffn_type: Literal["rep", "basic"] = Field("rep", description="Kind of feed-forward network.")
    attn_type: Literal["v2"] | None = Field(
        "v2", description="Cosine attention (v2); null = ordinary scaled dot product."
    )
    posemb_type: Literal["rope2d"] | None = Field("rope2d", description="Position embedding.")
    downsampler: str = Field(
        "dwconv5", pattern=r"^dwconv\d$", description="Depth-wise convolution; digit = kernel."
    )
    down_shortcut: bool = Field(True, description="Add the input to the downsampler's output.")


UDIT: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "depth": (1, 1, 1, 1, 1), "num_heads": 4},
    "S": {"hidden_size": 96, "num_heads": 4},
    "B": {"hidden_size": 192, "num_heads": 8},
    "L": {"hidden_size": 384, "num_heads": 16},
}

# --- Patched U-Net -----------------------------------------------------------------------------


class PatchUNet(Options):
    """Patched U-Net (Luhman & Luhman 2022), names as in the official constructor."""

    patch_size: int = Field(1, ge=1, description="Space-to-depth factor before the network.")
    model_channels: int = Field(128, ge=32, multiple_of=32, description="Base width.")
    channel_mult: tuple[float, ...] = Field((1, 2, 2, 2), description="Width factor per level.")
    num_res_blocks: int = Field(2, ge=1, description="Residual blocks per level.")
    attention_resolutions: tuple[int, ...] = Field(
        (16, 8), description="Resolutions of the patched grid that have attention."
    )
    num_heads: int = Field(1, ge=1, description="Attention heads, unless num_head_channels.")
    num_head_channels: int = Field(-1, description="Width of a head; -1 = use num_heads.")
    num_heads_upsample: int = Field(-1, description="Heads in the decoder; -1 = as num_heads.")
    resblock_updown: bool = Field(False, description="Residual blocks for down- and upsampling.")
    use_new_attention_order: bool = Field(False, description="qkv packed (3, heads, width).")
    conv_resample: bool = Field(True, description="Learned down- and upsampling.")


PATCH: dict[str, dict[str, Any]] = {
    "tiny": {
        "patch_size": 2,
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
    },
}

# --- SongUNet: DDPM++ and NCSN++ ---------------------------------------------------------------


class SongUNet(Options):
    """SongUNet (Song et al. 2021 in the form of Karras et al. 2022)."""

    model_channels: int = Field(128, ge=1, description="Base width.")
    channel_mult: tuple[int, ...] = Field((2, 2, 2), description="Width factor per resolution.")
    channel_mult_emb: int = Field(4, ge=1, description="Width factor of the embedding vector.")
    num_blocks: int = Field(4, ge=1, description="Residual blocks per resolution.")
    attn_resolutions: tuple[int, ...] = Field((16,), description="Resolutions with attention.")
    embedding_type: Literal["positional", "fourier"] = Field("positional")
    channel_mult_noise: int = Field(1, ge=1, description="Width factor of the noise features.")
    encoder_type: Literal["standard", "skip", "residual"] = Field("standard")
    decoder_type: Literal["standard", "skip"] = Field("standard")
    resample_filter: tuple[int, ...] = Field((1, 1), description="Resampling filter taps.")


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
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
    },
    "cifar10": {},
}
NCSNPP: dict[str, dict[str, Any]] = {
    "tiny": DDPMPP["tiny"],
    "cifar10": {},
}
