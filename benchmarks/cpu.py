"""What the package makes of a CPU: its parts against plain references, as ratios in one run.

    python benchmarks/cpu.py [--only batches target ...] [--tiny] [--out benchmarks/results-cpu.csv]

Sections: ``step`` (a step of the loop against a bare one), ``batches`` (made ahead, beside a device
that a sleep stands for), ``target`` (the stable target against its formula written down),
``samplers``, ``evaluation`` (precision and recall, and what a reference keeps), ``features``,
``conversion``, ``imports``, ``driver`` (jobs that share their imports), ``memory`` (peak of the
matrix part of an evaluation). The references are written here, after the papers. Both sides of a
ratio take turns; a row has the median, and the smallest and largest ratio. Nothing is asserted.
"""

# ruff: noqa: B023 - every closure is called in the turn of the loop that made it

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_bench import Bench, bare_step, network_of
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from study.ahead import Ahead
from study.data import Archive
from study.data.convert import convert
from study.diffusion.samplers import NoiseSource, sampler
from study.diffusion.stf import StableTarget
from study.fidelity import neighbours
from study.fidelity.extractors import torch_fidelity
from study.fidelity.reference import statistics as moments
from study.spec.measuring import Measurement
from study.training.batches import Batches

ROOT = Path(__file__).resolve().parents[1]
NEVER = 10**9


class Rows:
    """What was found so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pair(
        self, section: str, what: str, plain: Callable, ours: Callable, turns: int = 5
    ) -> tuple[Any, Any]:
        """Time both in turn; returns what they gave."""
        taken: list[tuple[float, float]] = []
        for turn in range(turns + 1):
            begun = time.perf_counter()
            one = plain()
            middle = time.perf_counter()
            other = ours()
            if turn:  # the first warms caches up
                taken.append((middle - begun, time.perf_counter() - middle))
        ratios = [p / o for p, o in taken]
        plain_s, ours_s = (statistics.median(side) for side in zip(*taken, strict=True))
        self.add(
            section,
            what,
            plain_ms=1e3 * plain_s,
            ours_ms=1e3 * ours_s,
            ratio=statistics.median(ratios),
            smallest=min(ratios),
            largest=max(ratios),
        )
        return one, other

    def add(self, section: str, what: str, **numbers: Any) -> None:
        self.rows.append({"section": section, "what": what, **numbers})
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in numbers.items()}
        print(section, what, shown, flush=True)


# --- training ------------------------------------------------------------------------------------


def step(rows: Rows, bench: Bench, tiny: bool) -> None:
    """A step of the loop, which logs, watches and averages, against a bare one."""
    for family in ("uvit", "ddpmpp"):
        shape = (bench.batch, bench.shape(family)[0], *[bench.shape(family)[1]] * 2)
        trainer = bench.trainer(bench.spec(family))
        trainer.step = 1  # the first step has a row of the log
        bare = bare_step(network_of(bench, family), "fp32", shape)
        rows.pair("step", f"{family}: bare / of the loop", bare, trainer.advance, bench.steps)


def batches(rows: Rows, bench: Bench, tiny: bool) -> None:
    """Batches of a stable target made ahead of a device, and between its steps."""
    for wait in (0.01,) if tiny else (0.015, 0.05):
        spec = bench.spec("uvit", {"kind": "stf", "reference": bench.reference})
        archive = Archive(bench.archive("uvit"))
        archive.resident()
        whole = slice(0, bench.batch)
        make = Batches(archive, spec, torch.device("cpu"), whole, False)
        count = 4 if tiny else 20

        def train(batches: Callable[[int], dict], wait: float = wait, count: int = count) -> Tensor:
            for number in range(count):
                found = batches(number)
                time.sleep(wait)  # the device works
            return found["images"]

        what = f"stf({bench.reference}), batch {bench.batch}, {1e3 * wait:.0f} ms a step"
        rows.pair("batches", what, lambda: train(make), lambda: train(Ahead(make, count)), 3)


def plain_target(reference: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Xu et al. 2023, equations 6 and 7, as they stand: all differences, in double precision."""
    x, rows, a, s = (one.double() for one in (x.flatten(1), reference.flatten(1), a, s))
    differences = x[:, None] - a[:, None, None] * rows[None]
    weights = (-differences.square().sum(2) / (2 * s[:, None].square())).softmax(1)
    return weights @ rows


