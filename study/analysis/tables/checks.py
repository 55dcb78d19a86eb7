"""What looks wrong, missing or mixed? Rows of ``qc.csv``."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from study.analysis.names import NOT_ASKED, NOT_MEASURED, OTHERWISE
from study.analysis.tables.families import groups
from study.analysis.tables.found import Found, problem
from study.analysis.tables.measures import spacings
from study.files import UserError, canonical_json
from study.spec.metrics import NUMBERS
from study.spec.run import Spec
from study.spec.scalings import SCALINGS


def quality_checks(
    found: list[Found], runs: list[dict], metrics: list[dict], oscillation: list[dict]
) -> list[dict]:
    return [
        *(one for pair in zip(found, runs, strict=True) for one in _run_checks(*pair)),
        *_identical_weights(found),
        *_metric_checks(metrics),
        *_mixtures(runs),
        *_versions(found),
        *_log_spacings(oscillation),
    ]


def _run_checks(one: Found, row: dict) -> Iterator[dict]:
    """What a run lacks, or says that cannot be; ``row`` is that of ``runs.csv``."""
    run, step, steps = one.run, row["step"], row["steps"]
    if row["status"] == "missing":
        yield problem("warning", "missing run", run, "no train/status.json")
    elif row["status"] == "running":
        detail = f"stopped or still running at step {step} of {steps}"
        yield problem("warning", "unfinished run", run, detail)
    elif row["status"] == "done":
        if one.generate.get("reason"):
            yield problem("warning", "samples not finite", run, one.generate["reason"])
        if step is not None and steps is not None and step < steps:
            yield problem("error", "stopped early", run, f"done at step {step} of {steps}")
        if row["final_loss"] is None and "imported" not in one.train:
            yield problem("error", "non-finite loss", run, "final loss is missing")
    yield from _missing_measurements(one)
    written = one.train.get("spec") if one.train else None
    if written is not None and _completed(written) != _completed(one.spec):
        yield problem("error", "other spec", run, "the spec on disk is not the manifest's")


def _missing_measurements(one: Found) -> Iterator[dict]:
    """Of a run that ended: one line for all of its measurements that are not there."""
    lacking = [each for each in one.measurements if one.train and each.lack]
    if lacking:
        names = ", ".join(f"{each.name} ({each.lack})" for each in lacking)
        detail = f"{len(lacking)} of {len(one.measurements)}: {names}"
        yield problem("warning", "missing measurements", one.run, detail)


def _completed(spec: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of options that did not exist yet; a spec of another version as it is."""
    try:
        return Spec.read(spec).content()
    except UserError:
        return spec


def _metric_checks(metrics: list[dict]) -> Iterator[dict]:
    """Metrics that are missing, out of their range, or measured in several ways."""
    ways = defaultdict(set)
    for row in metrics:
        if row["status"] == OTHERWISE:
            ways[row["metric"]].add(row["note"])
        if row["status"] not in ("done", NOT_MEASURED) or row["note"] == NOT_ASKED:
            continue
        metric = NUMBERS.get(row["base"])
        low, high = metric.possible if metric else (-math.inf, math.inf)
        if row["value"] is None and row["note"]:
            detail = f"{row['metric']}: {row['note']}"
            yield problem("warning", "metric not measured", row["run"], detail)
        elif row["value"] is None:
            detail = f"{row['metric']} is not finite"
            yield problem("error", "implausible metric", row["run"], detail)
        elif not low <= row["value"] <= high:
            detail = f"{row['metric']} = {row['value']:.6g} outside [{low:g}, {high:g}]"
            yield problem("error", "implausible metric", row["run"], detail)
    for metric, notes in ways.items():
        detail = f"{metric}: other runs were {'; '.join(sorted(notes))}"
        yield problem("note", "several ways of measuring", "", detail)


