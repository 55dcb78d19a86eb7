"""What only a GPU can show: the same bits again, the CPU's numbers, trainings that were killed."""

# ruff: noqa: B023 - every closure is called in the turn of the loop that made it

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import torch
from gpu_bench import (
    DEVICE,
    GPU,
    HALF,
    PRESETS,
    Bench,
    attempt,
    bare_step,
    network_of,
    seconds_of,
)
from torch import Tensor, nn

from study.backbones import build
from study.diffusion.stf import StableTarget
from study.files import sha256, write_json
from study.network import arithmetic, repeatable

# --- the same bits -------------------------------------------------------------------------------


def repeat(bench: Bench) -> None:
    """Whether two trainings of one seed end in the same bits, and what such kernels cost a step."""
    cells = list(itertools.product(PRESETS, ("fp32", "bf16")))
    for family, precision in [*cells, *([("uvit", "fp16")] if GPU else [])]:
        shape = (bench.batch, bench.shape(family)[0], *[bench.shape(family)[1]] * 2)

        def steps() -> tuple[int, float, float]:
            states = []
            for _ in range(2):
                trainer = bench.trainer(bench.spec(family, precision=precision))
                with arithmetic(precision):
                    for _ in range(bench.steps):
                        trainer.advance()
                states.append([p.detach().clone() for p in trainer.parameters])
            del trainer
            step = bare_step(network_of(bench, family), precision, shape)
            usual = seconds_of(step, bench.steps)
            with repeatable():
                ours = seconds_of(step, bench.steps)
            return sum(not torch.equal(a, b) for a, b in zip(*states)), usual, ours

        found = attempt(bench, "repeat", family, precision, steps)
        if found is not None:
            differ, usual, ours = found
            bench.row("repeat", family, precision, seconds=ours, ratio=ours / usual)
            told = f"{differ} tensors differ"
            bench.check("repeat", f"{family} {precision}: the same bits", differ == 0, told)


# --- agreement with the CPU ----------------------------------------------------------------------


def _far(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, on the CPU in double precision."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


def agreement(bench: Bench) -> None:
    """Networks, their gradients and stable targets on the device against the CPU's."""
    bounds = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 1e-1, "fp16": 2e-2}
    for family in PRESETS:
        channels, side = bench.shape(family)
        spec = bench.spec(family)
        torch.manual_seed(1)
        network = build(spec.backbone, spec.skip_scaling, resolution=side, channels=channels)
        with torch.no_grad():  # else layers that start at zero hide what comes before them
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        x, level = torch.randn(2, channels, side, side), torch.tensor([0.3, 1.1])

        def outcome(network: nn.Module, precision: str, device: torch.device) -> list[Tensor]:
            half = HALF.get(precision)
            network.zero_grad()
            with arithmetic(precision):
                with torch.autocast(device.type, dtype=half, enabled=half is not None):
                    out = network(x.to(device), level.to(device)).float()
                out.square().sum().backward()
            return [out, torch.cat([p.grad.flatten() for p in network.parameters()])]

        network.eval()
        expected = [t.cpu() for t in outcome(network, "fp32", torch.device("cpu"))]
        for precision in bench.precisions:
            found = attempt(
                bench,
                "agreement",
                family,
                precision,
                lambda p=precision: outcome(network.to(DEVICE), p, DEVICE),
            )
            if found is None:
                continue
            far = [_far(a, b) for a, b in zip(found, expected)]
            detail = f"output {far[0]:.1e}, gradients {far[1]:.1e} from the CPU's in fp32"
            bench.check("agreement", f"{family} {precision}", max(far) < bounds[precision], detail)
        network.cpu()
    reference, x = torch.randn(bench.reference, 3, 16, 16), torch.randn(8, 3, 16, 16)
    for sigma in (1e-3, 0.1, 1.0, 80.0):
        noisy = reference[:8] + sigma * x
        a, s = torch.ones(8), torch.full((8,), sigma)
        here = StableTarget(reference.to(DEVICE))(noisy.to(DEVICE), a.to(DEVICE), s.to(DEVICE))
        far = _far(here, StableTarget(reference)(noisy, a, s))
        bench.check("agreement", f"stable targets at sigma {sigma:g}", far < 1e-5, f"{far:.1e}")


