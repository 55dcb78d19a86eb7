"""What became of every run, and what did it cost? Rows of ``runs.csv`` and ``cost.csv``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from study.analysis.tables.found import Found
from study.files import canonical_json


def dataset_of(config: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The study's section about a run's data set: beside what the spec holds, its note and path."""
    own = spec.get("dataset") or {}
    several = (config.get("datasets") or {}).get(own.get("name"))
    return {**own, **(several or config.get("dataset") or {})}


def dataset_note(config: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """The data set's own remark, for example that it is a lossy copy."""
    return " ".join(str(dataset_of(config, spec).get("note") or "").split())


def finite(value: Any) -> float | None:
    """JSON writes non-finite numbers as null; both mean that there is no value."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def run_row(one: Found, label: dict[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    train, last = one.train, one.train.get("last_finite") or {}
    provenance = train.get("provenance") or {}
    git, packages = provenance.get("git") or {}, provenance.get("packages") or {}
    factors = train.get("skip_factors")
    generate = one.generate
    return {
        **label,
        "run": one.run,
        "seed": one.axis("seed"),
        "data_seed": one.seeds.get("data"),
        "init_seed": one.seeds.get("init"),
        "noise_seed": one.seeds.get("noise"),
        "conditional": str(bool((one.spec.get("training") or {}).get("conditional"))).lower(),
        "precision": (one.spec.get("training") or {}).get("precision", ""),
        "dataset_note": dataset_note(config, one.spec),
        "status": one.status,
        "step": train.get("step", one.progress.get("step")),
        "steps": train.get("steps", (one.spec.get("training") or {}).get("steps")),
        "reason": train.get("reason") or "",
        "last_finite_step": last.get("step"),
        "last_finite_loss": finite(last.get("loss")),
        "last_finite_grad_norm": finite(last.get("grad_norm")),
        "final_loss": finite(train.get("final_loss")),
        "parameters": train.get("parameters"),
        "skips": train.get("skips"),
        "skip_factors": ""
        if factors is None
        else " ".join("learned" if f is None else f"{f:.4g}" for f in factors),
        "images_seen": train.get("images_seen"),
        "generation": generate.get("status", "missing") if one.main else "not asked for",
        "evaluation": one.main.evaluation if one.main else "not asked for",
        "measurement": one.main.name if one.main else "",
        "images": generate.get("images"),
        "sampling_seed": generate.get("seed"),
        "sampler": canonical_json(generate["sampler"]) if generate.get("sampler") else "",
        "nfe": generate.get("nfe"),
        "git_commit": git.get("commit") or "",
        "git_changed": "" if git.get("changed") is None else str(bool(git["changed"])).lower(),
        "device": provenance.get("device") or provenance.get("processor") or "",
        "torch_version": packages.get("torch", ""),
        "versions": ", ".join(
            f"{name} {version}"
            for name, version in [("python", provenance.get("python")), *sorted(packages.items())]
        ),
    }


def cost_row(one: Found, label: dict[str, str]) -> dict[str, Any]:
    provenance = one.train.get("provenance") or {}
    train, generate = one.train, one.generate
    return {
        **label,
        "run": one.run,
        "seed": one.axis("seed"),
        "status": one.status,
        "device": provenance.get("device") or provenance.get("processor") or "",
        "parameters": train.get("parameters"),
        "skips": train.get("skips"),
        "steps": train.get("step"),
        "images_seen": train.get("images_seen"),
        "nfe": generate.get("nfe"),
        "train_seconds": finite(train.get("train_seconds")),
        "train_images_per_second": finite(train.get("images_per_second")),
        "median_step_seconds": _median_step(one.folder / "train" / "timing.parquet"),
        "train_peak_memory_mib": finite(train.get("peak_memory_mib")),
        "generated_images": generate.get("images"),
        "generate_seconds": finite(generate.get("seconds")),
        "generate_images_per_second": finite(generate.get("images_per_second")),
        "generate_peak_memory_mib": finite(generate.get("peak_memory_mib")),
    }


def _median_step(path: Path) -> float | None:
    """Median seconds per training step: unlike the total it forgives a machine that was busy."""
    try:
        frame = pd.read_parquet(path, columns=["quantity", "value"])
    except (OSError, ValueError, KeyError):
        return None
    values = frame.loc[frame["quantity"] == "step_seconds", "value"]
    return float(values.median()) if len(values) else None
