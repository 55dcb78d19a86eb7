"""Are backbones better with long skips, and what do these do to the features?"""

from typing import Any

import numpy as np
import pandas as pd

from study.analysis import style
from study.analysis.display import grid, say
from study.analysis.names import better
from study.analysis.tables.read import Tables
from study.analysis.verdicts.base import (
    Verdict,
    jointly,
    metric_values,
    pairs,
    verdict,
    without_option,
)


def long_skips(tables: Tables) -> list[Verdict]:
    """Whether a backbone is better with long skips than its twin with ``skip: false``.

    On the unscaled DSM arms, by the leading metric of each data set, with Holm's correction over
    all backbones that have such a twin.
    """
    answers = []
    unscaled = tables.only(skip_scaling="none", target_kind="dsm")
    for plain in unscaled.by_dataset().values():
        metric = plain.leading_metric()
        lines = style.order_lines(plain.runs["line"])
        for line in lines:
            twin = without_option(line, "skip=False")
            if metric is None or twin == line or twin not in lines:
                continue
            both = pairs(plain, metric_values(plain, metric), "line", twin, line)
            claim = f"{style.line_label(twin)} has a better {metric} with long skips than without"
            found = verdict(both["difference"], claim, positive=better(metric) == "higher")
            answers.append(({"backbone": twin}, found))
    return [found for _, found in jointly(answers)]


def antidiagonal(tables: Tables) -> pd.DataFrame:
    """How much blocks resemble their mirror image, beyond what their distance explains.

    One row for each run, and for each ``part`` of a split network. ``contrast`` is the mean CKA of
    pairs (k, L - 1 - k) minus the mean of all pairs equally far apart, over noise levels in
    training's proportions; pairs closer than two blocks are left out.
    """
    frame = tables.probe("representation")
    if frame.empty:
        return frame
    frame = frame[(frame["quantity"] == "cka") & frame["sigma"].isna()]
    rows = []
    words = ["run", "line", "skip_scaling", "target", "seed", "part"]
    for key, group in frame.groupby(words):
        wide = group.pivot(index="position", columns="other_position", values="value")
        matrix = wide.to_numpy(dtype=float)
        size = len(matrix)
        contrasts = []
        for k in range(size // 2):
            gap = size - 1 - 2 * k
            if gap >= 2:
                contrasts.append(matrix[k, size - 1 - k] - np.diagonal(matrix, gap).mean())
        # The outermost pair is the only one at its distance and has nothing to be compared with.
        contrasts = contrasts[1:]
        if contrasts:
            rows.append({**dict(zip(words, key, strict=True)), "contrast": np.mean(contrasts)})
    return pd.DataFrame(rows, columns=[*words, "contrast"])


def mirror_summary(tables: Tables) -> list[str]:
    """:func:`antidiagonal` of the DSM arms in a sentence for every backbone."""
    found = antidiagonal(tables)
    found = found[found["target"] == "dsm"] if len(found) else found
    answer = []
    for line in style.order_lines(found["line"]) if len(found) else []:
        means = found[found["line"] == line].groupby("skip_scaling")["contrast"].mean()
        words = (
            f"{style.scaling_label(scaling)} {means[scaling]:+.3f}"
            for scaling in style.order_scalings(means.index)
        )
        answer.append(f"{style.line_label(line)}: {', '.join(words)}.")
    return answer


def mirror_table(tables: Tables) -> Any:
    """:func:`antidiagonal` as a table."""
    found = antidiagonal(tables)
    if found.empty:
        return say("*No map, no contrast.*")
    ranked = found.assign(
        line=pd.Categorical(found["line"], style.order_lines(found["line"])),
        skip_scaling=pd.Categorical(
            found["skip_scaling"], style.order_scalings(found["skip_scaling"])
        ),
    )
    found = found.loc[ranked.sort_values(["line", "skip_scaling", "target", "seed", "part"]).index]
    shown = pd.DataFrame(
        {
            "backbone": found["line"].map(style.line_label),
            "skip scaling": found["skip_scaling"].map(style.scaling_label),
            "target": found["target"].map(style.target_label),
            "seed": found["seed"],
            "part": found["part"],
            "contrast": found["contrast"].map("{:+.3f}".format),
        }
    )
    return grid(shown if shown["part"].any() else shown.drop(columns="part"), index=False)


def low_frequencies(tables: Tables, share: float = 0.5) -> pd.DataFrame:
    """How far the amplitude of features falls from low to high frequencies, by run, σ and block.

    ``drop`` is the mean log10 amplitude above ``share`` of the Nyquist frequency minus that below,
    ``image`` the same of the noisy image that the network sees.
    """
    frame = tables.probe("representation")
    if frame.empty:
        return frame
    frame = frame[(frame["quantity"] == "spectrum") & (frame["frequency"] > 0)]
    fixed = ["run", "line", "skip_scaling", "target", "seed", "part", "sigma"]
    words = [*fixed, "block", "position"]
    high = frame[frame["frequency"] > share].groupby(words)["value"].mean()
    low = frame[frame["frequency"] <= share].groupby(words)["value"].mean()
    found = (high - low).dropna().rename("drop").reset_index()
    # The noisy image itself stands among the blocks, before the first.
    image = found[found["position"] < 0].set_index(fixed)["drop"].rename("image")
    return found[found["position"] >= 0].join(image, on=fixed).reset_index(drop=True)


def spectra_table(tables: Tables) -> Any:
    """:func:`low_frequencies` of the unscaled DSM arms by σ: mean and range over blocks."""
    found = low_frequencies(tables)
    if len(found):
        found = found[(found["skip_scaling"] == "none") & (found["target"] == "dsm")]
    if found.empty:
        return say("*No spectra.*")
    lines = style.order_lines(found["line"])
    columns = {}
    for sigma, group in found.groupby("sigma"):
        ends = group.groupby("line")["drop"].agg(["mean", "min", "max"])
        words = {
            style.line_label(line): f"{one['mean']:+.2f} ({one['min']:+.2f} to {one['max']:+.2f})"
            for line, one in ends.reindex(lines).dropna().iterrows()
        }
        columns[f"σ = {sigma:g}"] = {**words, "the noisy image": f"{group['image'].mean():+.2f}"}
    return grid(pd.DataFrame(columns).fillna(""))
