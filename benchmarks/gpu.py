"""What a GPU makes of this package: speed as ratios within one run, and what only a GPU can show.

    python benchmarks/gpu.py [--only training loop ...] [--tiny] [--out gpu.json]

Sections: ``speed`` (published sizes: use of the device, waiting, compiled), ``evaluation``
(precision and recall on the device), ``training`` (five families x precision x attention kernel,
bare steps), ``loop`` (what the training loop adds to a bare step), ``memory``, ``scalings``,
``sampling``, ``repeat`` (do two trainings of one seed end in the same bits?), ``agreement`` (GPU
against CPU) and ``runs`` (real
``study train`` processes: killed and resumed, two at once, one process under NCCL). With ``--tiny``
it runs on a CPU in a minute. The JSON is written after every section; a CSV of the timings lies
beside it. What fails is a row that says why. The helpers are in ``gpu_bench.py``, the checks in
``gpu_checks.py``.
"""

# ruff: noqa: B023 - every closure is called in the turn of the loop that made it

import argparse
import csv
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from gpu_bench import (
    DEVICE,
    GPU,
    NEVER,
    PRESETS,
    SCALINGS,
    Bench,
    attempt,
    bare_step,
    network_of,
    peak,
    seconds_of,
)
from gpu_checks import agreement, repeat, runs
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from study.backbones.base import check_attention
from study.data import Archive
from study.diffusion.samplers import NoiseSource, sampler
from study.fidelity.evaluate import measure
from study.files import UserError, write_json
from study.network import arithmetic, build_network
from study.sampling.draw import to_uint8
from study.spec.backbones import FAMILIES
from study.trained import denoiser_of
from study.training.log import Log

# --- speed ---------------------------------------------------------------------------------------


def training(bench: Bench) -> None:
    """Bare steps of every family, precision and attention kernel; ratios to fp32 with math."""
    kernels = ["math", "sdpa"]
    try:
        check_attention("xformers", DEVICE)
        kernels.append("xformers")
    except UserError as error:
        bench.check("training", "xformers can be used", None, str(error))
    for family in PRESETS:
        first = None
        shape = (bench.batch, bench.shape(family)[0], *[bench.shape(family)[1]] * 2)
        for precision, kernel in itertools.product(bench.precisions, kernels):
            if kernel == "xformers" and precision in ("fp32", "tf32") and GPU:
                continue  # its kernels of today are for half precision

            def work(precision=precision, kernel=kernel) -> tuple[float, float]:
                with peak() as memory:
                    step = bare_step(network_of(bench, family, attention=kernel), precision, shape)
                    taken = seconds_of(step, bench.steps)
                return taken, memory[0]

            found = attempt(bench, "training", family, f"{precision} {kernel}", work)
            if found is None:
                continue
            first = first or found[0]
            bench.row(
                "training",
                family,
                f"{precision} {kernel}",
                seconds=found[0],
                images_per_second=bench.batch / found[0],
                speed=first / found[0],
                peak_mib=found[1],
            )


PUBLISHED = (
    ("uvit", "cifar10-S2"),
    ("uvit", "imagenet256-L2"),
    ("ddpmpp", "cifar10"),
    ("udit", "B"),
)
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations per second that NVIDIA's data sheets give."""


