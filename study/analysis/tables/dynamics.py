"""How did training go? The thinned curves, and how much they wobble at the end."""

import re
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import statistics
from study.analysis.tables.columns import COLUMNS
from study.analysis.tables.found import Found, problem

# Points that are kept of one curve: a quantity of the whole network, or one of many places.
CURVE_POINTS, PLACE_POINTS = 60, 30
# Quantities whose wobble about the smoothed curve is a result (ScaleLong, figure 1).
OSCILLATING = ("loss", "grad_norm", "decoder_norm_after", "decoder_frobenius_after")
# The window of the oscillation number: so many steps, and at least so many logged points.
WINDOW_STEPS, WINDOW_POINTS = 500, 8


def dynamics(found: list[Found], problems: list) -> tuple[pd.DataFrame, list[dict]]:
    thinned, oscillation = [], []
    for one in found:
        path = one.folder / "train" / "dynamics.parquet"
        if not path.is_file():
            continue
        try:
            frame = pd.read_parquet(path, columns=["step", "quantity", "where", "value"])
        except (OSError, ValueError, KeyError) as error:
            detail = f"{path.name}: {str(error).splitlines()[0]}"
            problems.append(problem("error", "unreadable file", one.run, detail))
            continue
        if frame.empty:  # imported weights, which were not trained here
            continue
        frame["where"] = frame["where"].fillna("").astype(str)
        broken = ~np.isfinite(frame["value"].to_numpy(dtype=float))
        if broken.any() and one.status == "done":
            names = ", ".join(sorted(set(frame.loc[broken, "quantity"])))
            detail = f"{int(broken.sum())} non-finite values in {names}, yet the run is done"
            problems.append(problem("error", "non-finite history", one.run, detail))
        thin = _thin(frame)
        thin.insert(0, "run", one.run)
        thinned.append(thin)
        if not one.splits:  # else the curves end with the last network only
            oscillation += [{"run": one.run, **row} for row in _oscillation(frame)]
    columns = COLUMNS["dynamics"]
    if not thinned:
        empty = {c: pd.Series(dtype="str" if c in columns[:3] else "float64") for c in columns}
        return pd.DataFrame(empty), oscillation
    answer = pd.concat(thinned, ignore_index=True)[columns]
    return answer, oscillation


def natural(text: str) -> tuple:
    """Sort key under which "10" follows "9" and "block.10" follows "block.9"."""
    return tuple(
        (0, float(part), "") if re.fullmatch(r"[\d.]+(e[+-]?\d+)?", part) else (1, 0.0, part)
        for part in re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
        if part and part != "."
    )


def _thin(frame: pd.DataFrame) -> pd.DataFrame:
    """At most ``CURVE_POINTS`` points per curve: mean, last raw value and range of each stretch."""
    places = {place: rank for rank, place in enumerate(sorted(set(frame["where"]), key=natural))}
    frame = frame.assign(_place=frame["where"].map(places))
    frame = frame.sort_values(["quantity", "_place", "step"], kind="stable", ignore_index=True)
    new = (frame["quantity"] != frame["quantity"].shift()) | (
        frame["where"] != frame["where"].shift()
    )
    curve = new.cumsum().to_numpy() - 1
    first = np.flatnonzero(new.to_numpy())
    length = np.diff([*first, len(frame)])
    limit = np.where(frame["where"].to_numpy()[first] == "", CURVE_POINTS, PLACE_POINTS)
    keep = np.minimum(length, limit)
    position = np.arange(len(frame)) - first[curve]
    stretch = position * keep[curve] // length[curve]
    starts = np.flatnonzero(new.to_numpy() | (np.diff(stretch, prepend=-1) != 0))
    ends = np.append(starts[1:], len(frame)) - 1
    value = frame["value"].to_numpy(dtype=float)
    finite = np.isfinite(value)
    count = np.add.reduceat(finite.astype(int), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, value, 0.0), starts) / count
    low = np.minimum.reduceat(np.where(finite, value, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, value, -np.inf), starts)
    return pd.DataFrame(
        {
            "quantity": frame["quantity"].to_numpy()[ends],
            "where": frame["where"].to_numpy()[ends],
            "step": frame["step"].to_numpy()[ends],
            "value": mean,
            "raw": np.where(finite[ends], value[ends], np.nan),
            "minimum": np.where(count > 0, low, np.nan),
            "maximum": np.where(count > 0, high, np.nan),
            "points": ends - starts + 1,
        }
    )


def _oscillation(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Level and wobble of curves at the end of training.

    Over the last ``WINDOW_STEPS`` steps or the last quarter of the run, whichever is shorter:
    ``level`` is the mean, ``oscillation`` the standard deviation about a straight line through
    the window, divided by the level. A curve with fewer than ``WINDOW_POINTS`` points there has
    none.
    """
    rows = []
    frame = frame[frame["quantity"].isin(OSCILLATING) & np.isfinite(frame["value"])]
    for quantity, group in frame.groupby("quantity", sort=True):
        first, last = int(group["step"].min()), int(group["step"].max())
        start = max(last - WINDOW_STEPS, last - (last - first) // 4)
        late = group[group["step"] >= start]
        late = late.drop_duplicates(["step", "where"], keep="last")
        wide = late.pivot(index="step", columns="where", values="value").dropna()
        if len(wide) < WINDOW_POINTS:
            continue
        values = wide.to_numpy()
        level, spread = values.mean(axis=0), statistics.wobble(wide.index.to_numpy(), values)
        for column in sorted(range(wide.shape[1]), key=lambda c: natural(wide.columns[c])):
            rows.append(
                {
                    "quantity": quantity,
                    "where": wide.columns[column],
                    "window_first_step": int(wide.index[0]),
                    "window_last_step": last,
                    "points": len(wide),
                    "level": level[column],
                    "oscillation": spread[column] / level[column] if level[column] else None,
                }
            )
    return rows
