"""What did the probes measure? Their rows, run by run, and what is wrong with them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from study.analysis.tables.found import Found, problem
from study.files import UserError, read_json
from study.probes.columns import MEASURED
from study.spec.probes import PROBES


def probes(
    manifest: Mapping[str, Any], found: list[Found], results: Path, problems: list
) -> dict[str, pd.DataFrame]:
    """The rows of every probe of the study; those of runs and arms say whose they are."""
    answer = {}
    lost = {one.run for one in found if one.status == "diverged"}
    for entry in (manifest.get("config") or {}).get("probes") or []:
        kind = entry["kind"]
        if PROBES[kind].subject in ("run", "arm"):
            wanted = entry.get("seeds")
            parts = {
                one.run: one.folder / "probes" / f"{kind}.parquet"
                for one in found
                if wanted is None or one.axis("seed") in {str(seed) for seed in wanted}
            }
        else:
            parts = {"": results / "probes" / f"{kind}.parquet"}
        frames = []
        for run, path in parts.items():
            if not path.is_file():
                detail = f"no probes/{kind}.parquet"
                problems.append(problem("warning", "missing probe", run, detail))
                continue
            try:
                frame = pd.read_parquet(path)
            except (OSError, ValueError) as error:
                detail = f"probes/{path.name}: {str(error).splitlines()[0]}"
                problems.append(problem("error", "unreadable file", run, detail))
                continue
            problems += _unmeasured(kind, run, path.with_suffix(".json"), lost)
            problems += _infinite_numbers(kind, run, frame)
            if run and len(frame.columns):
                frame.insert(0, "run", run)
            if len(frame):
                frames.append(frame)
        answer[kind] = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return answer


def _unmeasured(kind: str, run: str, facts: Path, lost: Collection[str]) -> list[dict]:
    """What a probe says that it could not measure; of diverged runs (``lost``) that is known."""
    try:
        reason = read_json(facts).get("reason") if facts.is_file() and run not in lost else None
    except UserError as error:
        return [problem("error", "unreadable file", run, str(error))]
    detail = f"{kind}: {reason}"
    return [problem("warning", "probe not measured", run, detail)] if reason else []


def _infinite_numbers(kind: str, run: str, frame: pd.DataFrame) -> list[dict]:
    """A probe leaves out what it could not measure; an infinite measured number is a fault.

    Short trainings that diverged may say so with the number they ended on.
    """
    if "outcome" in frame.columns:
        frame = frame[frame["outcome"] != "diverged"]
    measured = [name for name in MEASURED if name in frame.columns]
    broken = [name for name in measured if np.isinf(frame[name].to_numpy(dtype=float)).any()]
    if not broken:
        return []
    detail = f"{kind}: infinite numbers in {', '.join(broken)}"
    return [problem("error", "non-finite probe", run, detail)]
