"""How numbers and ways of measuring are worded on pictures and pages."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from study.analysis.names import NOT_MEASURED, OTHERWISE


def short(value: float, like: float | None = None) -> str:
    """Three significant digits of ``like`` (of the value itself by default), without an exponent
    where that is readable.
    """
    scale = abs(value if like is None else like)
    if scale == 0:
        return f"{value:.3g}"
    if 1e-3 <= scale < 1e5:
        return f"{value:.{max(0, 2 - math.floor(math.log10(scale)))}f}"
    return f"{value:.2g}"


def quantity(value: Any) -> str:
    """A number for a table: whole numbers grouped, others with three digits."""
    if value is None or pd.isna(value):
        return ""
    if float(value) == int(value) or abs(value) >= 1e5:
        return f"{round(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return short(float(value))


def signed(value: float, like: float | None = None) -> str:
    """A difference, with its sign and a true minus."""
    return f"{'−' if value < 0 else '+'}{short(abs(value), like)}"


def interval(low: float, high: float, like: float, form: Any = short) -> str:
    """Both ends with the decimals that ``like`` is printed with."""
    return "" if pd.isna(low) else f"[{form(low, like)}, {form(high, like)}]"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}".replace(",", "\N{NO-BREAK SPACE}")


def p_text(p: float) -> str:
    """A p-value with three decimals; empty where there is none."""
    if pd.isna(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def enumerate_words(words: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    parts = list(words)
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def absent(row: Any) -> str:
    """Why an arm (a row of ``summary.csv``) has no mean in the column of a metric."""
    if row["n_diverged"]:
        return "diverged"
    if row["n_otherwise"]:
        return OTHERWISE
    return NOT_MEASURED if row["n_not_measured"] else "missing"


def dataset_notes(runs: pd.DataFrame) -> list[str]:
    """The remarks on the data sets of runs, with the name of each where there are several."""
    notes = dict(sorted(set(zip(runs["dataset"], runs["dataset_note"], strict=True))))
    several = len(notes) > 1
    return [f"{name}: {note}" if several else note for name, note in notes.items() if note]


def describe_identity(metric: str, identity: Mapping[str, Any]) -> str:
    """One metric's identity in a line of prose."""
    if not identity:
        return f"{metric}: never measured"
    return f"{metric} (identity {identity['identity']}): {measured(identity)}"


def measured(identity: Mapping[str, Any]) -> str:
    """How a metric was measured, without its name."""
    try:
        sampler = json.loads(identity.get("sampler", "{}"))
    except json.JSONDecodeError:
        sampler = {"kind": identity["sampler"]}
    kind, steps = sampler.get("kind", "sampler"), sampler.get("steps")
    more = "".join(
        f", {key} {re.sub('[0-9a-f]{64}', lambda found: found[0][:8], str(identity[key]))}"
        for key in ("precision", "guidance", "labels", "decoder")
        if identity.get(key) and (key, identity[key]) != ("labels", "data")
    )
    snapshot = str(identity.get("snapshot", "final"))
    more = ("" if snapshot == "final" else f" of step {snapshot}") + more
    return (
        f"{identity.get('images')} generated against {identity.get('reference_images')} images of "
        f"{identity.get('reference')} ({identity.get('split')}), {identity.get('extractor')} "
        f"features, {kind}"
        + (f" {steps} steps" if steps else "")
        + f" (NFE {identity.get('nfe')}), {identity.get('weights')} weights{more}, "
        f"{identity.get('tool')} {identity.get('tool_version')}"
    )


def ends(counts: Iterable[float]) -> str:
    """ "3", or "2 to 3"."""
    numbers = sorted({int(count) for count in counts})
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def factor_words(row: pd.Series) -> str:
    text = f"× {row['factor']:.3g}"
    if pd.notna(row["factor_low"]):
        text += f" [{row['factor_low']:.3g}, {row['factor_high']:.3g}]"
    return text


SEEN = "a factor of about {} could have been seen"


def visible(factors: Iterable[float], words: str) -> str:
    """``words`` with the median of the detectable factors; nothing where none is known."""
    median = pd.Series(factors, dtype=float).median()
    return "" if pd.isna(median) else words.format(f"{median:.3g}")


def points_text(points: Mapping[str, float]) -> str:
    """What images that are no network's have, in words."""
    names = {
        "real": "real images",
        "gaussian": "a Gaussian fitted to their pixels",
        "noise": "uniform noise",
    }
    said = [
        # Of all images of a data set rounding alone is left.
        f"{words} {short(points[name]) if abs(points[name]) > 1e-6 else '0'}"
        for name, words in names.items()
        if name in points
    ]
    return ", ".join(said)
