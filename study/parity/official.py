"""Our networks from the arguments of the official constructors."""

from typing import Any

from study.backbones.patch_unet import PatchUNet
from study.backbones.songunet import SongUNet
from study.backbones.udit import UDiT
from study.backbones.uvit import UViT
from study.importing.songunet import OFFICIAL
from study.spec.scalings import UNSCALED, SkipScaling


def uvit(**constructor: Any) -> UViT:
    """Build from the arguments of the official classes ``UViT`` (of U-ViT and of ScaleLong).

    ``clip_dim`` or ``num_clip_token`` selects the text-to-image class. ScaleLong's
    ``scalelong`` is 0 (no scaling), 1 (1/sqrt 2), 2 (kappa^i), 3 (one gate) or 4 (one gate
    per skip). ``num_classes`` is the number of rows of the label table: 1001 in the guided
    ImageNet models, whose last row is the null label, and 1000 in the unguided ones, which
    have none. ``qk_scale`` has no effect (fused attention ignores it officially),
    ``use_checkpoint`` none on numbers, and ``norm_layer`` must be LayerNorm.
    """
    given = dict(constructor)
    text = "clip_dim" in given or "num_clip_token" in given
    labels = 0 if text else max(given.pop("num_classes", -1), 0)
    norm = given.pop("norm_layer", "LayerNorm")
    if getattr(norm, "__name__", str(norm)).rpartition(".")[2] != "LayerNorm":
        raise ValueError(f"norm_layer {norm!r} is not available; it must be LayerNorm")
    given.pop("qk_scale", None)
    code, kappa = given.pop("scalelong", 0), given.pop("kappa", 0.5)
    methods = {0: "none", 1: "inv_sqrt2", 2: "cs", 3: "ls", 4: "ls_unshared"}
    if code not in methods:
        raise ValueError(f"scalelong {code!r} is unknown; allowed: 0, 1, 2, 3, 4")
    skip = given.pop("skip", True)
    if not skip and code in (3, 4):
        raise ValueError("learned skip scaling needs long skips, but skip is false")
    channels = given.pop("in_chans", 3)
    network = UViT(
        resolution=given.pop("img_size", 224),
        channels=channels,
        out_channels=channels,
        patch_size=given.pop("patch_size", 16),
        embed_dim=given.pop("embed_dim", 768),
        depth=given.pop("depth", 12),
        num_heads=given.pop("num_heads", 12),
        mlp_ratio=given.pop("mlp_ratio", 4.0),
        qkv_bias=given.pop("qkv_bias", False),
        mlp_time_embed=given.pop("mlp_time_embed", False),
        conv=given.pop("conv", True),
        skip=skip,
        labels=labels,
        num_classes=labels,
        context_dim=given.pop("clip_dim", 768) if text else None,
        context_tokens=given.pop("num_clip_token", 77) if text else 77,
        scaling=SkipScaling(method=methods[code], **({"kappa": kappa} if code == 2 else {})),
        checkpointing=given.pop("use_checkpoint", False),
    )
    if given:
        raise ValueError(f"unknown U-ViT arguments: {', '.join(sorted(given))}")
    return network


def udit(**constructor: Any) -> UDiT:
    """Build from the arguments of the official class ``U_DiT``, with its defaults.

    ``input_size`` only checks that the grid can be halved and split: the network runs on any
    grid that can. ``learn_sigma`` doubles the output channels. Raises ``ValueError`` for
    unknown arguments.
    """
    known = {
        "input_size": 32,
        "down_factor": 2,
        "in_channels": 4,
        "hidden_size": 1152,
        "depth": (2, 5, 8, 5, 2),
        "num_heads": 16,
        "mlp_ratio": 4,
        "class_dropout_prob": 0.1,
        "num_classes": 1000,
        "learn_sigma": True,
        "rep": 1,
        "ffn_type": "rep",
        "attn_type": None,
        "posemb_type": None,
        "downsampler": None,
        "down_shortcut": False,
    }
    unknown = sorted(set(constructor) - set(known))
    if unknown:
        raise ValueError(f"unknown U-DiT arguments: {', '.join(unknown)}")
    given = {**known, **constructor}
    if given["num_classes"] < 1:
        raise ValueError("the official U-DiT needs num_classes of at least 1")
    channels = given.pop("in_channels")
    return UDiT(
        resolution=given.pop("input_size"),
        channels=channels,
        out_channels=channels * (2 if given.pop("learn_sigma") else 1),
        scaling=UNSCALED,
        **given,
    )


def songunet(**constructor: Any) -> SongUNet:
    """Build from the official constructor's arguments, with its defaults (dropout 0.1).

    All of them have an effect. Raises ``TypeError`` for an unknown or a missing one.
    """
    known = {"img_resolution", "in_channels", "out_channels", *OFFICIAL}
    unknown = sorted(set(constructor) - known)
    if unknown:
        raise TypeError(f"SongUNet has no argument {', '.join(unknown)}")
    return SongUNet(**(OFFICIAL | constructor))


PATCH_UNET: dict[str, Any] = {
    "patch_size": 4,
    "classifier_free": True,
    "dropout": 0.0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "num_classes": None,
    "use_checkpoint": False,
    "use_fp16": False,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
"""Defaults of the official UNetModel; its first six arguments have none."""

PATCH_UNET_NEEDS = {
    "image_size",
    "in_channels",
    "model_channels",
    "out_channels",
    "num_res_blocks",
    "attention_resolutions",
}


def patch_unet(**constructor: Any) -> PatchUNet:
    """Build from the official constructor's arguments, with its defaults.

    ``attention_resolutions`` are downsampling rates here. ``use_fp16`` is accepted without
    effect (half precision is autocast's business). ``use_scale_shift_norm`` must be true and
    ``dims`` 2: the official network cannot run otherwise (its default for the former is
    false). Raises ``TypeError`` for an unknown or a missing argument.
    """
    unknown = sorted(set(constructor) - PATCH_UNET_NEEDS - set(PATCH_UNET))
    missing = sorted(PATCH_UNET_NEEDS - set(constructor))
    if unknown:
        raise TypeError(f"the Patched U-Net has no argument {', '.join(unknown)}")
    if missing:
        raise TypeError(f"the Patched U-Net needs the argument {', '.join(missing)}")
    given = PATCH_UNET | constructor
    if not given.pop("use_scale_shift_norm"):
        raise ValueError("use_scale_shift_norm must be true: the network has no other form")
    if given.pop("dims") != 2:
        raise ValueError("dims must be 2: images only")
    given.pop("use_fp16")
    return PatchUNet(
        attention_rates=given.pop("attention_resolutions"),
        checkpointing=given.pop("use_checkpoint"),
        num_classes=given.pop("num_classes") or 0,
        **given,
    )
