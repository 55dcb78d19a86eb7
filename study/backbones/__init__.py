"""The networks of the backbones; what they are called and which options they take: spec.backbones.

This module imports no torch, so that plans and workflows stay quick.
"""

from typing import TYPE_CHECKING

from study.files import UserError
from study.spec.base import implementation
from study.spec.run import Backbone as BackboneSettings
from study.spec.scalings import SkipScaling

if TYPE_CHECKING:
    from study.backbones.base import Backbone


def build(
    backbone: BackboneSettings,
    scaling: SkipScaling,
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

    ``backbone`` and ``scaling`` are those of its spec. ``num_classes`` 0 means
    unconditional. Raises ``UserError`` for a combination that the network cannot have.
    """
    try:
        network = implementation(backbone.row.network)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"backbone {backbone.family}: {error}") from None
    try:
        return network.from_options(
            backbone.options,
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
    except (ValueError, TypeError, AssertionError, AttributeError) as error:
        raise UserError(f"backbone {backbone.family} with {scaling.method}: {error}") from error