def speed(bench: Bench) -> None:
    """Published sizes, bf16 and fp32, plain and compiled: speed, use of the device, waiting.

    ``mfu``: operations of the products in a bare step over what the device could do in bf16.
    ``waiting``: the share of a step of the loop that a bare step does not take.
    """
    name = torch.cuda.get_device_name() if GPU else ""
    most = next((peak for part, peak in PEAK.items() if part in name), float("nan"))
    for (family, preset), precision in itertools.product(PUBLISHED, ("bf16", "fp32")):
        options = bench.options(family) if bench.tiny else FAMILIES[family].presets[preset]
        latent = preset in ("imagenet256-L2", "B")
        images = "udit" if latent else "uvit"  # whose images these are like
        spec = bench.spec(family, precision=precision).changed(backbone={"options": options})
        for compiled in (False, True) if precision == "bf16" else (False,):

            def work(compiled=compiled) -> dict[str, float]:
                with peak() as used:
                    trainer = bench.trainer(spec, {"compile": compiled}, images)
                    trainer.step = 1
                    channels, side = bench.shape(images)
                    network = trainer.fast
                    step = bare_step(network, precision, (bench.batch, channels, side, side))
                    bare = seconds_of(step, bench.steps)
                    looped = seconds_of(trainer.advance, bench.steps)
                with FlopCounterMode(display=False) as counter:
                    bare_step(trainer.backbone, precision, (bench.batch, channels, side, side))()
                return {
                    "seconds": bare,
                    "images_per_second": bench.batch / bare,
                    "mfu": counter.get_total_flops() / bare / most,
                    "loop_seconds": looped,
                    "waiting": 1 - bare / looped,
                    "peak_mib": used[0],
                }

            setting = f"{preset} {precision}" + (" compiled" if compiled else "")
            found = attempt(bench, "speed", family, setting, work)
            if found is not None:
                bench.row("speed", family, setting, **found)


def evaluation(bench: Bench) -> None:
    """Precision and recall of features like Inception's, on the device and on the CPU."""
    count = 200 if bench.tiny else 10_000
    a, b = torch.randn(count, 2048), torch.randn(count, 2048)
    for device in dict.fromkeys((DEVICE, torch.device("cpu"))):
        begun = time.perf_counter()
        scores = measure(a, None, b, ("prc",), device)
        taken = time.perf_counter() - begun
        found = {name: score.value for name, score in scores.items()}
        bench.row("evaluation", "", f"prc, {count} x 2048, {device}", seconds=taken, **found)


def loop(bench: Bench) -> None:
    """What a step of the loop takes beside a bare step of the same network, and in which part."""
    for family in ("uvit", "ddpmpp"):
        shape = (bench.batch, bench.shape(family)[0], *[bench.shape(family)[1]] * 2)
        bare = seconds_of(bare_step(network_of(bench, family), "bf16", shape), bench.steps)
        bench.row("loop", family, "bare step", seconds=bare, ratio=1.0)
        for kind in ("dsm", "stf"):
            target = {"kind": kind} | ({"reference": bench.reference} if kind == "stf" else {})
            trainer = bench.trainer(bench.spec(family, target, precision="bf16"))
            taken = seconds_of(lambda: trainer.batches.make(trainer.step), bench.steps)
            bench.row("loop", family, f"{kind}: batch alone", seconds=taken, ratio=taken / bare)
            if kind == "stf":
                batch, x = trainer.batches.make(0), torch.randn(shape, device=DEVICE)
                stable = trainer.stable(batch["images"], batch["others"])
                one = torch.ones(len(x), device=DEVICE)
                taken = seconds_of(lambda: stable(x, one, one), bench.steps)
                bench.row("loop", family, "stf: target alone", seconds=taken, ratio=taken / bare)
            for every in (NEVER, 1):
                trainer.log = Log(every)
                trainer.step += trainer.step == 0  # the first step always has a row
                taken = seconds_of(trainer.advance, bench.steps)
                what = "step" if every == NEVER else "step with a row of the log"
                bench.row("loop", family, f"{kind}: {what}", seconds=taken, ratio=taken / bare)


