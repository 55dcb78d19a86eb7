"""A miniature results tree as a finished study leaves it: made up, but of the right shape.

Numbers follow a simple story (unscaled long skips are worst and diverge on one backbone, stable
targets help a little), so that pictures and tables can be judged.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from study.spec.metrics import numbers

BACKBONES = {"uvit": 6, "udit": 2, "patch_unet": 9, "ddpmpp": 6, "ncsnpp": 6}
SCALINGS = ("none", "inv_sqrt2", "cs(0.7)", "ls", "ls_unshared")
TARGETS = ("dsm", "stf")
PARAMETERS = {
    "uvit": 412_000,
    "udit": 655_000,
    "patch_unet": 508_000,
    "ddpmpp": 371_000,
    "ncsnpp": 389_000,
}
QUALITY = {"uvit": 9.0, "udit": 7.0, "patch_unet": 5.5, "ddpmpp": 4.6, "ncsnpp": 5.1}
EFFECT = {"none": 1.0, "inv_sqrt2": 0.93, "cs": 0.82, "ls": 0.86, "ls_unshared": 0.84}
GROWTH = {"none": 1.0, "inv_sqrt2": 0.7, "cs": 0.5, "ls": 0.55, "ls_unshared": 0.52}
PROVENANCE = {
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "changed": False},
    "python": "3.11.9",
    "packages": {"longskip": "0.1.0", "torch": "2.13.0", "numpy": "2.4.0"},
    "platform": "Linux",
    "processor": "synthetic",
    "threads": 1,
    "device": "cpu",
    "written": "2026-01-01T00:00:00+00:00",
}
SAMPLER = {"kind": "edm_heun", "steps": 10}
METRICS = ("fd", "kid", "is", "precision", "recall")
DIGITS = {"name": "digits", "source": "digits", "resolution": 8, "color": "grey"}
FEW = 500
"""Images of the protocol ``curve``."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Its snapshots, as shares of training."""


def _scaling(text: str) -> dict[str, Any]:
    method, _, kappa = text.rstrip(")").partition("(")
    return {
        "method": method,
        "kappa": float(kappa) if kappa else 0.7,
        "exponent": "per_skip",
        "innermost": None,
    }


def spec(backbone: str, scaling: str, target: str, seed: int, steps: int) -> dict[str, Any]:
    return {
        "dataset": DIGITS,
        "backbone": {"family": backbone, "options": {"depth": 4}, "noise_scale": 1.0},
        "skip_scaling": _scaling(scaling),
        "target": {"kind": target, "reference": 1024},
        "formulation": {"kind": "edm", "P_mean": -1.2, "P_std": 1.2},
        "training": {"batch": 64, "steps": steps, "lr": 0.001, "conditional": False},
        "seeds": {"data": seed, "init": seed, "noise": seed},
    }


def measurement(
    at: str | int | dict, step: int, last: bool, protocols: list[str], few: bool, **changes: Any
) -> dict[str, Any]:
    """One measurement of a run's manifest entry; ``changes`` are of its cell."""
    images = FEW if few else None
    cell = {"at": at, "weights": "ema", "sampler": SAMPLER, "guidance": None, "images": images}
    cell |= {"seed": 0, "labels": "data", **changes}
    mark = zlib.crc32(json.dumps([step, cell], sort_keys=True).encode())
    return {
        "measurement": f"{'final' if last else step}-edm-heun-{mark:08x}",
        "protocols": protocols,
        "step": step,
        "last": last,
        "images": images or 1797,
        "cell": cell,
        "extractors": {"digits": ["fd"] if few else ["fd", "kid", "is", "prc"]},
    }


def measurements(steps: int) -> list[dict[str, Any]]:
    """Those of protocols ``final`` and ``curve``."""
    kept = [round(share * steps) for share in SHARES]
    curve = [
        measurement("final" if step == steps else step, step, step == steps, ["curve"], True)
        for step in kept
    ]
    return [measurement("final", steps, True, ["final"], False), *curve]


