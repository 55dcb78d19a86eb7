"""EDM and STF: ``network-snapshot-*.pkl``, ``training-state-*.pt`` and STF's ``.pkl`` of both.

They hold the network as an object, whose record of its constructor's arguments says everything.
"""

import math
from typing import Any

from study.bounded import Object
from study.files import UserError
from study.importing.reading import arguments_of, simple
from study.importing.settings import Description, Images, Settings, State
from study.network import AUGMENT_LABELS
from study.spec.backbones import SongUNet

OFFICIAL: dict[str, Any] = {
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 128,
    "channel_mult": (1, 2, 2, 2),
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": (16,),
    "dropout": 0.1,
    "label_dropout": 0.0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": (1, 1),
}
"""Defaults of the official SongUNet; img_resolution, in_channels, out_channels have none."""

FORMULATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "EDMPrecond": ("edm", ("sigma_data", "sigma_min", "sigma_max")),
    "VPPrecond": ("vp", ("beta_d", "beta_min", "M", "epsilon_t")),
    "VEPrecond": ("ve", ("sigma_min", "sigma_max")),
    "iDDPMPrecond": ("iddpm", ("C_1", "C_2", "M")),
}
"""Official preconditioning -> our formulation, and the attributes that are its options."""

AUGMENTATION = 0.12
"""Probability of EDM's augmentations in the CIFAR-10 runs."""


def matches(state: State) -> bool:
    """Whether this looks like a SongUNet."""
    return "map_layer0.weight" in state


def inner(network: Object) -> Object:
    """The raw network inside a preconditioning; a raw network is its own."""
    children = network.state.get("_modules")
    child = children.get("model") if isinstance(children, dict) else None
    found = child if isinstance(child, Object) else network
    if found.class_name != "SongUNet":
        raise UserError(
            f"the file holds a {found.class_name or 'network without a name'}; of EDM's networks "
            "only SongUNet (DDPM++, NCSN++) is among this project's backbones"
        )
    return found


def facts_of(contents: dict[str, Any], network: Object) -> dict[str, Any]:
    """Arguments and attributes of the official objects, as plain data."""
    facts: dict[str, Any] = {"constructor": arguments_of(inner(network))}
    preconditioning = network.class_name
    if preconditioning in FORMULATIONS:
        names = FORMULATIONS[preconditioning][1]
        attributes = {k: v for k, v in simple(network.state).items() if k in names}
        facts |= {"preconditioning": preconditioning, "attributes": attributes}
    elif network is not inner(network):
        raise UserError(
            f"the file's preconditioning {preconditioning} is unknown; "
            f"known: {', '.join(FORMULATIONS)}"
        )
    for key in ("loss_fn", "augment_pipe"):
        value = contents.get(key)
        if isinstance(value, Object):
            numbers = {
                name: item
                for name, item in simple(value.state).items()
                if isinstance(item, int | float | str | bool) and not name.startswith("_")
            }
            facts[key] = {"class": value.class_name, **numbers}
    if isinstance(contents.get("dataset_kwargs"), dict):
        facts["dataset_kwargs"] = simple(contents["dataset_kwargs"])
    return facts


def attributes(facts: dict[str, Any]) -> tuple[str, ...]:
    """Options of the formulation that the official object has as attributes."""
    return FORMULATIONS[facts["preconditioning"]][1]


def _formulation(facts: dict[str, Any]) -> dict[str, Any]:
    kind, names = FORMULATIONS[facts.get("preconditioning", "EDMPrecond")]
    options = {name: facts.get("attributes", {}).get(name) for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    if math.isinf(options.get("sigma_max", 0.0)):
        del options["sigma_max"]
    loss = facts.get("loss_fn") or {}
    if kind == "edm" and loss.get("class") == "EDMLoss":
        options |= {name: loss[name] for name in ("P_mean", "P_std") if name in loss}
    whole = {name: int(v) if name == "M" else float(v) for name, v in options.items()}
    return {"kind": kind, **whole}


def _as_json(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    return list(value) if isinstance(value, tuple | list) else value


def describe(
    state: State, given: dict[str, Any], images: Images | None, facts: dict[str, Any]
) -> Description:
    """The network that the recorded arguments describe; ``given`` fills in for them."""
    settings = Settings(given)
    recorded = facts.get("constructor")
    arguments = dict(OFFICIAL) | (recorded or {})
    if recorded is None:
        # A bare state dictionary: the user says everything.
        arguments |= {key: settings.given.pop(key) for key in OFFICIAL if key in settings.given}
        shape = images or Images(0, 0, 0)
        arguments["img_resolution"] = settings.given.pop("img_resolution", shape.resolution)
        arguments["in_channels"] = settings.given.pop("in_channels", shape.channels)
        if not arguments["img_resolution"] or not arguments["in_channels"]:
            raise UserError(
                "the file does not say for which images the network is; add --data, or --options "
                'with "img_resolution" and "in_channels"'
            )
    options = {key: settings.read(key, _as_json(arguments[key])) for key in SongUNet.model_fields}
    settings.done({*OFFICIAL, "img_resolution", "in_channels"})
    residual = options["encoder_type"] == "residual" or options["embedding_type"] == "fourier"
    training: dict[str, Any] = {"dropout": arguments["dropout"]}
    if arguments["augment_dim"] == AUGMENT_LABELS:
        training["augment"] = (facts.get("augment_pipe") or {}).get("p", AUGMENTATION)
    return Description(
        family="ncsnpp" if residual else "ddpmpp",
        options=options,
        resolution=arguments["img_resolution"],
        channels=arguments["in_channels"],
        num_classes=arguments["label_dim"],
        formulation=_formulation(facts),
        training=training,
        assumed=settings.assumed,
        official=arguments,
    )
