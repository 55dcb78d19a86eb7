"""What a skip scaling costs: time of a training step, as a ratio to ``none`` in the same run.

    python benchmarks/skip_scaling.py [--preset tiny] [--steps 30] [--device cpu]

Arms take turns step by step, so that a busy machine slows all of them alike; the median of each
arm's steps is compared. Prints a table; nothing is asserted.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from study.backbones import build
from study.diffusion import formulation
from study.spec.backbones import FAMILIES
from study.spec.run import Backbone
from study.spec.scalings import SkipScaling

SCALINGS = {
    method: SkipScaling(method=method)
    for method in ("none", "inv_sqrt2", "cs", "ls", "ls_unshared")
}


def step(network, optimizer, loss, images, noise, device) -> float:
    """Seconds of one optimiser step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    draw = torch.zeros(len(images), device=device)
    loss.loss(network, images, draw, noise).per_sample.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(name: str, preset: str, steps: int, batch: int, device: torch.device) -> list[float]:
    """Median step seconds of every scaling on one backbone; nan where it cannot be built."""
    family = FAMILIES[name]
    backbone = Backbone(family=name, options=family.options(**family.presets[preset]))
    side = 8 if preset == "tiny" else 32
    channels = 1 if preset == "tiny" else 3
    loss = formulation({"kind": "edm"})
    arms = []
    for scaling in SCALINGS.values():
        network = build(backbone, scaling, resolution=side, channels=channels).to(device)
        arms.append((network, torch.optim.Adam(network.parameters(), fused=True)))
    images = torch.randn(batch, channels, side, side, device=device)
    noise = torch.randn_like(images)
    seconds: list[list[float]] = [[] for _ in arms]
    for turn in range(steps + 3):
        for record, (network, optimizer) in zip(seconds, arms, strict=True):
            took = step(network, optimizer, loss, images, noise, device)
            if turn >= 3:  # the first steps warm caches and allocators
                record.append(took)
    return [statistics.median(record) for record in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("backbone", "none", *list(SCALINGS)[1:])
    for name in FAMILIES:
        first, *others = measure(
            name, chosen.preset, chosen.steps, chosen.batch, torch.device(chosen.device)
        )
        table.add_row(name, f"{first * 1e3:.1f} ms", *[f"{other / first:.2f}" for other in others])
    Console().print(table)


if __name__ == "__main__":
    main()