def manifest(
    study: str,
    backbones: tuple[str, ...],
    scalings: tuple[str, ...],
    targets: tuple[str, ...],
    seeds: tuple[int, ...],
    steps: int,
) -> dict[str, Any]:
    runs = []
    for backbone in backbones:
        for scaling in scalings:
            for target in targets:
                slug = "-".join(
                    part.strip("-")
                    for part in (
                        backbone.replace("_", "-"),
                        scaling.replace("(", "-").replace(")", "").replace("_", "-"),
                        target,
                    )
                )
                for seed in seeds:
                    whole = spec(backbone, scaling, target, seed, steps)
                    mark = zlib.crc32(json.dumps(whole, sort_keys=True).encode())
                    runs.append(
                        {
                            "run": f"{slug}-s{seed}-{mark:08x}",
                            "arm": f"{slug}-{zlib.crc32(slug.encode()):08x}",
                            "display": f"{backbone} · {scaling} · {target}",
                            "grid": True,
                            "axes": {
                                "backbone": backbone,
                                "skip_scaling": scaling,
                                "target": target,
                                "formulation": "edm",
                                "training": "",
                                "seed": str(seed),
                            },
                            "spec": whole,
                            "measurements": measurements(steps),
                        }
                    )
    config = {
        "study": study,
        "title": "Long skips on digits",
        "dataset": {"name": "digits", "source": "digits", "note": ""},
        "protocols": {
            "final": {"sampler": SAMPLER, "extractors": [{"kind": "digits"}]},
            "curve": {
                "at": "snapshots",
                "sampler": SAMPLER,
                "images": FEW,
                "extractors": [{"kind": "digits"}],
                "metrics": ["fd"],
            },
        },
        "notebooks": ["overview", "uvit"],
    }
    return {"study": study, "config": config, "runs": runs}


def build(
    root: Path,
    study: str = "digits",
    backbones: tuple[str, ...] = tuple(BACKBONES),
    scalings: tuple[str, ...] = SCALINGS,
    targets: tuple[str, ...] = TARGETS,
    seeds: tuple[int, ...] = (0, 1),
    steps: int = 1000,
    logged: int = 100,
    images: int = 36,
    diverged: tuple[tuple[str, str, str, int], ...] = (
        ("patch_unet", "none", "dsm", 0),
        ("patch_unet", "none", "dsm", 1),
        ("udit", "none", "stf", 1),
    ),
    missing: tuple[tuple[str, str, str, int], ...] = (("ncsnpp", "ls", "stf", 1),),
) -> Path:
    """Write ``root/results/<study>`` and return the path of its ``study.json``."""
    content = manifest(study, backbones, scalings, targets, seeds, steps)
    results = root / "results" / study
    results.mkdir(parents=True, exist_ok=True)
    path = results / "study.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    for entry in content["runs"]:
        axes = entry["axes"]
        key = (axes["backbone"], axes["skip_scaling"], axes["target"], int(axes["seed"]))
        if key in missing:
            continue
        write_run(results / "runs" / entry["run"], entry, logged, images, key in diverged)
    return path


def also_on(
    manifest: Path,
    dataset: dict[str, Any],
    images: int,
    extractor: str = "digits",
    note: str = "",
    without: tuple[str, ...] = (),
) -> None:
    """Let every run of a study's first data set be done on one more, of so many ``images``, too.

    Metrics are of ``extractor``; distances are ten times as large there. ``note`` is what the study
    says of it. Backbones in ``without`` leave nothing.
    """
    content = json.loads(manifest.read_text(encoding="utf-8"))
    config, runs = content["config"], content["runs"]
    first = runs[0]["spec"]["dataset"]["name"]
    if config["dataset"] is not None:
        config["datasets"], config["dataset"] = {first: config["dataset"]}, None
    config["datasets"][dataset["name"]] = {**dataset, "note": note, "path": "/some/where"}
    for entry in json.loads(json.dumps(runs)):
        if entry["spec"]["dataset"]["name"] != first:
            continue
        for part in ("run", "arm"):
            entry[part] += f"-{dataset['name']}"
        entry["display"] += f" · {dataset['name']}"
        entry["spec"]["dataset"] = dataset
        for one in entry["measurements"]:
            one["images"] = one["cell"]["images"] or images
            one["extractors"] = {extractor: one["extractors"]["digits"]}
        runs.append(entry)
        if entry["axes"]["backbone"] not in without:
            write_run(manifest.parent / "runs" / entry["run"], entry, 10, 4, False)
    manifest.write_text(json.dumps(content), encoding="utf-8")


