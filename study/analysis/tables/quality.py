"""How good is every arm, and is it better than the unscaled DSM arm?

Rows of ``summary.csv`` and ``comparisons.csv``.
"""

import math
from collections import Counter

import numpy as np

from study.analysis import statistics
from study.analysis.names import ARM, NOT_MEASURED, OTHERWISE, better
from study.analysis.tables.families import correct, groups
from study.analysis.tables.found import without
from study.analysis.tables.stability import BLIND, blind


def summary_rows(metrics: list[dict]) -> list[dict]:
    answer = []
    for (metric, _), rows in sorted(groups(metrics, "metric", "arm").items()):
        values = [row["value"] for row in rows if row["value"] is not None]
        low, high = statistics.bootstrap_interval(values)
        identities = sorted({row["identity"] for row in rows if row["identity"]})
        answer.append(
            {
                **{key: rows[0][key] for key in ARM},
                "metric": metric,
                "identity": " ".join(identities),
                "better": better(metric),
                "n": len(values),
                "mean": float(np.mean(values)) if values else None,
                "standard_deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "min_of_n": min(values, default=None),
                "max_of_n": max(values, default=None),
                "ci_low": low,
                "ci_high": high,
                "n_runs": len(rows),
                "n_diverged": sum(row["status"] == "diverged" for row in rows),
                "n_missing": sum(row["status"] in ("missing", "running") for row in rows),
                "n_not_measured": sum(row["status"] == NOT_MEASURED for row in rows),
                "n_otherwise": sum(row["status"] == OTHERWISE for row in rows),
                "note": "; ".join(
                    dict.fromkeys(
                        row["note"] for row in rows if row["status"] in (NOT_MEASURED, OTHERWISE)
                    )
                ),
            }
        )
    return answer


def comparison_rows(
    specs: dict[str, dict], seeds: dict[str, str], metrics: list[dict]
) -> list[dict]:
    """Every arm against the unscaled DSM arm that equals it in all else, paired by seeds.

    Holm's correction spans the tests that share a metric and a baseline: one backbone's question.
    Class-conditional arms of unlike targets have a difference and no test.
    """
    baselines = {
        without(spec, "seeds", "skip_scaling", "target"): arm
        for arm, spec in sorted(specs.items())
        if spec["skip_scaling"].get("method") == "none" and spec["target"].get("kind") == "dsm"
    }
    by_arm = {
        key: {seeds[row["run"]]: row for row in rows}
        for key, rows in groups(metrics, "metric", "arm").items()
    }
    answer = []
    for (metric, arm), rows in sorted(by_arm.items()):
        baseline = baselines.get(without(specs[arm], "seeds", "skip_scaling", "target"))
        if baseline is None or baseline == arm:
            continue
        others = by_arm[metric, baseline]
        common = sorted(rows.keys() & others.keys())
        pairs = [(rows[seed], others[seed]) for seed in common]
        both = [(a, b) for a, b in pairs if a["value"] is not None and b["value"] is not None]
        result = statistics.paired([a["value"] - b["value"] for a, b in both])
        why = Counter(
            state
            for a, b in pairs
            for state in ("diverged", NOT_MEASURED, OTHERWISE)
            if state in (a["status"], b["status"])
        )
        lost = why["diverged"]
        # A measured pair is not called absent.
        notes = [result.note] if result.note and why.total() == lost else []
        notes += [f"{n} pair{'s' if n > 1 else ''} left out: {state}" for state, n in why.items()]
        unjudged = blind(specs[arm], specs[baseline])
        notes = [BLIND, *notes] if unjudged else notes
        answer.append(
            {
                **{key: labels_of[key] for labels_of in [next(iter(rows.values()))] for key in ARM},
                "baseline": baseline,
                "metric": metric,
                "identity": " ".join(sorted({row["identity"] for pair in both for row in pair})),
                "better": better(metric),
                "n_pairs": result.n,
                "n_diverged_pairs": lost,
                "mean_difference": result.mean,
                "ci_low": result.low,
                "ci_high": result.high,
                "p_value": math.nan if unjudged else result.p,
                "detectable_difference": math.nan if unjudged else result.detectable,
                "_side": result.mean,
                "note": "; ".join(notes),
            }
        )
    correct(answer, "metric", "baseline")
    return answer
