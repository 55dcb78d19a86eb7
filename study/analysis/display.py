"""What the cells of notebooks show: pictures, sentences and tables."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from study import published
from study.analysis import style
from study.analysis.tables.read import Tables
from study.analysis.words import dataset_notes, describe_identity


def show(figure: Figure) -> Any:
    """The figure as a picture for a notebook's output."""
    from IPython.display import Image

    with style.look():
        data = style.pixels(figure)
    width = round(figure.get_size_inches()[0] * 130)
    return Image(data=data, width=width, alt=figure.get_label())


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


def setting(tables: Tables) -> Any:
    """What this study is, for comparison with a paper's setting."""
    runs = tables.runs
    seeds = runs.groupby("arm")["run"].count()
    leading = [part.leading_metric() for part in tables.by_dataset().values()]
    metrics = [metric for metric in dict.fromkeys(leading) if metric]
    facts = {
        "data set": ", ".join(sorted(set(runs["dataset"]))),
        "about it": " ".join(dataset_notes(runs)),
        "runs": f"{len(runs)} runs of {len(seeds)} arms, "
        f"{int((runs['status'] == 'done').sum())} finished, "
        f"{int((runs['status'] == 'diverged').sum())} diverged",
        "seeds per arm": _range(seeds),
        "training steps": _range(runs["steps"].dropna()),
        "images seen": _range(runs["images_seen"].dropna()),
        "parameters": _range(runs["parameters"].dropna()),
        "metric": "; ".join(describe_identity(one, tables.identity(one)) for one in metrics)
        or "nothing was measured",
    }
    rows = {name: text for name, text in facts.items() if text}
    return grid(pd.DataFrame({"this study": rows}))


def _range(values: Iterable[Any]) -> str:
    numbers = sorted({int(value) for value in values})
    if not numbers:
        return ""
    ends = [f"{number:,}".replace(",", "\N{NO-BREAK SPACE}") for number in numbers]
    return ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"
