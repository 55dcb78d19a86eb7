"""Which scaling is most stable, where, by how much, and how surely?"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from study.analysis import style
from study.analysis.names import ALL
from study.analysis.statistics import LEVEL, least_pairs
from study.analysis.tables.measures import MEASURES, Measure
from study.analysis.tables.read import Tables
from study.analysis.tables.stability import BLIND, overall
from study.analysis.verdicts.base import CONTRADICTED, REPRODUCED, UNTESTABLE, unconditional
from study.analysis.verdicts.scalelong import Finding, scalelong_findings
from study.analysis.words import SEEN, ends, enumerate_words, factor_words, p_text, visible


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
        return arm_words(first, several) if gain > 1 else "no scaling"


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
        f"{arm_words(lost, several)} × {lost['factor']:.3g}"
        for _, lost in cell.with_verdict("less stable").iterrows()
    )
    if best is not None:
        small = f"Holm p {p_text(best['p_holm'])}"
    elif cell.tested:
        small = "not shown" + visible(cell.rows["detectable_factor"], "; × {} could be seen")
    else:
        small = "no test"
    words = arm_words(row, several)
    seen = words if best is not None else cell.seen(several)
    return {
        "text": f"{words} ×\N{NO-BREAK SPACE}{row['factor']:.3g}" if seen == words else seen,
        "small": small,
        "word": "" if best is None else "better",
        "worse": f"less stable: {worse}" if worse else "",
    }


def arm_words(row: pd.Series, several_targets: bool) -> str:
    words = style.scaling_label(row["skip_scaling"])
    words += f", {style.target_label(row['target'])}" if several_targets else ""
    # Elsewhere the backbone's label tells them apart.
    return f"{words} ({row['setting']})" if row["line"] == ALL and row["setting"] else words


def _backbone_sentence(cells: list[_Cell], several: bool) -> str:
    """One backbone: what was shown, what was not and could have been, what got worse."""
    shown, unseen, untested, worse = [], [], [], []
    for cell in cells:
        best = cell.best
        first = cell.rows.iloc[0]
        if best is not None:
            shown.append(
                f"{cell.measure.label} most stable with {arm_words(best, several)}: "
                f"{factor_words(best)}, Holm p {p_text(best['p_holm'])} ({best['n_pairs']} pairs)"
            )
        elif cell.tested:
            unseen.append(
                f"{cell.measure.label} (seen best: {cell.seen(several)}; best scaling "
                f"{arm_words(first, several)}, × {first['factor']:.3g}"
                + (f", Holm p {p_text(first['p_holm'])}" if pd.notna(first["p_holm"]) else "")
                + visible(cell.rows["detectable_factor"], f"; {SEEN}")
                + ")"
            )
        else:
            untested.append(
                f"{cell.measure.label} (seen best: {cell.seen(several)}"
                + (f", × {first['factor']:.3g})" if cell.gain(first) > 1 else ")")
            )
        lost = cell.with_verdict("less stable")
        worse += [
            f"{cell.measure.label} with {arm_words(row, several)} ({factor_words(row)}, "
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
    if tables.stability.empty and not cells:
        return []
    others = [*_target_sentences(tables, mean), _divergence_sentence(tables)]
    if not cells:
        none = (
            "No scaled arm stands beside its unscaled arm here: this study tells no scalings apart."
        )
        return [none, *others]
    tested = [cell for cell in cells if cell.tested]
    if tested:
        said = [*_shown_sentences(tested, by_line), _how_sure(tested, cells)]
    else:
        counts = _counted(cell.seen(several=False) for cell in cells)
        said = [
            "No test of stability is possible with these pairs of runs. As seen, without a test, "
            f"the most stable one in {len(cells)} combinations of backbone and measure is {counts}."
        ]
    agreement = f"Does it agree with ScaleLong? {_agreement(findings)}"
    return [*_overall_sentence(mean[mean["against"] == "none"]), *said, *others, agreement]


def _shown_sentences(tested: list[_Cell], by_line: dict[str, list[_Cell]]) -> list[str]:
    """In how many combinations of backbone and measure a scaling is more stable, or less."""

    def found(verdict: str) -> tuple[list[tuple[_Cell, pd.Series]], int, str]:
        rows = [(cell, row) for cell in tested for _, row in cell.with_verdict(verdict).iterrows()]
        names = (style.scaling_label(row["skip_scaling"]) for _, row in rows)
        return rows, len({(cell.line, cell.measure.name) for cell, _ in rows}), _counted(names)

    shown, places, counts = found("more stable")
    text = (
        f"Backbone by backbone: in {places} of {len(tested)} combinations of backbone and measure "
        "some scaling is shown to be more stable than no scaling"
    )
    if shown:
        gains = sorted(cell.gain(row) for cell, row in shown)
        text += f" ({counts}), " + (
            f"by a factor of {gains[0]:.3g}"
            if len(gains) == 1
            else f"by factors from {gains[0]:.3g} to {gains[-1]:.3g}"
        )
    text += (
        f"; were there no effect at all, {(1 - LEVEL) * len(tested):.2g} combinations would still "
        "be expected to show a difference, one way or the other."
    )
    where = [
        f"{style.line_label(line)} ({sum(c.best is not None for c in part)} of "
        f"{sum(c.tested for c in part)} measures)"
        for line, part in by_line.items()
        if any(cell.tested for cell in part)
    ]
    lost, places, counts = found("less stable")
    worse = "On no backbone alone is a scaling shown to be less stable than none."
    if lost:
        worse = (
            f"In {places} of {len(tested)} combinations some scaling is shown to be less stable "
            f"than no scaling: {counts}."
        )
    return [text, f"By backbone: {', '.join(where)}.", worse]


def _how_sure(tested: list[_Cell], cells: list[_Cell]) -> str:
    """Which tests stand behind the sentences on single backbones, and what they could see."""
    rates = [cell.tested for cell in cells if cell.measure.test == "sign"]
    text = "How sure: paired t-tests of log ratios"
    text += " (the largest learning rate: sign tests)" if any(rates) else ""
    text += (
        f" over {ends(n for cell in tested for n in cell.rows['n_pairs'])} pairs of runs with "
        "equal seeds, Holm-corrected over the tests of one measure on one backbone, 5 %."
    )
    text += visible(
        pd.concat([cell.rows["detectable_factor"] for cell in tested]),
        " Where nothing is shown, a true factor below about {} would mostly have gone unseen "
        "(median over all tests, before Holm's correction).",
    )
    if rates and not any(rates):
        text += (
            " The largest learning rate is not tested: a sign test needs "
            f"{least_pairs()} unequal pairs."
        )
    return text


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
                f"{arm_words(row, several).replace('none', 'no scaling')} {factor_words(row)}, "
                f"Holm p {p_text(row['p_holm'])}"
                for _, row in here.iterrows()
            )
            words.append(f"{MEASURES[name].label} ({'; '.join(arms)})")
        parts.append(f"{verdict} in {enumerate_words(words) if words else 'nothing'}")
    silent = int((tested["verdict"] == "no difference shown").sum())
    lost = rows[rows["p_holm"].isna()]
    names = dict.fromkeys(arm_words(row, several) for _, row in lost.iterrows())
    without = f" Without a test on average: {', '.join(names)} (pairs were lost)." if names else ""
    return [
        f"On average over {ends(tested['n_backbones'])} backbones (geometric mean in each of "
        f"{ends(tested['n_pairs'])} seeds, Holm's correction over the arms of a measure, 5 %): "
        f"{'; '.join(parts)}; no difference shown in {silent} of {len(tested)} tests.{without}"
    ]


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


def _ranked(values: Iterable[str]) -> list[tuple[str, int]]:
    """Values by how often they occur, most often first, equals by name."""
    return sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))


def _counted(names: Iterable[str]) -> str:
    """ "CS 0.7 in 3 and LS in 2"."""
    return enumerate_words(f"{name} in {n}" for name, n in _ranked(names))


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
