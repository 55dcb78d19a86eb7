"""U-DiT: ``<step>.pt`` with the keys ``model``, ``ema``, ``opt`` and ``args``."""

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
)
from study.spec.backbones import UDIT, UDiT

LEVELS = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
LATENT = 8
"""Pixels per side of a latent, in the autoencoder of the published models."""


def matches(state: State) -> bool:
    """Whether this looks like a U-DiT."""
    return "x_embedder.proj.weight" in state and "latent.0.attn1.to_qkv.weight" in state


def _feed_forward(settings: Settings, state: State) -> tuple[str, bool, int]:
    """Kind of feed-forward network, whether it is re-parametrised, and its hidden width."""
    at = "encoder_level_1.0.mlp1."
    if f"{at}fc1.weight" in state:
        return "basic", bool(settings.take("rep", True, quiet=True)), rows(state, f"{at}fc1.weight")
    if f"{at}project_in.1.weight" in state:
        return "rep", settings.read("rep", True), rows(state, f"{at}project_in.1.weight")
    return "rep", settings.read("rep", False), rows(state, f"{at}project_in.weight")


def _resolution(settings: Settings, images: Images | None, arguments: dict[str, Any]) -> int:
    if images is not None:
        return settings.take("input_size", images.resolution, quiet=True)
    if isinstance(arguments.get("image_size"), int):
        return settings.take("input_size", arguments["image_size"] // LATENT, quiet=True)
    return settings.take("input_size", 32)


def describe(
    state: State, given: dict[str, Any], images: Images | None, facts: dict[str, Any]
) -> Description:
    """The network of a state dictionary. ``given`` may use the official constructor's names."""
    # Official files say 1 for true.
    given = {k: bool(v) if k in ("rep", "down_shortcut") else v for k, v in given.items()}
    settings = Settings(given)
    arguments = facts.get("arguments") or {}
    width = rows(state, "x_embedder.proj.weight")
    channels = settings.read("in_channels", rows(state, "x_embedder.proj.weight", 1))
    outputs = rows(state, "final_layer.out_proj.weight")
    if outputs not in (channels, 2 * channels):
        raise UserError(f"the file's network makes {outputs} channels of {channels}")
    kind, rep, hidden = _feed_forward(settings, state)
    known = {entry["hidden_size"]: entry["num_heads"] for entry in UDIT.values()}
    at = "encoder_level_1.0.attn1."
    cosine = f"{at}logit_scale" in state
    heads = (
        settings.read("num_heads", rows(state, f"{at}logit_scale"))
        if cosine
        else settings.take("num_heads", known.get(width, 4))
    )
    attention = settings.read("attn_type", "v2") if cosine else settings.take("attn_type", None)
    kernel = rows(state, f"{at}downsampler.layer.weight", 2)
    labels = 0
    if "y_embedder_1.embedding_table.weight" in state:
        labels = rows(state, "y_embedder_1.embedding_table.weight")
    # The released factories ignore the command line's number of classes, which "args" holds.
    number, null = classes(settings, labels, images, settings.given.pop("num_classes", None))
    options = {
        "down_factor": settings.take("down_factor", 2),
        "hidden_size": settings.read("hidden_size", width),
        "depth": settings.read("depth", [count(state, f"{level}.") for level in LEVELS]),
        "num_heads": heads,
        "mlp_ratio": settings.read("mlp_ratio", ratio(hidden, width)),
        "class_dropout_prob": settings.take("class_dropout_prob", 0.1 if null else 0.0, quiet=True),
        "rep": rep,
        "ffn_type": settings.read("ffn_type", kind),
        "attn_type": attention,
        "posemb_type": settings.take("posemb_type", "rope2d"),
        "downsampler": settings.read("downsampler", f"dwconv{kernel}"),
        "down_shortcut": settings.take("down_shortcut", True),
    }
    learned = settings.read("learn_sigma", outputs == 2 * channels)
    resolution = _resolution(settings, images, arguments)
    allowed = {*UDiT.model_fields, "input_size", "in_channels", "num_classes", "learn_sigma"}
    settings.done(allowed)
    return Description(
        family="udit",
        options=options,
        resolution=resolution,
        channels=channels,
        num_classes=number,
        formulation={"kind": "ddpm", "variance": "learned" if learned else "fixed_large"},
        assumed=settings.assumed,
        official=options
        | {
            "input_size": resolution,
            "in_channels": channels,
            "num_classes": number,
            "learn_sigma": learned,
        },
    )
