"""U-ViT and ScaleLong: ``nnet.pth`` and ``nnet_ema.pth``, plain state dictionaries.

Their shapes tell all of the network but the number of heads and the constant skip scaling.
"""

from typing import Any

from study.files import UserError
from study.importing.settings import (
    Description,
    Images,
    Settings,
    State,
    classes,
    count,
    ratio,
    rows,
    whole_root,
)
from study.spec.backbones import UVIT, UViT

SCALELONG = {0: "none", 1: "inv_sqrt2", 2: "cs", 3: "ls", 4: "ls_unshared"}


def matches(state: State) -> bool:
    """Whether this looks like a U-ViT."""
    return "decoder_pred.weight" in state and "in_blocks.0.attn.qkv.weight" in state


def _scaling(settings: Settings, state: State, skip: bool) -> dict[str, Any]:
    """Skip scaling: learned ones have weights, constant ones only the constructor knows."""
    code, kappa = settings.given.pop("scalelong", None), settings.given.pop("kappa", 0.5)
    learned = next(
        (
            method
            for key, method in (("se.layer1.weight", "ls"), ("se.0.layer1.weight", "ls_unshared"))
            if key in state
        ),
        None,
    )
    if code is None:
        if learned is None and skip:
            settings.assumed["scalelong"] = 0
        return {"method": learned or "none"}
    method = SCALELONG.get(code)
    if method is None:
        raise UserError(f"--options: scalelong: {code!r} is unknown; allowed: 0, 1, 2, 3, 4")
    if (learned or "") != (method if method.startswith("ls") else ""):
        has = f"the gates of {learned}" if learned else "no gates"
        raise UserError(f"scalelong: {code} ({method}) was given, but the file has {has}")
    return {"method": method, "kappa": kappa} if method == "cs" else {"method": method}


def describe(
    state: State, given: dict[str, Any], images: Images | None, facts: dict[str, Any]
) -> Description:
    """The network of a state dictionary. ``given`` may use the official constructor's names."""
    settings = Settings(given)
    settings.ignore("name", "qk_scale", "norm_layer", "use_checkpoint", "context_tokens")
    if "context_embed.weight" in state:
        raise UserError(
            "a text-to-image U-ViT needs text features, which `study generate` does not have"
        )
    width = rows(state, "pos_embed", 2)
    patch = rows(state, "patch_embed.proj.weight", 2)
    channels = settings.read("in_chans", rows(state, "patch_embed.proj.weight", 1))
    labels = rows(state, "label_emb.weight") if "label_emb.weight" in state else 0
    if settings.given.get("num_classes") == -1:
        settings.given["num_classes"] = 0
    settings.read("num_classes", labels)
    side = whole_root(rows(state, "pos_embed", 1) - 1 - bool(labels), "tokens of the image")
    known = {entry["embed_dim"]: entry["num_heads"] for entry in UVIT.values()}
    options = {
        "patch_size": settings.read("patch_size", patch),
        "embed_dim": settings.read("embed_dim", width),
        "depth": settings.read("depth", 2 * count(state, "in_blocks.")),
        "num_heads": settings.take("num_heads", known.get(width, max(1, width // 64))),
        "mlp_ratio": settings.read(
            "mlp_ratio", ratio(rows(state, "in_blocks.0.mlp.fc1.weight"), width)
        ),
        "qkv_bias": settings.read("qkv_bias", "in_blocks.0.attn.qkv.bias" in state),
        "mlp_time_embed": settings.read("mlp_time_embed", "time_embed.0.weight" in state),
        "conv": settings.read("conv", "final_layer.weight" in state),
        "skip": settings.read("skip", "out_blocks.0.skip_linear.weight" in state),
    }
    resolution = settings.read("img_size", side * patch)
    number, null = classes(settings, labels, images)
    options["null_label"] = settings.read("null_label", null) if labels else True
    scaling = _scaling(settings, state, options["skip"])
    settings.done({*UViT.model_fields, "img_size", "in_chans", "scalelong", "kappa"})
    official = options | {"img_size": resolution, "in_chans": channels, "num_classes": labels or -1}
    del official["null_label"]
    # The released models without a final convolution are the discrete-time ones.
    schedule = {} if options["conv"] else {"schedule": "discrete"}
    return Description(
        family="uvit",
        options=options,
        resolution=resolution,
        channels=channels,
        num_classes=number,
        scaling=scaling,
        formulation={"kind": "vpsde", **schedule},
        assumed=settings.assumed,
        official=official,
    )