def target(rows: Rows, bench: Bench, tiny: bool) -> None:
    """The stable target against its formula."""
    draw = torch.Generator().manual_seed(0)
    n, batch, side = (32, 4, 8) if tiny else (1024, 32, 32)
    reference, x = (torch.randn(k, 3, side, side, generator=draw) for k in (n, batch))
    a, s = torch.ones(batch), torch.full((batch,), 0.5)
    plain, ours = rows.pair(
        "target",
        f"stf({n}), batch {batch}, 3 x {side} x {side}",
        lambda: plain_target(reference, x, a, s),
        lambda: StableTarget(reference)(x, a, s),
        3,
    )
    error = (ours.flatten(1) - plain).abs().max().item()
    rows.add("target", "largest difference of the two", difference=error)


# --- sampling ------------------------------------------------------------------------------------


def samplers(rows: Rows, bench: Bench, tiny: bool) -> None:
    """Loops of the samplers, with a denoiser that costs next to nothing, against bare loops."""
    shape = (2, 3, 8, 8) if tiny else (64, 3, 32, 32)

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return (x / (1 + sigma**2)).float()

    def heun(steps: int = 18, low: float = 0.002, high: float = 80.0, rho: float = 7) -> Tensor:
        """Karras et al. 2022, algorithm 1."""
        ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
        levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        levels = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
        x = latents.double() * levels[0]
        for i in range(steps):
            d = (x - denoiser(x, levels[i]).double()) / levels[i]
            following = x + (levels[i + 1] - levels[i]) * d
            if levels[i + 1] > 0:
                e = (following - denoiser(following, levels[i + 1]).double()) / levels[i + 1]
                following = x + (levels[i + 1] - levels[i]) * (d + e) / 2
            x = following
        return x.float()

    source = NoiseSource(range(shape[0]), shape[1:])
    latents = source.latents()
    walk = sampler(Measurement(sampler={"kind": "edm_heun", "steps": 18}).sampler)
    plain, ours = rows.pair(
        "samplers", "edm_heun(18)", heun, lambda: walk.sample(denoiser, latents), 5
    )
    rows.add("samplers", "largest difference", difference=(plain - ours).abs().max().item())
    network = bench.trainer(bench.spec("udit")).backbone.eval()
    merged = network.merged()
    x = torch.randn(bench.batch, bench.shape("udit")[0], *[bench.shape("udit")[1]] * 2)
    noise = torch.ones(len(x))
    with torch.inference_mode():
        rows.pair("samplers", "U-DiT / merged", lambda: network(x, noise), lambda: merged(x, noise))


# --- evaluation ----------------------------------------------------------------------------------


def features_of(count: int, shift: float, seed: int) -> Tensor:
    """Features like those of Inception: 2048 correlated numbers, none below 0."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(2048, 2048, generator=draw) / 45
    draw.manual_seed(seed)
    features = torch.empty(count, 2048)
    for rows in features.split(1000):
        torch.mm(torch.randn(len(rows), 2048, generator=draw), mixing, out=rows)
        rows.add_(shift).relu_()
    return features


def evaluation(rows: Rows, bench: Bench, tiny: bool) -> None:
    """Precision and recall, and a reference's moments, against torch-fidelity's functions."""
    for count in (500,) if tiny else (5000, 10000):
        a, b = features_of(count, 0.02, 1), features_of(count, 0.0, 2)
        tool = torch_fidelity.metric_prc.prc_features_to_metric
        options = {"prc_neighborhood": 3, "prc_batch_size": 10000, "verbose": False}
        limits = neighbours.radii(b)
        plain, ours = rows.pair(
            "evaluation",
            f"precision and recall, {count} x 2048",
            lambda a=a, b=b: tool(a, b, save_cpu_ram=True, **options),
            lambda a=a, b=b, limits=limits: neighbours.precision_recall(a, b, limits),
            1,
        )
        same = ours == (plain["precision"], plain["recall"])
        rows.add("evaluation", f"the same numbers, {count}", same=same)
        known = moments(b)
        kept = [{"mu": known["mean"].numpy(), "sigma": known["covariance"].numpy()}]
        fid = torch_fidelity.metric_fid
        of = fid.fid_features_to_statistics
        rows.pair(
            "evaluation",
            f"Frechet distance, {count} x 2048, moments of the reference computed / kept",
            lambda a=a, b=b: fid.fid_statistics_to_metric(of(a), of(b), False),
            lambda a=a, kept=kept: fid.fid_statistics_to_metric(of(a), *kept, False),
            1,
        )


def memory(rows: Rows, bench: Bench, tiny: bool) -> None:
    """Time and peak memory of the metrics of so many images against as many."""
    count = 500 if tiny else 50_000
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from cpu import features_of
from study.fidelity.evaluate import measure
a, b = features_of({count}, 0.02, 1), features_of({count}, 0.0, 2)
logits = torch.randn({count}, 1008)
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before, begun = peak(), time.perf_counter()
measure(a, logits, b, (sys.argv[1],))
print(time.perf_counter() - begun, before, peak())
"""
    for metric in ("fd", "kid", "is", "prc"):
        done = subprocess.run(
            [sys.executable, "-c", program, metric],
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        seconds, before, peak = map(float, done.stdout.split())
        rows.add(
            "memory", f"{metric}, {count} x 2048", seconds=seconds, features_mib=before, mib=peak
        )


# --- data, processes -----------------------------------------------------------------------------


def conversion(rows: Rows, bench: Bench, tiny: bool) -> None:
    """PNGs to an archive, against a loop of PIL and zipfile that writes the same pixels."""
    count, random = 50 if tiny else 2000, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for number in range(count):
            pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number:05d}.png")

        def plain() -> None:
            with zipfile.ZipFile(folder / "plain.zip", "w") as file:
                for number, path in enumerate(sorted((folder / "images").iterdir())):
                    image = Image.open(path).convert("RGB").resize((32, 32), Image.LANCZOS)
                    with file.open(f"00000/img{number:08d}.png", "w") as entry:
                        image.save(entry, format="png", compress_level=0, optimize=False)

        settings = {"name": "images", "source": "folder", "resolution": 32}

        def ours() -> None:
            (folder / "ours.zip").unlink(missing_ok=True)
            convert(settings, folder / "ours.zip", source_path=str(folder / "images"))

        rows.pair("conversion", f"{count} PNGs of 64 x 64 to 32 x 32", plain, ours, 3)