def write_run(folder: Path, entry: dict[str, Any], logged: int, images: int, diverged: bool):
    """Everything that its stages leave for one run."""
    axes, whole = entry["axes"], entry["spec"]
    backbone, scaling, target = axes["backbone"], axes["skip_scaling"], axes["target"]
    rng = np.random.default_rng(zlib.crc32(entry["run"].encode()))
    steps, skips = whole["training"]["steps"], BACKBONES[backbone]
    stop = int(steps * rng.uniform(0.3, 0.6)) if diverged else steps
    (folder / "train").mkdir(parents=True, exist_ok=True)
    frame = _dynamics(rng, backbone, scaling, target, steps, stop, logged, skips, diverged)
    frame.to_parquet(folder / "train" / "dynamics.parquet", index=False)
    timing = frame[frame["quantity"] == "lr"].assign(quantity="step_seconds", value=0.02)
    timing.to_parquet(folder / "train" / "timing.parquet", index=False)
    loss = frame[frame["quantity"] == "loss"]["value"].to_numpy()
    finite = loss[np.isfinite(loss)]
    parameters = PARAMETERS[backbone] + (9_000 if scaling.startswith("ls") else 0)
    method = whole["skip_scaling"]["method"]
    factors = {
        "none": [1.0] * skips,
        "inv_sqrt2": [2**-0.5] * skips,
        "cs": [whole["skip_scaling"]["kappa"] ** i for i in range(skips)],
    }.get(method)
    seconds = 20 + parameters / 2e4 * rng.uniform(0.95, 1.05)
    status = {
        "status": "diverged" if diverged else "done",
        "step": stop,
        "steps": steps,
        "reason": "non-finite loss" if diverged else None,
        "last_finite": {"step": stop - 1, "loss": float(finite[-1]), "grad_norm": 3.1},
        "run": entry["run"],
        "spec": whole,
        "seeds": whole["seeds"],
        "parameters": parameters,
        "skip_factors": factors,
        "skips": skips,
        "images_seen": stop * 64,
        "train_seconds": seconds * stop / steps,
        "images_per_second": steps * 64 / seconds,
        "peak_memory_mib": 400.0 + parameters / 5e3,
        "final_loss": None if diverged else float(finite[-1]),
        "provenance": PROVENANCE,
    }
    (folder / "train" / "status.json").write_text(json.dumps(status), encoding="utf-8")
    level = QUALITY[backbone] * EFFECT[method] * (0.94 if target == "stf" else 1.0)
    level *= rng.uniform(0.95, 1.05) * (1 if whole["dataset"] == DIGITS else 10)
    weights = f"{rng.integers(2**60):064x}"
    for asked in entry["measurements"]:
        lost = diverged and (asked["last"] or asked["step"] > stop)
        drawn = None
        if asked is entry["measurements"][0]:
            drawn = _images(rng, 0 if lost else images, method)
        # Training goes on getting better, the more slowly the longer it lasts.
        worth = level * (1 + 2 * (1 - asked["step"] / steps) ** 2)
        reason = f"diverged at step {stop}" if lost else None
        reference = whole["dataset"]["name"], entry["measurements"][0]["images"]
        write_measurement(folder, asked, worth, drawn, reason, weights, reference)


