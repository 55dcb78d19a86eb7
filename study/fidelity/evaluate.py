"""Samples and a reference -> ``<extractor>.json``, with torch-fidelity's functions.

A reference is extracted, and what a metric needs of it computed, once and not with every
evaluation; features are checked before they are measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study import bounded
from study.fidelity import extractors
from study.fidelity.extractors import torch_fidelity
from study.fidelity.neighbours import NEIGHBOURS, precision_recall
from study.fidelity.reference import Features, Reference, statistics
from study.files import UserError, read_object, sha256, write_json
from study.provenance import Stopwatch, provenance
from study.spec import metrics as known_metrics

metric_fid, metric_isc, metric_kid = (
    getattr(torch_fidelity, f"metric_{name}") for name in ("fid", "isc", "kid")
)

METRICS = tuple(known_metrics.METRICS)
NUMBERS = {
    name: tuple(row.numbers)
    for name, row in known_metrics.METRICS.items()
    if name not in row.numbers
}
"""The numbers that a metric gives, where they are not one of its own name."""

# torch-fidelity's defaults, written out because they are part of a number's identity.
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
IS_SPLITS = 10
RANDOM_SEED = 2020


POSSIBLE = {number: metric.possible for number, metric in known_metrics.NUMBERS.items()}
"""What a number can be."""


@dataclass(frozen=True)
class Score:
    """A metric's number, its spread over subsets or splits, and why it is missing or needs care."""

    value: float | None
    spread: float | None = None
    note: str | None = None


def _frechet(generated: Tensor, reference: Features) -> dict[str, Score]:
    if len(generated) < 2:
        return {"fd": Score(None, note="a covariance needs at least 2 images")}
    both = [
        {"mu": found["mean"].numpy(), "sigma": found["covariance"].numpy()}
        for found in (statistics(generated), reference.statistics)
    ]
    found = metric_fid.fid_statistics_to_metric(*both, verbose=False)
    note = None
    if len(generated) <= generated.shape[1]:
        note = (
            f"{len(generated)} images for {generated.shape[1]} features: the covariance is "
            "singular and the distance strongly biased"
        )
    return {"fd": Score(found[metric_fid.KEY_METRIC_FID], note=note)}


def _kernel(generated: Tensor, reference: Features) -> dict[str, Score]:
    size = kid_subset_size(len(generated), len(reference.features))
    if size < 2:
        return {"kid": Score(None, note="an unbiased kernel distance needs at least 2 images")}
    found = metric_kid.kid_features_to_metric(
        generated,
        reference.features,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        rng_seed=RANDOM_SEED,
        verbose=False,
    )
    mean, spread = metric_kid.KEY_METRIC_KID_MEAN, metric_kid.KEY_METRIC_KID_STD
    return {"kid": Score(found[mean], found[spread])}


def _inception_score(logits: Tensor | None) -> dict[str, Score]:
    if logits is None:
        return {"is": Score(None, note="the extractor gives no class probabilities")}
    if len(logits) < IS_SPLITS:
        return {"is": Score(None, note=f"needs at least {IS_SPLITS} images, one per split")}
    found = metric_isc.isc_features_to_metric(logits, IS_SPLITS, rng_seed=RANDOM_SEED)
    mean, spread = metric_isc.KEY_METRIC_ISC_MEAN, metric_isc.KEY_METRIC_ISC_STD
    return {"is": Score(found[mean], found[spread])}


def _precision_recall(
    generated: Tensor, reference: Features, device: torch.device
) -> dict[str, Score]:
    if min(len(generated), len(reference.features)) <= NEIGHBOURS:
        none = Score(None, note=f"needs more than {NEIGHBOURS} images on both sides")
        return {"precision": none, "recall": none}
    with extractors.exact_arithmetic():
        precision, recall = precision_recall(
            generated.to(device), reference.features.to(device), reference.radii(device)
        )
    return {"precision": Score(precision), "recall": Score(recall)}


def kid_subset_size(generated: int, reference: int) -> int:
    """Images per KID subset: 1000, or as many as the smaller of the two sets has."""
    return min(KID_SUBSET_SIZE, generated, reference)