# --- real trainings ------------------------------------------------------------------------------


def runs(bench: Bench) -> None:
    """Trainings as the workflow starts them: killed and resumed, two at once, under NCCL."""
    spec = bench.spec("uvit", precision="bf16" if GPU else "fp32").changed(
        training={"steps": 60 if GPU else 400},
        backbone={"options": {**bench.options("uvit"), "depth": 4}},
    )
    write_json(bench.folder / "spec.json", spec.content())
    environment = {**os.environ, "LONGSKIP_JOBS_PER_GPU": "1"}

    def command(name: str, save: float) -> list[str]:
        machine = json.dumps({"save_every": save, "log_every": 5})
        return [
            *(sys.executable, "-m", "study", "train", "--spec", str(bench.folder / "spec.json")),
            *("--data", str(bench.archive("uvit")), "--out", str(bench.folder / name / "train")),
            *("--state", str(bench.folder / name / "state"), "--machine", machine),
            *("--gpus", str(int(GPU)), "--threads", "1"),
        ]

    def start(name: str, save: float = 600.0) -> subprocess.Popen:
        log = (bench.folder / f"{name}.log").open("ab")
        return subprocess.Popen(command(name, save), env=environment, stdout=log, stderr=log)

    def ended(name: str, process: subprocess.Popen) -> bool:
        code = process.wait(timeout=300)
        text = (bench.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        if code:
            bench.check("runs", name, False, f"exit {code}: {text.strip()[-600:]}")
        return code == 0

    def bits(name: str) -> list[str]:
        train = bench.folder / name / "train"
        files = ("weights.safetensors", "raw.safetensors", "dynamics.parquet")
        return [sha256(train / file) for file in files]

    def when(name: str) -> tuple[float, float]:
        """Beginning and end of the training itself, in seconds since the epoch."""
        status = bench.folder / name / "train" / "status.json"
        taken = json.loads(status.read_text(encoding="utf-8"))["train_seconds"]
        return status.stat().st_mtime - taken, status.stat().st_mtime

    begun = time.time()
    killed = bench.folder / "killed" / "state" / "checkpoint.pt"
    process = start("killed", save=0.001)
    while process.poll() is None and not killed.exists() and time.time() - begun < 120:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half_way = not (bench.folder / "killed" / "train" / "status.json").exists()
    both = {name: start(name) for name in ("first", "second")}
    codes = [ended(name, process) for name, process in both.items()]
    if not all(codes):
        return
    (a, b), (c, d) = sorted([when("first"), when("second")])
    if GPU:
        apart = f"one ended {c - b:+.1f} s before the other began ({b - a:.1f} s, {d - c:.1f} s)"
        bench.check("runs", "two trainings do not share a GPU", c > b - 0.5, apart)
    same = bits("first") == bits("second")
    bench.check("runs", "two trainings of one seed: the same bytes", same, "")
    if ended("killed", start("killed")):
        log = (bench.folder / "killed.log").read_text(encoding="utf-8", errors="replace")
        resumed = re.findall(r"resumed at step \d+ of \d+", log)
        detail = f"killed before its end: {half_way}; {resumed}"
        same = bits("killed") == bits("first")
        bench.check("runs", "killed and resumed: the same bytes", same, detail)
    # One process of a training of several: torch's process group, NCCL on a GPU.
    code = "import sys; from study.processes import launch; sys.exit(launch(sys.argv[1:], 1))"
    log = (bench.folder / "group.log").open("ab")
    grouped = [sys.executable, "-c", code, *command("group", 600.0)]
    if ended("group", subprocess.Popen(grouped, env=environment, stdout=log, stderr=log)):
        same = bits("group") == bits("first")
        bench.check("runs", "in a process group: the same bytes", same, "nccl" if GPU else "gloo")
