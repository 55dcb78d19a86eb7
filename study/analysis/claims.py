"""What notebooks and report share: published rows, our setting in words, verdicts, answers.

A verdict is computed from pairs of runs that agree in everything but the claimed cause, seeds
included; the judging is :func:`study.analysis.statistics.verdict`.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study import published
from study.analysis import style
from study.analysis.names import ALL
from study.analysis.statistics import LEVEL, Verdict, holm, least_pairs, paired
from study.analysis.tables.measures import MEASURES, Measure
from study.analysis.tables.read import Tables
from study.analysis.tables.stability import BLIND, overall
from study.analysis.words import describe_identity, enumerate_words, p_text

_SEEDS = ["data_seed", "init_seed", "noise_seed"]
HALF = "inv_sqrt2"
CONVERGED = 10_000_000
"""Networks that have seen fewer images are far from converged: the published trainings of these
systems saw 64 million (U-ViT on CIFAR-10) to 200 million (EDM, STF)."""


def show(figure: Figure) -> Any:
    """The figure as a picture for a notebook's output."""
    from IPython.display import Image

    buffer = io.BytesIO()
    with style.look():
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
    metric = tables.leading_metric()
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
        "metric": describe_identity(metric, tables.identity(metric))
        if metric
        else "nothing was measured",
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
    """Value of a metric (the leading one by default) by run; runs without one are absent.

    However a run was measured: :func:`pairs` holds apart what was measured in unlike ways.
    """
    ways = tables.ways(metric or tables.leading_metric())
    rows = tables.metrics[tables.metrics["metric"].isin(ways)]
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
    shared += ["precision", *_SEEDS]
    runs = tables.runs.assign(value=tables.runs["run"].map(values)).dropna(subset=["value"])
    if column == "line":  # else both arms have one sampler and precision
        shared.append("way")
        rows = tables.metrics[tables.metrics["metric"].isin(tables.ways(tables.leading_metric()))]
        ways = rows[rows["identity"] != ""].set_index("run")["identity"]
        runs = runs.assign(way=runs["run"].map(ways).fillna(""))
    sides = [
        runs.loc[runs[column] == side, [*shared, "value"]].rename(columns={"value": side})
        for side in (first, second)
    ]
    both = sides[0].merge(sides[1], on=shared).sort_values(shared, ignore_index=True)
    a, b = both[first].to_numpy(dtype=float), both[second].to_numpy(dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(np.where((a > 0) & (b > 0), a / b, np.nan))
    return both.assign(difference=a - b, log_ratio=ratio)


def averaged(both: pd.DataFrame, column: str, lines: list[str] | None = None) -> pd.Series:
    """Mean of a column of :func:`pairs` over the backbones, in every seed that all of them have.

    Runs that share a seed are not independent, so that a seed is one number. Empty where only one
    backbone has pairs. ``lines``: the backbones that are meant; one that lost all of its pairs
    leaves no mean, for without it the mean would look better.
    """
    table = both.pivot_table(index=_SEEDS, columns="line", values=column)
    table = table if lines is None else table.reindex(columns=lines)
    return table.dropna().mean(axis=1) if table.shape[1] > 1 else pd.Series(dtype=float)


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


# --- which scaling is most stable -----------------------------------------------------------------

REPRODUCED, CONTRADICTED = "reproduced", "not reproduced"
UNTESTABLE = "not testable at this budget"


@dataclass(frozen=True)
class Finding:
    """What a study says about a published claim, in words for a page."""

    claim: str
    source: str
    word: str  # "reproduced" | "not reproduced" | "not testable at this budget"
    reason: str
    count: str = ""  # where it was shown, in a few words; empty where nothing is judged


@dataclass(frozen=True)
class StabilityAnswer:
    """Sentences about the stability of the scaled arms, computed from the tables."""

    summary: list[str]
    backbones: list[tuple[str, str]]
    """(backbone, sentence), in the order of the pictures, all of them together first."""
    findings: list[Finding]
    measures: list[str]
    """Labels of the columns of ``matrix``."""
    matrix: list[tuple[str, list[dict[str, str]]]]
    """(backbone, cells): the most stable scaling of each measure, ``word`` saying how surely;
    the first row is the mean over the backbones, where there are several."""


@dataclass(frozen=True)
class _Cell:
    """One measure on one backbone: every scaled arm against its unscaled arm."""

    line: str
    measure: Measure
    rows: pd.DataFrame  # ordered from the most to the least stable, as seen

    @property
    def tested(self) -> bool:
        return bool(self.rows["p_holm"].notna().any())

    def with_verdict(self, verdict: str) -> pd.DataFrame:
        return self.rows[self.rows["verdict"] == verdict]

    @property
    def best(self) -> pd.Series | None:
        """The arm with the best factor among those shown to be more stable."""
        shown = self.with_verdict("more stable")
        return None if shown.empty else shown.iloc[0]

    def gain(self, row: pd.Series) -> float:
        """How many times more stable the arm is: above 1 on the measure's better side."""
        return 1 / row["factor"] if self.measure.better == "lower" else row["factor"]

    def seen(self, several: bool) -> str:
        """The most stable arm as seen, without a test: a scaling, none of them, or a tie."""
        first = self.rows.iloc[0]
        gain = self.gain(first)
        if math.isclose(gain, 1, rel_tol=1e-9):
            return "a tie with no scaling"
        return _arm_words(first, several) if gain > 1 else "no scaling"


def _cells(rows: pd.DataFrame) -> list[_Cell]:
    """Cells of compared rows, which have a ``line``, by backbone and measure."""
    rows = rows[(rows["against"] == "none") & rows["factor"].notna()]
    answer = []
    for line in style.order_lines(rows["line"]):
        for measure in MEASURES.values():
            here = rows[(rows["line"] == line) & (rows["measure"] == measure.name)]
            if len(here):
                ordered = here.sort_values(
                    ["factor", "skip_scaling", "target"],
                    ascending=[measure.better == "lower", True, True],
                )
                answer.append(_Cell(line, measure, ordered))
    return answer


def stability_answer(tables: Tables) -> StabilityAnswer:
    """Which scaling is most stable, where, by how much, how surely, and what ScaleLong says."""
    mean = overall(tables.stability_pairs)
    cells = _cells(tables.stability)
    several = len({target for cell in cells for target in cell.rows["target"]}) > 1
    by_line: dict[str, list[_Cell]] = {}
    for cell in cells:
        by_line.setdefault(cell.line, []).append(cell)
    rows = {ALL: _cells(mean), **by_line} if len(mean) else by_line
    findings = scalelong_findings(tables) if cells else []
    shown = [m for m in MEASURES.values() if any(cell.measure is m for cell in cells)]
    return StabilityAnswer(
        summary=_stability_summary(tables, cells, by_line, findings, mean),
        backbones=[
            (style.line_label(line), _backbone_sentence(part, several))
            for line, part in rows.items()
            if part
        ],
        findings=findings,
        measures=[measure.label for measure in shown],
        matrix=[
            (
                style.line_label(line),
                [
                    _matrix_cell(
                        next((cell for cell in part if cell.measure is measure), None),
                        several,
                        absent="no test" if line == ALL else "not measured",
                    )
                    for measure in shown
                ],
            )
            for line, part in rows.items()
            if part
        ],
    )


def _matrix_cell(cell: _Cell | None, several: bool, absent: str = "") -> dict[str, str]:
    """The most stable scaling of a measure on a backbone, in few words."""
    if cell is None:
        return {"text": "", "small": absent, "word": "", "worse": ""}
    best, first = cell.best, cell.rows.iloc[0]
    row = first if best is None else best
    worse = ", ".join(
        f"{_arm_words(lost, several)} × {lost['factor']:.3g}"
        for _, lost in cell.with_verdict("less stable").iterrows()
    )
    if best is not None:
        small = f"Holm p {p_text(best['p_holm'])}"
    elif cell.tested:
        small = "not shown" + _visible(cell.rows["detectable_factor"], "; × {} could be seen")
    else:
        small = "no test"
    words = _arm_words(row, several)
    seen = words if best is not None else cell.seen(several)
    return {
        "text": f"{words} ×\N{NO-BREAK SPACE}{row['factor']:.3g}" if seen == words else seen,
        "small": small,
        "word": "" if best is None else "better",
        "worse": f"less stable: {worse}" if worse else "",
    }


def _arm_words(row: pd.Series, several_targets: bool) -> str:
    words = style.scaling_label(row["skip_scaling"])
    words += f", {style.target_label(row['target'])}" if several_targets else ""
    # Elsewhere the backbone's label tells them apart.
    return f"{words} ({row['setting']})" if row["line"] == ALL and row["setting"] else words


def _factor_words(row: pd.Series) -> str:
    text = f"× {row['factor']:.3g}"
    if pd.notna(row["factor_low"]):
        text += f" [{row['factor_low']:.3g}, {row['factor_high']:.3g}]"
    return text


_SEEN = "a factor of about {} could have been seen"


def _visible(factors: Iterable[float], words: str) -> str:
    """``words`` with the median of the detectable factors; nothing where none is known."""
    median = pd.Series(factors, dtype=float).median()
    return "" if pd.isna(median) else words.format(f"{median:.3g}")


def _backbone_sentence(cells: list[_Cell], several: bool) -> str:
    """One backbone: what was shown, what was not and could have been, what got worse."""
    shown, unseen, untested, worse = [], [], [], []
    for cell in cells:
        best = cell.best
        first = cell.rows.iloc[0]
        if best is not None:
            shown.append(
                f"{cell.measure.label} most stable with {_arm_words(best, several)}: "
                f"{_factor_words(best)}, Holm p {p_text(best['p_holm'])} ({best['n_pairs']} pairs)"
            )
        elif cell.tested:
            unseen.append(
                f"{cell.measure.label} (seen best: {cell.seen(several)}; best scaling "
                f"{_arm_words(first, several)}, × {first['factor']:.3g}"
                + (f", Holm p {p_text(first['p_holm'])}" if pd.notna(first["p_holm"]) else "")
                + _visible(cell.rows["detectable_factor"], f"; {_SEEN}")
                + ")"
            )
        else:
            untested.append(
                f"{cell.measure.label} (seen best: {cell.seen(several)}"
                + (f", × {first['factor']:.3g})" if cell.gain(first) > 1 else ")")
            )
        lost = cell.with_verdict("less stable")
        worse += [
            f"{cell.measure.label} with {_arm_words(row, several)} ({_factor_words(row)}, "
            f"Holm p {p_text(row['p_holm'])})"
            for _, row in lost.iterrows()
        ]
    parts = ["; ".join(shown)] if shown else []
    parts += [f"no scaling is shown to be more stable in {'; '.join(unseen)}"] if unseen else []
    parts += [f"less stable than no scaling: {'; '.join(worse)}"] if worse else []
    parts += [f"without a test: {'; '.join(untested)}"] if untested else []
    text = ". ".join(part[0].upper() + part[1:] for part in parts)
    return f"{text}."


def _stability_summary(
    tables: Tables,
    cells: list[_Cell],
    by_line: dict[str, list[_Cell]],
    findings: list[Finding],
    mean: pd.DataFrame,
) -> list[str]:
    if not cells:
        if tables.stability.empty:
            return []
        none = (
            "No scaled arm stands beside its unscaled arm here: this study tells no scalings apart."
        )
        return [none, *_target_sentences(tables, mean), _divergence_sentence(tables)]
    tested = [cell for cell in cells if cell.tested]
    answer = _overall_sentence(mean[mean["against"] == "none"])
    if tested:
        shown = [
            (cell, row) for cell in tested for _, row in cell.with_verdict("more stable").iterrows()
        ]
        places = {(cell.line, cell.measure.name) for cell, _ in shown}
        text = (
            f"Backbone by backbone: in {len(places)} of {len(tested)} combinations of backbone and "
            "measure some scaling is shown to be more stable than no scaling"
        )
        if shown:
            names = [style.scaling_label(row["skip_scaling"]) for _, row in shown]
            gains = sorted(cell.gain(row) for cell, row in shown)
            counts = [f"{label} in {n}" for label, n in _ranked(pd.Series(names))]
            text += f" ({enumerate_words(counts)}), " + (
                f"by a factor of {gains[0]:.3g}"
                if len(gains) == 1
                else f"by factors from {gains[0]:.3g} to {gains[-1]:.3g}"
            )
        text += (
            f"; were there no effect at all, {(1 - LEVEL) * len(tested):.2g} combinations would "
            "still be expected to show a difference, one way or the other"
        )
        answer.append(f"{text}.")
        where = [
            f"{style.line_label(line)} ({sum(c.best is not None for c in part)} of "
            f"{sum(c.tested for c in part)} measures)"
            for line, part in by_line.items()
            if any(cell.tested for cell in part)
        ]
        answer.append(f"By backbone: {', '.join(where)}.")
        lost = [
            (cell, row) for cell in tested for _, row in cell.with_verdict("less stable").iterrows()
        ]
        if lost:
            places = {(cell.line, cell.measure.name) for cell, _ in lost}
            counts = _ranked(
                pd.Series([style.scaling_label(row["skip_scaling"]) for _, row in lost])
            )
            answer.append(
                f"In {len(places)} of {len(tested)} combinations some scaling is shown to be less "
                "stable than no scaling: "
                f"{enumerate_words(f'{label} in {n}' for label, n in counts)}."
            )
        else:
            answer.append("On no backbone alone is a scaling shown to be less stable than none.")
        counted = _ends(n for cell in tested for n in cell.rows["n_pairs"])
        rates = [cell.tested for cell in cells if cell.measure.test == "sign"]
        answer.append(
            "How sure: paired t-tests of log ratios"
            + (" (the largest learning rate: sign tests)" if any(rates) else "")
            + f" over {counted} pairs of runs with equal "
            "seeds, Holm-corrected over the tests of one measure on one backbone, 5 %."
            + _visible(
                pd.concat([cell.rows["detectable_factor"] for cell in tested]),
                " Where nothing is shown, a true factor below about {} would mostly have gone "
                "unseen (median over all tests, before Holm's correction).",
            )
            + (
                " The largest learning rate is not tested: a sign test needs "
                f"{least_pairs()} unequal pairs."
                if rates and not any(rates)
                else ""
            )
        )
    else:
        seen = [cell.seen(several=False) for cell in cells]
        counts = [f"{label} in {n}" for label, n in _ranked(pd.Series(seen))]
        answer.append(
            "No test of stability is possible with these pairs of runs. As seen, "
            f"without a test, the most stable one in {len(cells)} combinations of backbone and "
            f"measure is {enumerate_words(counts)}."
        )
    answer += _target_sentences(tables, mean)
    answer.append(_divergence_sentence(tables))
    return [*answer, f"Does it agree with ScaleLong? {_agreement(findings)}"]


def _overall_sentence(rows: pd.DataFrame) -> list[str]:
    """What is shown on average over the backbones; nothing where that cannot be tested."""
    tested = rows[rows["p_holm"].notna()]
    if tested.empty:
        return []
    several = tested["target"].nunique() > 1
    parts = []
    for verdict in ("more stable", "less stable"):
        words = []
        for name, here in tested[tested["verdict"] == verdict].groupby("measure", sort=False):
            better = MEASURES[name].better == "lower"
            here = here.sort_values("factor", ascending=better == (verdict == "more stable"))
            arms = (
                f"{_arm_words(row, several).replace('none', 'no scaling')} {_factor_words(row)}, "
                f"Holm p {p_text(row['p_holm'])}"
                for _, row in here.iterrows()
            )
            words.append(f"{MEASURES[name].label} ({'; '.join(arms)})")
        parts.append(f"{verdict} in {enumerate_words(words) if words else 'nothing'}")
    silent = int((tested["verdict"] == "no difference shown").sum())
    lost = rows[rows["p_holm"].isna()]
    names = dict.fromkeys(_arm_words(row, several) for _, row in lost.iterrows())
    without = f" Without a test on average: {', '.join(names)} (pairs were lost)." if names else ""
    return [
        f"On average over {_ends(tested['n_backbones'])} backbones (geometric mean in each of "
        f"{_ends(tested['n_pairs'])} seeds, Holm's correction over the arms of a measure, 5 %): "
        f"{'; '.join(parts)}; no difference shown in {silent} of {len(tested)} tests.{without}"
    ]


def _ends(counts: Iterable[float]) -> str:
    """ "3", or "2 to 3"."""
    numbers = sorted({int(count) for count in counts})
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _agreement(findings: list[Finding]) -> str:
    """How many claims were reproduced and how many not, and which."""
    counts = pd.Series([finding.word for finding in findings]).value_counts()
    words = [f"{counts.get(word, 0)} {word}" for word in (REPRODUCED, CONTRADICTED, UNTESTABLE)]
    text = f"Of {len(findings)} claims {enumerate_words(words)}."
    for word in (REPRODUCED, CONTRADICTED):
        named = [f"{one.claim} ({one.count})" for one in findings if one.word == word]
        text += f" {word.capitalize()}: {'; '.join(named)}." if named else ""
    return text


def _target_sentences(tables: Tables, mean: pd.DataFrame) -> list[str]:
    """What stable targets do to the same measures, where the study has them."""
    rows = tables.stability
    rows = rows[(rows["against"] == "dsm") & rows["factor"].notna()]
    if rows.empty:
        return []
    intro = "STF against DSM at the same backbone and scaling"
    judged = rows[rows["arm"].isin(unconditional(tables).runs["arm"])]
    if judged.empty:
        return [f"{intro}: {BLIND}."]
    rows = judged
    average = _overall_sentence(mean[mean["against"] == "dsm"])
    average = [f"STF against DSM: {text[0].lower()}{text[1:]}" for text in average]
    tested = rows[rows["p_holm"].notna()]
    if tested.empty:
        lower = rows["better"] == "lower"
        steadier = int(((rows["factor"] < 1) == lower)[rows["factor"] != 1].sum())
        return [
            f"{intro}: no test is possible; as seen, {steadier} of {len(rows)} factors are on the "
            "more stable side."
        ]
    parts = []
    for verdict in ("more stable", "less stable"):
        here = tested[tested["verdict"] == verdict]
        counts = [f"{MEASURES[name].label} {n}" for name, n in _ranked(here["measure"])]
        parts.append(f"{verdict} in {len(here)}" + (f" ({', '.join(counts)})" if counts else ""))
    text = f"{intro}: of {len(tested)} tests {', '.join(parts)}, no difference shown in the rest."
    return [*average, text]


def _ranked(values: pd.Series) -> list[tuple[str, int]]:
    """Values by how often they occur, most often first, equals by name."""
    counts = values.value_counts()
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _divergence_sentence(tables: Tables) -> str:
    runs = tables.runs[tables.runs["status"].isin(["done", "diverged"])]
    lost = runs["status"] == "diverged"
    if not lost.any():
        return (
            f"None of the {len(runs)} training runs that ended diverged, so divergence tells no "
            "arms apart at this learning rate and length."
        )
    counts = [
        f"{style.scaling_label(scaling)} {int(lost[here].sum())} of {int(here.sum())}"
        for scaling in style.order_scalings(runs["skip_scaling"])
        for here in [runs["skip_scaling"] == scaling]
    ]
    rows = tables.stability
    rows = rows[(rows["measure"] == "diverged") & (rows["against"] == "none")]
    shown = int(rows["verdict"].isin(["more stable", "less stable"]).sum())
    tests = int(rows["p_holm"].notna().sum())
    judged = (
        f"{shown} of {tests} arms that Fisher's exact test could judge differ from the unscaled arm"
        if tests
        else "too few runs for a test"
    )
    return (
        f"Training runs that diverged, by scaling: {', '.join(counts)}; {judged}. All other "
        "measures hold the runs that finished."
    )


def scalelong_findings(tables: Tables) -> list[Finding]:
    """ScaleLong's claims about stability, judged on the DSM arms over all backbones at once.

    The mean over the backbones decides (``study.analysis.tables.stability.overall``): a claim is
    shown on average where at least one scaling differs on the claimed side after Holm's correction
    over the scalings (the claim about the order: where all CS and LS arms do). Backbones alone can
    take that away: there Holm's correction spans all backbones and scalings of the claim, and the
    claim or its opposite is shown on a backbone where one scaling then differs. The claim is

    - reproduced: shown on average, the opposite neither on average nor on any backbone;
    - not reproduced: only the opposite shown on average, or on more backbones than the claim;
    - not testable at this budget: everything else.

    Where no mean can be tested, say because there are not two seeds in which every backbone has
    its pair, the claim must be shown on at least half of the backbones that can be tested.
    """
    figure = "ScaleLong, figure 1"
    claims = [
        ("scaled long skips keep the decoder's features smaller", figure, "feature_norm"),
        ("scaled long skips make features oscillate less", figure, "oscillation_feature_norm"),
        (
            "scaled long skips make gradients oscillate less",
            "ScaleLong, abstract",
            "oscillation_grad_norm",
        ),
        (
            "scaled long skips make the loss oscillate less",
            "ScaleLong, abstract",
            "oscillation_loss",
        ),
        (
            "scaled long skips make the noise prediction less sensitive to its input",
            "ScaleLong, abstract",
            "robustness_gain",
        ),
    ]
    rows = tables.stability
    rows = rows[(rows["against"] == "none") & rows["factor"].notna()]
    mean = overall(tables.stability_pairs)
    mean = mean[mean["against"] == "none"]
    if (rows["target"] == "dsm").any():
        rows, mean = rows[rows["target"] == "dsm"], mean[mean["target"] == "dsm"]
    answer = []
    for claim, source, measure in claims:
        here = rows[rows["measure"] == measure]
        if here.empty:
            reason = f"this study has no measure of the {MEASURES[measure].label}"
            answer.append(Finding(claim, source, UNTESTABLE, f"{reason}."))
            continue
        average = mean[mean["measure"] == measure]
        word, count, reason = _judge(_sides(here), _sides(average))
        seen = int((here["factor"] < 1).sum())
        reason += (
            f" Seen, tested or not: a factor below 1 in {seen} of {len(here)} scaled arms, "
            f"median × {here['factor'].median():.3g}."
        )
        answer.append(Finding(claim, source, word, reason + _published_factors(measure), count))
    answer.append(_order_finding(tables))
    answer.append(
        Finding(
            "training is about 1.5 times faster",
            "ScaleLong, abstract",
            UNTESTABLE,
            "quality is measured once, at the end of training, so no time to a given quality is "
            "known.",
        )
    )
    return answer


def _sides(rows: pd.DataFrame) -> pd.DataFrame:
    """Compared rows as tests of a claim that factors are below 1."""
    factors = rows["factor"].astype(float)
    return rows.assign(side=np.log(factors), detectable=rows["detectable_factor"])


def _judge(tests: pd.DataFrame, average: pd.DataFrame, every: bool = False) -> tuple[str, str, str]:
    """The word for a claim, where it was shown, and its reason, by the rule above.

    ``tests`` has a row per tested arm: ``line``, ``p_value``, ``side`` (below zero: as claimed) and
    ``detectable`` (a factor). ``average`` has a row per scaling over all backbones: ``p_value``,
    ``side``, ``skip_scaling``, ``n_backbones``, ``factor`` with its ends; it is empty for a single
    backbone. ``every``: all arms must be on the claimed side.
    """
    tests, average = _corrected(tests), _corrected(average)
    shown, opposite, silent, untested = [], [], [], []
    for line in style.order_lines(tests["line"]):
        here = tests[tests["line"] == line]
        name = style.line_label(line)
        holds = _holds(here, every)
        if here["p"].isna().all():
            untested.append(name)
        elif not holds and not here["fails"].any():
            silent.append(name)
        shown += [name] if holds else []
        opposite += [name] if here["fails"].any() else []
    total = tests["line"].nunique()
    tested = total - len(untested)
    if known := bool(average["p"].notna().any()):
        agrees, denied = _holds(average, every), bool(average["fails"].any())
    else:
        agrees, denied = bool(shown) and 2 * len(shown) >= tested, False
    if agrees and not denied and not opposite:
        word = REPRODUCED
    elif not (known and agrees) and (denied or len(opposite) > len(shown)):
        word = CONTRADICTED
    else:
        word = UNTESTABLE

    def named(names: list[str]) -> str:
        return f" ({', '.join(names)})" if 0 < len(names) < total else ""

    backbones = "backbone" if tested == 1 else "backbones"
    count = f"shown on {len(shown)} of {tested} {backbones}, the opposite on {len(opposite)}"
    first = ""
    if known:
        side = {
            (True, False): "shown",
            (True, True): "shown for one scaling and the opposite for another",
            (False, True): "the opposite shown",
            (False, False): "not shown",
        }[agrees, denied]
        count = f"{side} on average; alone {count}"
        first = f"On average over {_ends(average['n_backbones'])} backbones: " + ", ".join(
            f"{style.scaling_label(row['skip_scaling'])} {_factor_words(row)} "
            f"(Holm p {p_text(row['p'])})"
            for _, row in average[average["p"].notna()].iterrows()
        )
        first += ". Backbone by backbone: "
    if not tested:
        return word, "no test is possible", "No test is possible on any backbone."
    parts = [
        f"{'holds' if known else 'Holds'} on {len(shown)} of {tested} {backbones} that could be "
        f"tested{named(shown)}",
        f"the opposite on {len(opposite)}{named(opposite)}",
    ]
    if silent:
        seen = tests.loc[tests["line"].map(style.line_label).isin(silent), "detectable"]
        parts.append(
            f"no difference shown on {len(silent)}"
            + _visible(seen, f", where {_SEEN} by one test alone")
        )
    parts += [f"no test is possible on {len(untested)}{named(untested)}"] if untested else []
    scope = f"Holm's correction over {int(tests['p'].notna().sum())} tests"
    return word, count, f"{first}{'; '.join(parts)} ({scope})."


def _corrected(tests: pd.DataFrame) -> pd.DataFrame:
    """Tests with Holm's p over all of them, and whether each is sure on one of the sides."""
    tests = tests.assign(p=holm(tests["p_value"]))
    sure = tests["p"] < 1 - LEVEL
    return tests.assign(holds=sure & (tests["side"] < 0), fails=sure & (tests["side"] > 0))


def _holds(tests: pd.DataFrame, every: bool) -> bool:
    return bool(len(tests) and (tests["holds"].all() if every else tests["holds"].any()))


def _published_factors(measure: str) -> str:
    """The paper's own factors for a measure, if its figure can be read."""
    if measure != "feature_norm":
        return ""
    texts = []
    for depth in ("12", "16"):
        levels = {
            number.method: number.number
            for number in published.numbers(paper="ScaleLong", table_or_figure="Fig 1")
            if number.setting == "28K iters" and number.model.endswith(f"depth={depth}")
        }
        plain = levels.pop("Org", None)
        if plain:
            factors = [f"{method} × {level / plain:.2f}" for method, level in levels.items()]
            texts.append(f"depth {depth}: {', '.join(factors)}")
    return f" Read off the paper's figure: {'; '.join(texts)}." if texts else ""


def _order_finding(tables: Tables) -> Finding:
    """Whether constant and learned scaling keep features smaller than 1/√2 does."""
    claim = "CS and LS keep the decoder's features smaller than 1/√2 does"
    rows = tables.measures
    values = rows[rows["measure"] == "feature_norm"].set_index("run")["value"].dropna()
    runs = tables.runs
    if (runs["target"] == "dsm").any():
        runs = runs[runs["target"] == "dsm"]
    tests = []
    ratios: dict[str, dict[str, pd.DataFrame]] = {}
    for line, part in runs.groupby("line"):
        scalings = style.order_scalings(part["skip_scaling"])
        if HALF not in scalings:
            continue
        for scaling in scalings:
            if style.method(scaling) in ("cs", "ls", "ls_unshared"):
                both = pairs(replace(tables, runs=part), values, "skip_scaling", scaling, HALF)
                ratios.setdefault(scaling, {})[line] = both
                tests.append({"line": line, **_side(both["log_ratio"].dropna())})
    source = "ScaleLong, figure 1"
    if not tests:
        return Finding(claim, source, UNTESTABLE, "no backbone has both kinds of arm.")
    average = [
        {
            "skip_scaling": scaling,
            "n_backbones": len(parts),
            **_side(averaged(pd.concat(parts.values()), "log_ratio", list(parts))),
        }
        for scaling, parts in ratios.items()
        if len(parts) > 1
    ]
    columns = ["skip_scaling", "n_backbones", *_side(pd.Series(dtype=float))]
    word, count, reason = _judge(
        pd.DataFrame(tests), pd.DataFrame(average, columns=columns), every=True
    )
    above = sum(test["side"] > 0 for test in tests)
    reason += (
        f" Seen, tested or not: a factor above 1 in {above} of {len(tests)} arms. The claim needs "
        "every CS and LS arm. The norm is that of the block with the outermost long skip, which "
        "constant scaling leaves at factor 1, so that few long skips disfavour CS here."
    )
    return Finding(claim, source, word, reason, count)


def _side(logs: pd.Series) -> dict[str, float]:
    """A test of a mean log ratio, for :func:`_judge`."""
    result = paired(logs)
    ends = {"factor": result.mean, "factor_low": result.low, "factor_high": result.high}
    return {
        "p_value": result.p,
        "side": result.mean,
        **{name: float(np.exp(value)) for name, value in ends.items()},
        "detectable": float(np.exp(result.detectable)),
    }


def findings_table(tables: Tables) -> Any:
    """:func:`scalelong_findings` as a table."""
    rows = [
        {"claim": one.claim, "source": one.source, "here": one.word, "why": one.reason}
        for one in scalelong_findings(tables)
    ]
    return grid(pd.DataFrame(rows), index=False)


def factor_table(tables: Tables, measure: str) -> Any:
    """Factors of one measure against the unscaled arm, with intervals, Holm's p and verdicts.

    Over all backbones first, where there are several.
    """
    rows = pd.concat([overall(tables.stability_pairs), tables.stability])
    rows = rows[(rows["measure"] == measure) & (rows["against"] == "none")]
    lines = [
        {
            "backbone": style.line_label(line),
            "skip scaling": style.scaling_label(scaling),
            "target": style.target_label(row["target"]),
            "factor": "" if pd.isna(row["factor"]) else f"{row['factor']:.3g}",
            "95 % interval": ""
            if pd.isna(row["factor_low"])
            else f"[{row['factor_low']:.3g}, {row['factor_high']:.3g}]",
            "pairs": row["n_pairs"],
            "Holm p": p_text(row["p_holm"]),
            "verdict": row["verdict"],
            "remark": row["note"],
        }
        for line in sorted(style.order_lines(rows["line"]), key=lambda line: line != ALL)
        for scaling in style.order_scalings(rows["skip_scaling"])
        for _, row in rows[(rows["line"] == line) & (rows["skip_scaling"] == scaling)].iterrows()
    ]
    return grid(pd.DataFrame(lines), index=False) if lines else say("*Not measured.*")


# --- what a stable target means for a network that knows the class --------------------------------


def unconditional(tables: Tables) -> Tables:
    """The tables of the arms that are told no class, on which targets can be compared."""
    return tables.only(conditional="false")


def label_bias(tables: Tables) -> str | None:
    """The sentence about stable targets and labels, where a study trains such arms."""
    runs = tables.runs
    both = runs[(runs["target_kind"] == "stf") & (runs["conditional"] == "true")]
    if both.empty:
        return None
    arms = both["arm"].nunique()
    return (
        f"{arms} arm{' is' if arms == 1 else 's are'} class-conditional and trained on stable "
        "targets: the published stable target averages over a reference batch without regard to "
        "labels, so it aims at the mean clean image given the noisy one, not given its class as "
        "well, and is biased for a class-conditional network; a difference between STF and DSM "
        "there mixes that bias with the lower variance, so that it is shown and not judged."
    )