def measure(
    generated: Tensor,
    logits: Tensor | None,
    reference: Tensor | Features,
    metrics: tuple[str, ...] = METRICS,
    device: torch.device | str = "cpu",
) -> dict[str, Score]:
    """Metrics of features: ``fd``, ``kid``, ``is``, and ``precision`` with ``recall`` for ``prc``.

    ``generated`` [n, F] and ``reference`` [m, F] are float32 features, ``logits`` [n, K] class
    logits of the generated images or ``None``; all on the CPU. Every number is torch-fidelity's.
    Distances between images are computed on ``device``. A metric that is not defined for these
    inputs has the value ``None`` and a note that says why.
    """
    known = reference if isinstance(reference, Features) else Features(reference)
    parts = {
        "fd": lambda: _frechet(generated, known),
        "kid": lambda: _kernel(generated, known),
        "is": lambda: _inception_score(logits),
        "prc": lambda: _precision_recall(generated, known, torch.device(device)),
    }
    finite = generated.isfinite().all(1)
    if logits is not None:
        finite &= logits.isfinite().all(1)
    broken = int((~finite).sum())
    scores: dict[str, Score] = {}
    for metric in metrics:
        mine = NUMBERS.get(metric, (metric,))
        if broken:
            note = f"features of {broken} of {len(generated)} images are not finite"
            scores.update(dict.fromkeys(mine, Score(None, note=note)))
            continue
        try:
            found = parts[metric]()
        except np.linalg.LinAlgError as error:
            found = dict.fromkeys(mine, Score(None, note=f"did not converge: {error}"))
        for name, score in found.items():
            scores[name] = _possible(name, score)
    return scores


def _possible(name: str, score: Score) -> Score:
    """The score, or none and the reason where its number cannot be one of this metric."""
    if score.value is None:
        return score
    if not np.isfinite(score.value):
        return Score(None, note=f"{score.value} came out of finite features")
    low, high = POSSIBLE[name]
    if not low <= score.value <= high:
        return Score(None, note=f"{score.value:.6g} came out, outside of [{low:g}, {high:g}]")
    if score.spread is not None and not np.isfinite(score.spread):
        return replace(score, spread=None)
    return score


def _bases(metrics: tuple[str, ...]) -> list[str]:
    """Names of the numbers that metrics give."""
    return [name for metric in metrics for name in NUMBERS.get(metric, (metric,))]


def metric_name(base: str, extractor: str, images: int) -> str:
    """Column name of a metric: ``fd_digits_1797``; with Inception ``fid_50000``, ``kid_50000``."""
    cls = extractors.extractor_class(extractor)
    if cls.frechet == "fid":
        return f"{'fid' if base == 'fd' else base}_{images}"
    return f"{base}_{extractor}_{images}"


def _read_samples(path: Path) -> np.ndarray:
    if not path.exists():
        raise UserError(f"{path}: no such file; make samples with `study generate`")
    with bounded.reading(path, "a samples file (.npz with arr_0 [N, H, W, C])"):
        images = bounded.read_npz(path, "arr_0")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, C]"
        )
    return images


