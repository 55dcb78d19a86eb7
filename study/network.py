"""The network of a run, from its spec and the images it is for."""

from typing import Any

import torch

from study.backbones import build
from study.backbones.base import Backbone
from study.data import Archive
from study.diffusion import formulation as make_formulation
from study.randomness import seed_of

AUGMENT_LABELS = 9
"""Entries of EDM's augmentation label vector."""


def build_network(spec: dict[str, Any], archive: Archive, checkpointing: bool = False) -> Backbone:
    """The backbone of ``spec`` for the images of ``archive``, initialised by its seed alone."""
    training = spec["training"]
    formulation = make_formulation(spec["formulation"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec["seeds"]["init"], "init"))
        return build(
            spec["backbone"],
            spec["skip_scaling"],
            resolution=archive.resolution,
            channels=archive.channels,
            out_channels=archive.channels * formulation.output_multiplier,
            num_classes=archive.num_classes if training["conditional"] else 0,
            augment_dim=AUGMENT_LABELS if training["augment"] else 0,
            attention=training["attention"],
            dropout=training["dropout"],
            checkpointing=checkpointing,
        )
