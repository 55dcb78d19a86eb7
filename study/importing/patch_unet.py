"""Patch Diffusion: ``model<step>.pt`` and ``ema_<rate>_<step>.pt``, plain state dictionaries.

The form is guided-diffusion's; the network is the patched U-Net only.
"""

import re
from typing import Any

from study.files import UserError
from study.importing.settings import (
    Description,
    Images,
    Settings,
    State,
    classes,
    numbers,
    ratio,
    rows,
    whole_root,
)
from study.spec.backbones import PatchUNet


def matches(state: State) -> bool:
    """Whether this looks like a U-Net of guided-diffusion's form."""
    return "time_embed.0.weight" in state and "input_blocks.0.0.weight" in state


def _resampling(state: State) -> tuple[int, bool, bool]:
    """Levels, whether residual blocks resample, and whether convolutions do."""
    convolutions = {k for k in state if re.fullmatch(r"output_blocks\.\d+\.[12]\.conv\.weight", k)}
    residuals = {
        k for k in state if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", k)
    }
    stages = numbers(state, "input_blocks.")
    silent = max(stages) + 1 - len(stages)  # stages without weights: averaging
    if silent >= len(stages):
        raise UserError("the file lacks most of its input_blocks; it is no whole network")
    return 1 + len(convolutions or residuals) + silent, bool(residuals), not silent


def describe(
    state: State, given: dict[str, Any], images: Images | None, facts: dict[str, Any]
) -> Description:
    """The network of a state dictionary. ``given`` may use the published command line's names."""
    settings = Settings(given)
    settings.ignore("dims", "use_checkpoint", "use_fp16", "use_scale_shift_norm", "dropout")
    if "input_blocks.1.0.emb_layers.1.weight" in state:
        raise UserError(
            "this is guided-diffusion's own U-Net (ADM), which is none of this project's "
            "backbones; of this form only Patch Diffusion's networks are"
        )
    base = rows(state, "time_embed.0.weight", 1)
    colours = images.channels if images is not None else None
    channels = settings.take("in_channels", colours or 3, quiet=colours is not None)
    inputs = rows(state, "input_blocks.0.0.weight", 1)
    if inputs % channels:
        raise UserError(f"patches of {inputs} numbers do not consist of {channels} channels")
    patch = settings.read("patch_size", whole_root(inputs // channels, "pixels of a patch"))
    levels, by_blocks, by_convolutions = _resampling(state)
    stages = max(numbers(state, "input_blocks.")) + 1
    blocks, rest = divmod(stages - levels, levels)
    if rest or blocks < 1:
        raise UserError(f"the file's encoder cannot be divided into {levels} equal levels")
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [rows(state, f"input_blocks.{first}.0.in_layers.2.weight") for first in firsts]
    known = images.resolution if images is not None else None
    resolution = settings.given.pop("image_size", known)
    if not isinstance(resolution, int):
        raise UserError(
            "the file does not say for which images the network is; "
            "add --data, or --options '{\"image_size\": 256}'"
        )
    grid = resolution // patch
    attends = [
        grid >> level
        for level, first in enumerate(firsts)
        if f"input_blocks.{first}.1.qkv.weight" in state
    ]
    # Published sides beyond the grid have no effect and may be given.
    if "attention_resolutions" in settings.given:
        sides = [grid >> level for level in range(levels)]
        told = settings.given.pop("attention_resolutions")
        settings.given["attention_resolutions"] = [s for s in sides if s in told]
    labels = rows(state, "label_embs.weight") if "label_embs.weight" in state else 0
    number, null = classes(settings, labels, images, settings.given.pop("num_classes", None))
    heads = settings.take("num_heads", 1, quiet=True)
    told_heads = "num_heads" in given and "num_head_channels" not in given
    options = {
        "patch_size": patch,
        "model_channels": settings.read("model_channels", base),
        "channel_mult": settings.read("channel_mult", [ratio(width, base) for width in widths]),
        "num_res_blocks": settings.read("num_res_blocks", blocks),
        "attention_resolutions": settings.read("attention_resolutions", attends),
        "num_heads": heads,
        "num_head_channels": settings.take(
            "num_head_channels", -1 if told_heads else 64, quiet=told_heads
        ),
        "num_heads_upsample": settings.take("num_heads_upsample", -1, quiet=True),
        "resblock_updown": settings.read("resblock_updown", by_blocks),
        "use_new_attention_order": settings.take("use_new_attention_order", True),
        "conv_resample": settings.take("conv_resample", by_convolutions, quiet=True),
        "classifier_free": settings.take("classifier_free", null or not labels, quiet=True),
    }
    learned = "variance_output_model.0.weight" in state
    settings.read("learn_sigma", learned)
    settings.read("out_channels", channels * (2 if learned else 1))
    allowed = {*PatchUNet.model_fields, "image_size", "in_channels", "num_classes", "learn_sigma"}
    settings.done(allowed)
    return Description(
        family="patch_unet",
        options=options,
        resolution=resolution,
        channels=channels,
        num_classes=number,
        formulation={
            "kind": "ddpm",
            "prediction": "x0",
            "weighting": "sqrt_snr",
            "variance": "learned" if learned else "fixed_large",
            "variance_values": "unit",
        },
        assumed=settings.assumed,
        official=options
        | {
            "image_size": resolution,
            "in_channels": channels,
            "out_channels": channels * (2 if learned else 1),
            "num_classes": number or None,
        },
    )
