"""What gpu.py and gpu_checks.py share: sizes, networks, clocks, and what was found so far."""

import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from study.backbones import build
from study.data import Archive
from study.data.archive import encode_npy, encode_png
from study.diffusion import formulation
from study.network import arithmetic
from study.spec.backbones import FAMILIES
from study.spec.run import Spec
from study.training.loop import Trainer

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRESETS = {  # published sizes, or the nearest to one on 32x32
    "uvit": "cifar10-S2",
    "udit": "S",
    "patch_unet": "cifar10",
    "ddpmpp": "cifar10",
    "ncsnpp": "cifar10",
}
SCALINGS = ("none", "inv_sqrt2", "cs", "ls", "ls_unshared")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
NEVER = 10**9


class Bench:
    """Sizes of this run, and what it has found so far."""

    def __init__(self, tiny: bool, batch: int, out: Path, folder: Path) -> None:
        self.tiny, self.out, self.folder = tiny, out, folder
        self.batch = 4 if tiny else batch
        self.steps = 2 if tiny else 4
        self.reference = 16 if tiny else 4096
        self.precisions = ("fp32", "bf16") if not GPU else ("fp32", "tf32", "bf16", "fp16")
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self._archives: dict[str, Path] = {}

    def options(self, family: str) -> dict[str, Any]:
        row = FAMILIES[family]
        return row.presets["tiny" if self.tiny else PRESETS[family]]

    def shape(self, family: str) -> tuple[int, int]:
        """Channels and side: latents for U-DiT, else CIFAR-10's; everything small if tiny."""
        return 4 if family == "udit" else 3, 8 if self.tiny else 32

    def spec(self, family: str, target: Any = None, **training: Any) -> Spec:
        # Formulations hand a token network its noise level times 1000; SongUNets take it as it is.
        scale = 1.0 if family in ("ddpmpp", "ncsnpp") else 1000.0
        settings = {"steps": NEVER, "batch": self.batch, "lr": 2e-4, **training}
        return Spec.read(
            {
                "dataset": {"name": "noise", "source": "archive"},
                "backbone": {
                    "family": family,
                    "options": self.options(family),
                    "noise_scale": scale,
                },
                "skip_scaling": {"method": "none"},
                "target": target or {"kind": "dsm"},
                "formulation": {"kind": "edm"},
                "training": settings,
            }
        )

    def archive(self, family: str) -> Path:
        """A data set of noise in the family's shape, with more images than a reference batch."""
        channels, side = self.shape(family)
        path = self.folder / f"noise-{channels}.zip"
        if path not in self._archives.values():
            rng = np.random.default_rng(0)
            with zipfile.ZipFile(path, "w") as file:
                for number in range(self.reference + 1000 if not self.tiny else 40):
                    if channels == 4:
                        name, image = "npy", encode_npy(rng.standard_normal((channels, side, side)))
                    else:
                        pixels = rng.integers(0, 256, (side, side, channels), np.uint8)
                        name, image = "png", encode_png(pixels)
                    file.writestr(f"00000/img{number:08d}.{name}", image)
            self._archives[family] = path
        return path

    def trainer(self, spec: Spec, machine: dict[str, Any] | None = None, like: str = "") -> Trainer:
        """A trainer of this spec, on images of its family's shape, or of that of ``like``."""
        AcceleratorState._reset_state()  # else a process has the precision of its first training
        archive = Archive(self.archive(like or spec.backbone.family))
        archive.resident()
        machine = {"log_every": NEVER, **(machine or {})}
        return Trainer(spec, archive, self.folder / "train", self.folder / "state", machine)

    def row(self, section: str, family: str, setting: str, **numbers: Any) -> None:
        self.rows.append({"section": section, "family": family, "setting": setting, **numbers})
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
        print(section, family, setting, shown, flush=True)

    def check(self, section: str, what: str, holds: bool | None, detail: str) -> None:
        """``holds`` is ``None`` for what is only told."""
        self.checks.append({"section": section, "check": what, "holds": holds, "detail": detail})
        print(section, what, {True: "ok", False: "FAILS", None: "--"}[holds], detail, flush=True)


# --- clocks --------------------------------------------------------------------------------------


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], times: int, rounds: int = 3, warm: int = 3) -> float:
    """Median over rounds of the seconds of one ``work``, with what it left to the device."""
    for _ in range(warm):
        work()
    taken = []
    for _ in range(rounds):
        wait()
        begun = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        taken.append((time.perf_counter() - begun) / times)
    return statistics.median(taken)


@contextmanager
def peak() -> Iterator[list[float]]:
    """Peak memory of the device inside, in MiB; nan on a CPU."""
    answer = [float("nan")]
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield answer
    if GPU:
        answer[0] = torch.cuda.max_memory_allocated() / 2**20


def bare_step(network: nn.Module, precision: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """A training step without a loop around it: loss, gradients, optimiser, of one fixed batch."""
    loss = formulation({"kind": "edm"})
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True)
    images, noise = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    draws = torch.zeros(shape[0], device=DEVICE)
    half = HALF.get(precision)

    def evaluate(x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=half, enabled=half is not None):
            return network(x, level, label).float()

    def step() -> None:
        with arithmetic(precision):
            loss.loss(evaluate, images, draws, noise).per_sample.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def network_of(bench: Bench, family: str, scaling: str = "none", **options: Any) -> nn.Module:
    channels, side = bench.shape(family)
    spec = bench.spec(family).changed(skip_scaling={"method": scaling})
    torch.manual_seed(0)
    made = build(spec.backbone, spec.skip_scaling, resolution=side, channels=channels, **options)
    return made.to(DEVICE).train()


def attempt(bench: Bench, section: str, family: str, setting: str, work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or a row that says why it fails."""
    try:
        return work()
    except Exception as error:  # whatever it is, the other rows matter
        wait()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        bench.row(section, family, setting, error=text)
        return None