def write_measurement(
    folder: Path,
    entry: dict[str, Any],
    level: float,
    images: np.ndarray | None = None,
    reason: str | None = None,
    weights: str = "ef" * 32,
    reference: tuple[str, int] = ("digits", 1797),
):
    """What generate and evaluate leave for one measurement, whose Fréchet distance is ``level``.

    Without ``images`` the samples are gone; with a ``reason`` there is nothing to measure.
    ``reference`` is the data set that was measured against, and its number of images.
    """
    place, cell = folder / "measurements" / entry["measurement"], entry["cell"]
    place.mkdir(parents=True, exist_ok=True)
    count = 0 if reason else entry["images"]
    if images is not None:
        np.savez(place / "samples.npz", arr_0=images, arr_1=np.arange(len(images)) % 10)
    nfe = (2 * cell["sampler"]["steps"] - 1) * (1 if cell["guidance"] is None else 2)
    generate = {
        "status": "skipped" if reason else "done",
        "reason": reason,
        "measurement": entry["measurement"],
        "step": entry["step"],
        "labels": cell["labels"],
        "images": count,
        "seed": cell["seed"],
        "sampler": cell["sampler"],
        "guidance": cell["guidance"],
        "nfe": nfe,
        "weights": cell["weights"],
        "weights_sha256": f"{zlib.crc32(str(entry['step']).encode()):08x}{weights[8:]}",
        "seconds": 0.0 if reason else 8.0,
        "images_per_second": None if reason else count / 8.0,
        "peak_memory_mib": 300.0,
        "provenance": PROVENANCE,
    }
    (place / "generate.json").write_text(json.dumps(generate), encoding="utf-8")
    whole = (level, level / 40, 9.3 - level / 8, 0.95 - level / 60, 0.9 - level / 50)
    values = dict(zip(METRICS, whole, strict=True))
    own = {
        "images": entry["images"],
        "snapshot": "final" if entry["last"] else entry["step"],
        **{key: cell[key] for key in ("sampler", "guidance", "weights", "labels")},
        "nfe": nfe,
    }
    for extractor, metrics in entry["extractors"].items():
        bases = [number for metric in metrics for number in numbers(metric, extractor)]
        features = "" if extractor == "inception" else f"_{extractor}"
        names = {base: f"{base}{features}_{entry['images']}" for base in bases if not reason}
        fidelity = {
            "status": generate["status"],
            "reason": reason,
            "metrics": {name: values.get(base, level) for base, name in names.items()},
            "notes": {},
            "identity": {
                name: {**identity(*reference), **own, "extractor": extractor}
                | {"settings": {"metric": base}}
                for base, name in names.items()
            },
            "provenance": PROVENANCE,
        }
        (place / f"{extractor}.json").write_text(json.dumps(fidelity), encoding="utf-8")


def identity(reference: str = "digits", images: int = 1797) -> dict[str, Any]:
    return {
        "extractor": "digits",
        "extractor_sha256": "ab" * 32,
        "reference": reference,
        "reference_sha256": f"{zlib.crc32(reference.encode()):08x}" * 8,
        "split": "train",
        "images": images,
        "reference_images": images,
        "sampler": SAMPLER,
        "nfe": 19,
        "guidance": None,
        "weights": "ema",
        "snapshot": "final",
        "labels": "data",
        "precision": "float32",
        "tool": "torch-fidelity",
        "tool_version": "0.4.0",
    }


