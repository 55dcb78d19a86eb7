"""The backbones, by name.

To add one: write its network as ``study/backbones/<file>.py`` (a ``Backbone`` with
``from_options``) and add its line to ``FAMILIES``. Give it a model in ``options.py`` as well if
its options are to be checked, with presets, before anything starts.

This module imports no torch, so that plans and workflows stay quick.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from study.backbones import options as models
from study.files import UserError

if TYPE_CHECKING:
    from study.backbones.base import Backbone


@dataclass(frozen=True)
class Family:
    """Where a backbone lives and which options it takes.

    ``network`` is "module:Class"; ``options`` the pydantic model of its options (its defaults are
    the official constructor's), or ``None`` to pass options to the constructor unchecked;
    ``presets`` name -> options.
    """

    network: str
    options: type[models.Options] | None = None
    presets: dict[str, dict[str, Any]] | None = None

    @property
    def module(self) -> str:
        return self.network.partition(":")[0]


FAMILIES: dict[str, Family] = {
    "uvit": Family("study.backbones.uvit:UViT", models.UViT, models.UVIT),
    "udit": Family("study.backbones.udit:UDiT", models.UDiT, models.UDIT),
    "patch_unet": Family("study.backbones.patch_unet:PatchUNet", models.PatchUNet, models.PATCH),
    "ddpmpp": Family("study.backbones.songunet:SongUNet", models.DDPMpp, models.DDPMPP),
    "ncsnpp": Family("study.backbones.songunet:SongUNet", models.NCSNpp, models.NCSNPP),
}


def family(name: str) -> Family:
    """The family called ``name``. Raises ``UserError`` naming the known ones."""
    if name not in FAMILIES:
        raise UserError(f"backbone: {name!r} is unknown; allowed: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def build(
    backbone: dict[str, Any],
    scaling: dict[str, Any],
    *,
    resolution: int,
    channels: int,
    out_channels: int | None = None,
    num_classes: int = 0,
    augment_dim: int = 0,
    attention: str = "sdpa",
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> "Backbone":
    """Build the backbone of a run.

    ``backbone`` and ``scaling`` are the sections of a resolved spec. ``num_classes`` 0 means
    unconditional. Raises ``UserError`` for a combination that the network cannot have.
    """
    module, _, name = family(backbone["family"]).network.partition(":")
    network = getattr(import_module(module), name)
    try:
        return network.from_options(
            backbone["options"],
            scaling=scaling,
            resolution=resolution,
            channels=channels,
            out_channels=channels if out_channels is None else out_channels,
            num_classes=num_classes,
            augment_dim=augment_dim,
            attention=attention,
            dropout=dropout,
            checkpointing=checkpointing,
        )
    except (ValueError, TypeError, AssertionError) as error:
        method = scaling["method"]
        raise UserError(f"backbone {backbone['family']} with {method}: {error}") from error