def processor_seconds(command: list[str], **variables: str) -> tuple[float, float]:
    """Wall and processor time of a command and all that it starts, those that outlive it too.

    A process of its own adopts what is left behind, and waits for it.
    """
    program = (
        "import ctypes, os, resource, subprocess, sys, time\n"
        "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"  # PR_SET_CHILD_SUBREAPER
        "begun = time.perf_counter()\n"
        "code = subprocess.call(sys.argv[1:], stdout=2)\n"
        "wall = time.perf_counter() - begun\n"
        "while True:\n"
        "    try: os.wait()\n"
        "    except ChildProcessError: break\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(code, wall, used.ru_utime + used.ru_stime)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
    code, wall, used = done.stdout.split()
    if code != "0":
        raise SystemExit(done.stderr[-3000:])
    return float(wall), float(used)


def imports(rows: Rows, bench: Bench, tiny: bool) -> None:
    """What a stage pays before it begins."""
    for modules in (
        "torch",
        "study.cli",
        "study.training",
        "study.sampling.draw",
        "study.fidelity.evaluate",
    ):
        wall, used = processor_seconds([sys.executable, "-c", f"import {modules}"])
        rows.add("imports", modules, seconds=wall, processor_seconds=used)


def driver(rows: Rows, bench: Bench, tiny: bool) -> None:
    """The smoke study, with every job on its own and with jobs that share their imports."""
    if tiny:
        return
    study = ["snakemake", "--cores", "2", "--configfile", "workflow/studies/smoke.yaml"]
    parts = ("Snakefile", "config.yaml", "workflow", "notebooks", "envs")
    found = {}
    for name, variables in (("alone", {"LONGSKIP_WARM": ""}), ("shared", {})):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["cp", "-r", *(str(ROOT / part) for part in parts), folder], check=True)
            command = ["env", "-C", folder, sys.executable, "-m", *study]
            found[name] = processor_seconds(command, **variables)
    (wall, used), (shared_wall, shared_used) = found["alone"], found["shared"]
    rows.add(
        "driver",
        "smoke study: imports of every job / shared",
        plain_ms=1e3 * wall,
        ours_ms=1e3 * shared_wall,
        ratio=wall / shared_wall,
        processor_ratio=used / shared_used,
    )


SECTIONS = {
    section.__name__: section
    for section in (
        # First: later, memory that the main thread has at hand would flatter the plain side.
        *(batches, step, target, samplers, evaluation, memory),
        *(conversion, imports, driver),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen.tiny, 16, Path(folder) / "x.json", Path(folder))
        for name in chosen.only:
            SECTIONS[name](rows, bench, chosen.tiny)
    keys = list(dict.fromkeys(key for row in rows.rows for key in row))
    table = Table(*keys)
    for row in rows.rows:
        table.add_row(
            *(f"{v:.4g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in keys)
        )
    Console(width=200).print(table)
    if chosen.out:
        with chosen.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows(rows.rows)


if __name__ == "__main__":
    main()