def _mixtures(runs: list[dict]) -> Iterator[dict]:
    """In what the runs of the study differ that should be alike."""
    for column, check in (
        ("git_commit", "several commits"),
        ("device", "several devices"),
        ("torch_version", "several versions of torch"),
        ("sampler", "several samplers"),
        ("sampling_seed", "several sampling seeds"),
    ):
        values = sorted({str(row[column]) for row in runs if row[column] not in ("", None)})
        if len(values) > 1:
            yield problem("note", check, "", ", ".join(values))
    changed = sum(row["git_changed"] == "true" for row in runs)
    if changed:
        detail = f"{changed} runs were made from a source tree with uncommitted changes"
        yield problem("note", "uncommitted changes", "", detail)


def _versions(found: list[Found]) -> Iterator[dict]:
    """Results of one kind that unlike code made, as after making a part of a study anew.

    Code is known by its digest, which differs without any change where runs need other modules:
    trainings are compared with those of equal networks, formulations and kinds of target, samples
    with those of equal networks, formulations and samplers, and all evaluations with each other.
    """
    counts: dict[str, dict[str, Counter]] = {
        f"several versions of the {what}": defaultdict(Counter)
        for what in ("training code", "generating code", "evaluating code", "data set")
    }
    training, generating, evaluating, data = counts.values()
    for one in found:
        network, target = _code_of(one.spec), (one.spec.get("target") or {}).get("kind")
        stable = "stable target" if target == "stf" else "plain target"
        training[f"{network}, {stable}"][one.train.get("code")] += 1
        data[one.dataset][one.train.get("data_sha256")] += 1
        for each in one.measurements:
            sampler = each.cell["sampler"].get("kind")
            generating[f"{network}, {sampler}"][each.generate.get("code")] += 1
            evaluating["metrics"].update(record.get("code") for record in each.records.values())
    for check, kinds in counts.items():
        details = []
        for kind, versions in sorted(kinds.items()):
            versions.pop(None, None)  # not there yet, or made by hand
            words = [f"{n} of {version[:16]}" for version, n in sorted(versions.items())]
            details += [f"{kind}: {', '.join(words)}"] if len(words) > 1 else []
        if details:
            yield problem("warning", check, "", "; ".join(details))


def _code_of(spec: Mapping[str, Any]) -> str:
    """What decides, besides target and sampler, which code a run needs."""
    method = (spec.get("skip_scaling") or {}).get("method", "")
    row = SCALINGS.get(method)
    gates = "shared gates" if row and row.shared else "gates"
    words = [
        str((spec.get("backbone") or {}).get("family", "")),
        str((spec.get("formulation") or {}).get("kind", "")),
        (gates if row.learned else "fixed scaling") if row else method,
        "imported" if spec.get("checkpoint") else "",
    ]
    return ", ".join(filter(None, words))


def _identical_weights(found: list[Found]) -> list[dict]:
    """Runs with equal weights: a fault where their seeds differ. Where they do not, the setting in
    which the arms differ had no effect, and one result is counted twice.
    """
    by_hash = defaultdict(list)
    for one in found:
        if one.generate.get("weights_sha256") and "imported" not in one.train:
            by_hash[one.generate["weights_sha256"]].append(one)
    answer = []
    for group in by_hash.values():
        others = ", ".join(one.run for one in group[1:])
        if len({canonical_json(one.seeds) for one in group}) > 1:
            detail = f"the same weights as {others}"
            answer.append(problem("error", "identical weights", group[0].run, detail))
        elif len(group) > 1:
            detail = f"with the same seeds the same weights as {others}"
            answer.append(problem("warning", "setting without effect", group[0].run, detail))
    return answer


def _log_spacings(oscillation: list[dict]) -> list[dict]:
    """Oscillations depend on the steps between logged points, which are no part of a run's spec."""
    unlike = {
        quantity: spacings(rows)
        for (quantity,), rows in sorted(groups(oscillation, "quantity").items())
    }
    details = [
        f"{quantity} every {' or '.join(f'{steps:.3g}' for steps in found)} steps"
        for quantity, found in unlike.items()
        if len(found) > 1
    ]
    return [problem("note", "several log spacings", "", "; ".join(details))] if details else []