def _dynamics(rng, backbone, scaling, target, steps, stop, logged, skips, diverged):
    step = np.unique(np.linspace(1, steps, logged).astype(int))
    step = step[step <= stop]
    n = len(step)
    progress = step / steps
    growth = GROWTH[_scaling(scaling)["method"]]
    noise = rng.normal(size=n)
    loss = (0.4 + 6 * np.exp(-6 * progress)) * (0.9 if target == "stf" else 1.0)
    loss = loss * (1 + 0.1 * growth * noise)
    grad = (0.5 + 3 * np.exp(-8 * progress)) * growth * np.exp(0.3 * rng.normal(size=n))
    if diverged:
        loss[-3:] = loss[-3:] * [3, 9, np.nan]
        grad[-3:] = grad[-3:] * [10, 80, np.nan]
    curves = {("loss", ""): loss, ("grad_norm", ""): grad, ("lr", ""): np.full(n, 1e-3)}
    for sigma in ("0.01", "0.05", "0.2", "1", "5", "20"):
        base = 0.2 + np.exp(-((np.log(float(sigma)) + 1) ** 2) / 4)
        curves["loss_by_noise", sigma] = base * loss * (1 + 0.05 * rng.normal(size=n))
    for block in ("in.0", "in.1", "mid", "out.0", "out.1"):
        curves["grad_norm_block", block] = grad / 2 * rng.uniform(0.5, 1.5)
        curves["update_ratio", block] = 1e-3 * rng.uniform(0.5, 1.5) * np.exp(-progress)
    learned = scaling.startswith("ls")
    for index in range(1, skips + 1):
        where = str(index)
        base = (40 + 10 * index) * (1 + 1.5 * progress * growth)
        wobble = 1 + 0.06 * growth * rng.normal(size=n)
        gate = np.clip(0.5 + 0.3 * progress * (1 - 1.5 * index / skips), 0.02, 0.98)
        kappa = _scaling(scaling)["kappa"]
        factor = {"none": 1.0, "inv_sqrt2": 2**-0.5, "cs": kappa ** (index - 1)}.get(
            _scaling(scaling)["method"], gate
        )
        curves["skip_norm", where] = base * wobble
        curves["skip_norm_scaled", where] = base * wobble * factor
        after = (60 + 90 * progress**1.2 * growth * (1 + 2 / index)) * (
            1 + 0.08 * growth * rng.normal(size=n)
        )
        curves["decoder_norm_before", where] = after * 0.9
        curves["decoder_norm_after", where] = after
        curves["decoder_frobenius_after", where] = after * 8
        if learned:
            curves["gate_mean", where] = gate
            curves["gate_std", where] = np.full(n, 0.05)
            curves["gate_min", where] = gate - 0.1
            curves["gate_max", where] = gate + 0.1
    return pd.DataFrame(
        {
            "step": np.tile(step, len(curves)).astype("int64"),
            "quantity": np.repeat([key[0] for key in curves], n),
            "where": np.repeat([key[1] for key in curves], n),
            "value": np.concatenate(list(curves.values())).astype("float64"),
        }
    )


_GLYPHS = (
    "0011100 0100010 0100010 0100010 0100010 0100010 0011100",
    "0001000 0011000 0001000 0001000 0001000 0001000 0011100",
    "0011100 0100010 0000010 0000100 0001000 0010000 0111110",
    "0111100 0000010 0000010 0011100 0000010 0000010 0111100",
    "0000100 0001100 0010100 0100100 0111110 0000100 0000100",
    "0111110 0100000 0111100 0000010 0000010 0100010 0011100",
    "0011100 0100000 0111100 0100010 0100010 0100010 0011100",
    "0111110 0000010 0000100 0001000 0001000 0010000 0010000",
    "0011100 0100010 0100010 0011100 0100010 0100010 0011100",
    "0011100 0100010 0100010 0011110 0000010 0000010 0011100",
)


def _images(rng: np.random.Generator, count: int, method: str) -> np.ndarray:
    """Digits 8 x 8 x 1 with some noise: uint8 [count, 8, 8, 1]."""
    images = np.zeros((count, 8, 8, 1), dtype=np.float64)
    for index in range(count):
        rows = _GLYPHS[index % 10].split()
        images[index, :7, :7, 0] = [[int(pixel) for pixel in row] for row in rows]
    images = images * 215 + rng.normal(scale=35 * EFFECT[method], size=images.shape)
    return images.clip(0, 255).astype(np.uint8)