def requested(protocol: dict[str, Any], reference: Reference) -> tuple[str, ...]:
    """The metrics that a protocol asks for. Raises ``UserError`` for what the reference lacks."""
    metrics = tuple(protocol.get("metrics", METRICS))
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise UserError(f"no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    extractor = protocol.get("extractor", reference.identity["extractor"])
    if extractor != reference.identity["extractor"]:
        raise UserError(
            f"{reference.folder}: made with extractor {reference.identity['extractor']}, "
            f"but the protocol asks for {extractor}"
        )
    return metrics


DRAWN = ("snapshot", "weights", "sampler", "nfe", "guidance", "labels")
"""What of the sampling is part of a number's identity."""


def _settings(base: str, generated: int, reference: int) -> dict[str, Any]:
    return {
        "kid": {
            "subsets": KID_SUBSETS,
            "subset_size": kid_subset_size(generated, reference),
            "kernel": "polynomial, degree 3",
            "seed": RANDOM_SEED,
        },
        "is": {"splits": IS_SPLITS, "shuffle_seed": RANDOM_SEED},
        "precision": {"neighbours": NEIGHBOURS},
        "recall": {"neighbours": NEIGHBOURS},
    }.get(base, {})


def _identities(
    scores: dict[str, Score], images: int, reference: dict[str, Any], generation: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What each score is a measurement of: two numbers compare only where these agree."""
    shared = {
        "extractor": reference["extractor"],
        "extractor_sha256": reference["extractor_sha256"],
        "extractor_precision": reference["precision"],
        "resize": reference["resize"],
        "reference": reference["dataset"],
        "reference_sha256": reference["dataset_sha256"],
        "split": reference["split"],
        "images": images,
        "reference_images": reference["images"],
        **{key: generation.get(key) for key in DRAWN},
        "precision": generation.get("precision"),
        **({"decoder": generation["decoder"]} if "decoder" in generation else {}),
        "tool": "torch-fidelity",
        "tool_version": torch_fidelity.__version__,
    }
    return {
        base: {**shared, "settings": _settings(base, images, reference["images"])}
        for base in scores
    }


def evaluate(
    samples: str | Path,
    reference: str | Path,
    protocol: dict[str, Any],
    out: str | Path,
    *,
    weights: str | Path | None = None,
    device: Any = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Measure ``samples`` against the folder ``reference``; write and return ``out``.

    ``samples`` is an npz with ``arr_0`` uint8 [N, H, W, C]; a ``generate.json`` beside it supplies
    snapshot, weights, sampler, NFE, guidance, labels and precision of the sampling for the
    identity. ``protocol`` holds ``extractor`` (must be the reference's) and ``metrics``.
    ``weights`` is the extractor's file, by default the copy in the reference; it must be the one
    that the reference was made with. ``code`` is the digest of the evaluating code, which is
    written down.

    ``status`` is ``skipped`` for zero images (a diverged run), else ``done``. ``metrics`` maps
    names to numbers or ``null``; ``notes`` says why a number is missing or needs care; ``spread``
    holds the standard deviation over KID subsets and IS splits; ``identity`` what each number
    is a measurement of. Where samples were not finite every number is missing: those of the others
    would flatter the network. Raises ``UserError`` for samples that do not fit the reference, or
    that are not those which ``generate.json`` describes.
    """
    samples = Path(samples)
    known = Reference(reference)
    metrics = requested(protocol, known)
    images = _read_samples(samples)
    beside = samples.with_name("generate.json")
    generation = read_object(beside) if beside.is_file() else {}
    described = generation.get("samples_sha256")
    if described is not None and described != sha256(samples):
        raise UserError(
            f"{samples}: not the samples that {beside} describes; make both anew with "
            "`study generate`, or move the file away from it"
        )
    drawn = len(images) + (generation.get("not_finite") or 0)
    chosen = known.same_weights(weights or known.weights)

    if drawn > len(images):
        where, watch = "cpu", Stopwatch()
        status = "done"
        reason = f"{drawn - len(images)} of {drawn} samples are not finite"
        scores = dict.fromkeys(_bases(metrics), Score(None, note=reason))
    elif len(images):
        size, channels = known.identity["resolution"], known.identity["channels"]
        if images.shape[1:] != (size, size, channels):
            raise UserError(
                f"{samples}: images are {' x '.join(map(str, images.shape[1:]))}, those of the "
                f"reference {reference} {size} x {size} x {channels}"
            )
        extractor = extractors.load(known.identity["extractor"], chosen, device)
        where = extractor.device
        watch = Stopwatch(where)
        found = extractors.extract(extractor, images)
        scores = measure(found["features"], found.get("logits"), known, metrics, where)
        missing = dict.fromkeys(s.note for s in scores.values() if s.value is None)
        status, reason = "done", "; ".join(missing) or None
    else:
        where, watch, scores = "cpu", Stopwatch(), {}
        status, reason = "skipped", generation.get("reason") or "no images"

    remark = generation.get("remark")  # of the weights; every number of these samples needs it
    notes = {b: "; ".join(filter(None, (score.note, remark))) for b, score in scores.items()}
    names = {b: metric_name(b, known.identity["extractor"], drawn) for b in scores}
    identities = _identities(scores, drawn, known.identity, generation)
    record = {
        "status": status,
        "reason": reason,
        "code": code,
        "protocol": protocol,
        "generation_code": generation.get("code"),
        "weights_sha256": generation.get("weights_sha256"),
        "metrics": {names[base]: score.value for base, score in scores.items()},
        "bases": names,
        "spread": {names[b]: s.spread for b, s in scores.items() if s.spread is not None},
        "notes": {names[b]: note for b, note in notes.items() if note},
        "identity": {names[base]: identity for base, identity in identities.items()},
        "seconds": round(watch.seconds, 3),
        "peak_memory_mib": round(watch.peak_memory_mib, 1),
        "provenance": provenance(where),
    }
    write_json(out, record)
    return record
