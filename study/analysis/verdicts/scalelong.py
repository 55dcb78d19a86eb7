"""Are ScaleLong's claims about stability reproduced?"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from study import published
from study.analysis import style
from study.analysis.display import grid, say
from study.analysis.names import ALL
from study.analysis.statistics import LEVEL, holm, paired
from study.analysis.tables.measures import MEASURES
from study.analysis.tables.read import Tables
from study.analysis.tables.stability import overall
from study.analysis.verdicts.base import CONTRADICTED, REPRODUCED, UNTESTABLE, averaged, pairs
from study.analysis.words import SEEN, ends, factor_words, p_text, visible

HALF = "inv_sqrt2"


@dataclass(frozen=True)
class Finding:
    """What a study says about a published claim, in words for a page."""

    claim: str
    source: str
    word: str  # "reproduced" | "not reproduced" | "not testable at this budget"
    reason: str
    count: str = ""  # where it was shown, in a few words; empty where nothing is judged


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
        first = f"On average over {ends(average['n_backbones'])} backbones: " + ", ".join(
            f"{style.scaling_label(row['skip_scaling'])} {factor_words(row)} "
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
            + visible(seen, f", where {SEEN} by one test alone")
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