def memory(bench: Bench) -> None:
    """What micro-batches and checkpointing save, and what they cost."""
    first = None
    for machine in ({}, {"micro_batch": bench.batch // 4}, {"checkpointing": True}):
        with peak() as used:
            trainer = bench.trainer(bench.spec("uvit", precision="bf16"), machine)
            trainer.step = 1
            taken = seconds_of(trainer.advance, bench.steps)
        del trainer
        first = first or (taken, used[0])
        setting = " ".join(f"{key} {value}" for key, value in machine.items()) or "whole batch"
        bench.row(
            "memory",
            "uvit",
            setting,
            seconds=taken,
            ratio=taken / first[0],
            peak_mib=used[0],
            memory_ratio=used[0] / first[1],
        )


def scalings(bench: Bench) -> None:
    """Step time of every skip scaling as a ratio to none; arms take turns."""
    for family in ("uvit", "udit", "ddpmpp"):
        shape = (bench.batch, bench.shape(family)[0], *[bench.shape(family)[1]] * 2)
        arms = []
        for scaling in SCALINGS:
            made = attempt(
                bench, "scalings", family, scaling, lambda s=scaling: network_of(bench, family, s)
            )
            if made is not None:
                arms.append((scaling, bare_step(made, "bf16", shape)))
        taken: dict[str, list[float]] = {scaling: [] for scaling, _ in arms}
        for turn in range(5):
            for scaling, step in arms:
                taken[scaling].append(seconds_of(step, bench.steps, 1, 3 if turn == 0 else 1))
        none = statistics.median(taken["none"])
        for scaling, record in taken.items():
            seconds = statistics.median(record)
            bench.row("scalings", family, scaling, seconds=seconds, ratio=seconds / none)


def sampling(bench: Bench) -> None:
    """Images per second from latents to pixels (Heun, 18 steps), by batch; ratios to fp32."""
    draw = sampler({"kind": "edm_heun", "steps": 2 if bench.tiny else 18})
    for family in ("uvit", "ddpmpp"):
        first: dict[int, float] = {}
        archive = Archive(bench.archive(family))
        for precision in bench.precisions:
            spec = bench.spec(family, precision=precision)
            network = build_network(spec, archive).to(DEVICE).eval()
            denoiser = denoiser_of(spec, network, DEVICE)
            for batch in (4,) if bench.tiny else (16, 64, 256):

                def work(batch=batch, precision=precision, denoiser=denoiser) -> None:
                    source = NoiseSource(range(batch), (3, archive.resolution, archive.resolution))
                    with arithmetic(precision):
                        made = draw.sample(denoiser, source.latents().to(DEVICE), noise=source)
                    to_uint8(made)

                with torch.no_grad(), arithmetic(precision):  # the first call of these shapes
                    denoiser(torch.randn(batch, 3, *[archive.resolution] * 2, device=DEVICE), 1.0)
                taken = seconds_of(work, 1, rounds=1, warm=0)
                speed = batch / taken
                bench.row(
                    "sampling",
                    family,
                    f"{precision} batch {batch}",
                    seconds=taken,
                    images_per_second=speed,
                    speed=speed / first.setdefault(batch, speed),
                )


SECTIONS = {
    "speed": speed,
    "evaluation": evaluation,
    "agreement": agreement,
    "runs": runs,
    "training": training,
    "loop": loop,
    "memory": memory,
    "scalings": scalings,
    "sampling": sampling,
    "repeat": repeat,
}


def save(bench: Bench, took: dict[str, float]) -> None:
    """Everything as JSON, and the timings as CSV beside it."""
    name = torch.cuda.get_device_name() if GPU else "cpu"
    facts = {"device": name, "torch": torch.__version__, "batch": bench.batch, "took": took}
    facts |= {"tiny": bench.tiny}
    write_json(bench.out, {**facts, "rows": bench.rows, "checks": bench.checks})
    columns = list(dict.fromkeys(key for row in bench.rows for key in row))
    with bench.out.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in bench.rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def show(bench: Bench) -> None:
    for section, rows in itertools.groupby(bench.rows, key=lambda row: row["section"]):
        rows = list(rows)
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "section"))
        table = Table(*columns, title=section)
        for row in rows:
            cells = [row.get(column, "") for column in columns]
            table.add_row(*[f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells])
        Console().print(table)
    table = Table("check", "holds", "detail", title="checks")
    for one in bench.checks:
        holds = {True: "yes", False: "NO", None: ""}[one["holds"]]
        table.add_row(f"{one['section']}: {one['check']}", holds, one["detail"])
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    chosen = parser.parse_args()
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen.tiny, chosen.batch, chosen.out, Path(folder))
        for name in chosen.only:
            begun = time.perf_counter()
            attempt(bench, name, "", "the whole section", lambda: SECTIONS[name](bench))
            took[name] = round(time.perf_counter() - begun, 1)
            save(bench, took)
            if GPU:
                torch.cuda.empty_cache()
    show(bench)
    print(took)


if __name__ == "__main__":
    main()
