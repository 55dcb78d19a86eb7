"""What the notebooks share: published rows, our setting in words, pairs of runs, verdicts.

A verdict is computed from pairs of runs that agree in everything but the claimed cause, seeds
included; the judging is :func:`study.analysis.statistics.verdict`.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study import published
from study.analysis import style
from study.analysis.figures import describe_identity, leading_metric
from study.analysis.statistics import Verdict
from study.analysis.tables import Tables

_SEEDS = ["data_seed", "init_seed", "noise_seed"]


def show(figure: Figure) -> Any:
    """The figure as a picture for a notebook's output."""
    from IPython.display import Image

    buffer = io.BytesIO()
    with matplotlib.rc_context(style.RC):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    width = round(figure.get_size_inches()[0] * 130)
    return Image(data=buffer.getvalue(), width=width, alt=figure.get_label())


def say(*lines: Any) -> Any:
    """Sentences, as a list if there are several, in Markdown."""
    from IPython.display import Markdown

    texts = [str(line) for line in lines]
    return Markdown(texts[0] if len(texts) == 1 else "\n".join(f"- {text}" for text in texts))


def grid(frame: pd.DataFrame, index: bool = True) -> Any:
    """A table for a notebook's output, with nothing cut off and no names over the index."""
    from IPython.display import HTML

    plain = frame.rename_axis(index=None, columns=None)
    with pd.option_context("display.max_colwidth", None):
        return HTML(plain.to_html(index=index, border=0, na_rep=""))


def published_rows(**where: str) -> pd.DataFrame:
    """Published numbers as a table, without the columns that are empty throughout."""
    frame = pd.DataFrame(published.rows(**where))
    return frame.loc[:, [column for column in frame.columns if (frame[column] != "").any()]]


def verdicts(rows: Iterable[tuple[Mapping[str, str], Verdict]], factor: bool = False) -> Any:
    """Verdicts as a table: what each row is about, the word, and the numbers behind it.

    With ``factor`` the judged differences are logarithms of ratios and are shown as factors.
    """
    lines = []
    for about, verdict in rows:
        seen, form = verdict.evidence, (np.exp if factor else float)
        show_ends = seen is not None and not math.isnan(seen.low)
        lines.append(
            {
                **about,
                "verdict": verdict.word,
                "factor" if factor else "mean difference": ""
                if seen is None or seen.n == 0
                else f"{form(seen.mean):.3g}",
                "95 % interval": f"[{form(seen.low):.3g}, {form(seen.high):.3g}]"
                if show_ends
                else "",
                "pairs": 0 if seen is None else seen.n,
                "p": "" if seen is None or math.isnan(seen.p) else f"{seen.p:.2g}",
                "remark": "" if seen is None else seen.note,
            }
        )
    return grid(pd.DataFrame(lines), index=False)


def setting(tables: Tables) -> Any:
    """What this study is, for comparison with a paper's setting."""
    runs = tables.runs
    seeds = runs.groupby("arm")["run"].count()
    metric = leading_metric(tables)
    facts = {
        "data set": ", ".join(sorted(set(runs["dataset"]))),
        "about it": " ".join(sorted(set(runs["dataset_note"]) - {""})),
        "runs": f"{len(runs)} runs of {len(seeds)} arms, "
        f"{int((runs['status'] == 'done').sum())} finished, "
        f"{int((runs['status'] == 'diverged').sum())} diverged",
        "seeds per arm": _range(seeds),
        "training steps": _range(runs["steps"].dropna()),
        "images seen": _range(runs["images_seen"].dropna()),
        "parameters": _range(runs["parameters"].dropna()),
        "metric": describe_identity(tables, metric) if metric else "nothing was measured",
    }
    rows = {name: text for name, text in facts.items() if text}
    return grid(pd.DataFrame({"this study": rows}))


def _range(values: Iterable[Any]) -> str:
    numbers = sorted({int(value) for value in values})
    if not numbers:
        return ""
    ends = [f"{number:,}".replace(",", "\N{NO-BREAK SPACE}") for number in numbers]
    return ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"


def metric_values(tables: Tables, metric: str | None = None) -> pd.Series:
    """Value of a metric (the leading one by default) by run; runs without one are absent."""
    rows = tables.metrics[tables.metrics["metric"] == (leading_metric(tables, metric) or "")]
    return rows.set_index("run")["value"].dropna()


def final_levels(
    tables: Tables, quantity: str, where: str = "", column: str = "level"
) -> pd.Series:
    """Smoothed level of a logged quantity at the end of training by run, or its ``oscillation``.

    Runs that diverged are absent: they have no end of training.
    """
    rows = tables.oscillation
    rows = rows[(rows["quantity"] == quantity) & (rows["where"] == where)]
    done = set(tables.runs.loc[tables.runs["status"] == "done", "run"])
    return rows[rows["run"].isin(done)].set_index("run")[column].dropna()


def pairs(
    tables: Tables, values: Mapping[str, float], column: str, first: str, second: str
) -> pd.DataFrame:
    """Pairs of runs that differ in ``column`` (``first`` against ``second``) and in nothing else.

    ``values`` maps runs to numbers. Each row holds what the pair shares, both numbers, their
    ``difference`` (first minus second) and ``log_ratio`` (of first to second).
    """
    shared = [name for name in ("line", "skip_scaling", "target", "formulation") if name != column]
    shared += _SEEDS
    runs = tables.runs.assign(value=tables.runs["run"].map(values)).dropna(subset=["value"])
    sides = [
        runs.loc[runs[column] == side, [*shared, "value"]].rename(columns={"value": side})
        for side in (first, second)
    ]
    both = sides[0].merge(sides[1], on=shared).sort_values(shared, ignore_index=True)
    a, b = both[first].to_numpy(dtype=float), both[second].to_numpy(dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(np.where((a > 0) & (b > 0), a / b, np.nan))
    return both.assign(difference=a - b, log_ratio=ratio)


def without_option(line: str, option: str) -> str:
    """The line of the same backbone without one option: "uvit(skip=False)" gives "uvit"."""
    found = re.search(r"\(([^)]*)\)", line)
    if not found:
        return line
    kept = ", ".join(part for part in found[1].split(", ") if part != option)
    return line.replace(found[0], f"({kept})" if kept else "")


def not_testable(claim: str, why: str) -> Verdict:
    """The verdict of a study that lacks what a claim is about."""
    return Verdict("not testable at this budget", f"{claim}: {why}.")
