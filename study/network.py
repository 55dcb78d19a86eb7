"""The network of a run, from its spec and the images it is for."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from study.backbones import build
from study.backbones.base import Backbone
from study.data import Archive
from study.diffusion import formulations
from study.randomness import seed_of
from study.skips import LongSkips
from study.spec.run import Spec

# cuBLAS adds up in one order only with a workspace of fixed size, which it takes when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

AUGMENT_LABELS = 9
"""Entries of EDM's augmentation label vector."""


class SplitNetwork(Backbone):
    """A backbone for each split of the noise levels; ``networks[k]`` serves split k.

    It runs as the network that is ``active``, whose long skips and decoder blocks it shows;
    parameters and blocks are those of all.
    """

    def __init__(self, networks: Sequence[Backbone]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.num_classes = networks[0].num_classes
        self.active = 0

    @property
    def long_skips(self) -> LongSkips:  # type: ignore[override]
        """Those of the active network."""
        return self.networks[self.active].long_skips

    def forward(
        self, x: Tensor, noise: Tensor, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        return self.networks[self.active](x, noise, label, **conditioning)

    def merged(self) -> "SplitNetwork":
        return SplitNetwork([network.merged() for network in self.networks])

    def blocks(self) -> dict[str, nn.Module]:
        return {
            f"networks.{number}.{name}": block
            for number, network in enumerate(self.networks)
            for name, block in network.blocks().items()
        }

    def decoder_blocks(self) -> list[nn.Module]:
        return self.networks[self.active].decoder_blocks()


def build_network(spec: Spec, archive: Archive, checkpointing: bool = False) -> Backbone:
    """The backbone of ``spec`` for the images of ``archive``, initialised by its seed alone.

    A formulation with splits gets a ``SplitNetwork``.
    """
    training = spec.training
    parts = formulations(spec.formulation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.seeds.init, "init"))
        networks = [
            build(
                spec.backbone,
                spec.skip_scaling,
                resolution=archive.resolution,
                channels=archive.channels,
                out_channels=archive.channels * part.output_multiplier,
                num_classes=archive.num_classes if training.conditional else 0,
                augment_dim=AUGMENT_LABELS if training.augment else 0,
                attention=training.attention,
                dropout=training.dropout,
                checkpointing=checkpointing,
            )
            for part in parts
        ]
    return networks[0] if len(networks) == 1 else SplitNetwork(networks)


def networks_of(network: Backbone) -> list[Backbone]:
    """The networks behind a run's backbone: itself, or one for each split in their order."""
    return list(network.networks) if isinstance(network, SplitNetwork) else [network]


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Let single-precision products round to TF32 on GPUs that can (tf32), or forbid it (fp32).

    The mixed precisions leave what torch does by default.
    """
    if precision not in ("fp32", "tf32"):
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def repeatable(strict: bool = True) -> Iterator[None]:
    """Let torch take only kernels that give the same bits every time; on GPUs others are usual.

    ``strict``: an operation that has no such kernel raises ``RuntimeError``. Without it that
    operation, and attention, take what they have: two trainings may then differ in their last bits.
    """
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for hunting errors; takes time
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = before == 0
