"""The definitions behind published fidelity numbers, written out.

Studies are measured with torch-fidelity (`study.fidelity.evaluate`). Papers were measured with
other programs, whose definitions differ in details; here they stand side by side, so that a
difference between two numbers can be told from a difference between two programs. All functions
take features; which network they come from is the larger difference and cannot be undone here.

Arrays are NumPy: features [N, D], logits [N, K]. Distances, divergences and scores are without
unit; precision and recall are fractions.
"""

import math
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray
FrechetDefinition = Literal["edm", "uvit", "guided_diffusion", "torch_fidelity"]


def mean_covariance(features: Array) -> tuple[Array, Array]:
    """Mean [D] and unbiased covariance [D, D] (divided by N - 1, as everywhere), float64."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def _matrix_root(product: Array) -> Array:
    from scipy.linalg import sqrtm

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular products, which are expected
        return np.asarray(sqrtm(product))


def frechet_distance(
    mean1: Array,
    covariance1: Array,
    mean2: Array,
    covariance2: Array,
    definition: FrechetDefinition = "torch_fidelity",
) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). The definitions differ in the root only:

    - ``edm``: principal root of S2 S1, real part of the trace; no regularisation.
    - ``uvit`` (pytorch-fid) and ``guided_diffusion``: principal root of S1 S2; if that is not
      finite, of the product after adding 1e-6 to both diagonals; an imaginary part of the root's
      diagonal above 1e-3 is an error.
    - ``torch_fidelity``: no root; sum of the square roots of the eigenvalues of S1 S2, real parts.

    With fewer images than features the covariances are singular. The product still has real,
    non-negative eigenvalues, and the definitions agree to rounding; they part where the root is
    not finite. ``edm`` is then not finite either; no other definition gives NaN for finite input.

    Raises ``ValueError`` for a large imaginary part (``uvit``, ``guided_diffusion``).
    """
    mean1, mean2, covariance1, covariance2 = (
        np.asarray(value, np.float64) for value in (mean1, mean2, covariance1, covariance2)
    )
    offset = float(np.square(mean1 - mean2).sum())
    traces = float(np.trace(covariance1) + np.trace(covariance2))
    if definition == "torch_fidelity":
        eigenvalues = np.linalg.eigvals(covariance1 @ covariance2).astype(complex)
        return offset + traces - 2 * float(np.sqrt(eigenvalues).real.sum())
    if definition == "edm":
        root = _matrix_root(covariance2 @ covariance1)
        return offset + traces - 2 * float(np.trace(root).real)
    if definition not in ("uvit", "guided_diffusion"):
        raise ValueError(f"no definition {definition!r} of the Frechet distance")
    root = _matrix_root(covariance1 @ covariance2)
    if not np.isfinite(root).all():
        shift = np.eye(len(covariance1)) * 1e-6
        root = _matrix_root((covariance1 + shift) @ (covariance2 + shift))
    imaginary = float(np.abs(np.diagonal(root).imag).max())
    if imaginary > 1e-3:
        raise ValueError(f"the covariances' root has an imaginary part of {imaginary:.2g}")
    return offset + traces - 2 * float(np.trace(root.real))


def unbiased_mmd2(first: Array, second: Array) -> float:
    """Unbiased squared MMD of two sets of equal size m >= 2 (Gretton et al. 2012, eq. 3).

    Kernel (x.y / D + 1)^3 (Binkowski et al. 2018). Diagonals are left out of the sums within a
    set and kept in the sum across sets. Can be negative.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    size, width = first.shape
    if second.shape != first.shape or size < 2:
        raise ValueError(
            f"needs two sets of one size of at least 2, got {first.shape} and {second.shape}"
        )

    def kernel(a: Array, b: Array) -> Array:
        return (a @ b.T / width + 1) ** 3

    def within(a: Array) -> float:
        values = kernel(a, a)
        return float(values.sum() - np.trace(values)) / (size * (size - 1))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def kernel_distance(
    generated: Array,
    reference: Array,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """KID: mean and standard deviation (divided by n) of `unbiased_mmd2` over random subsets.

    As torch-fidelity: per subset, ``subset_size`` rows without repetition of the generated set,
    then of the reference, from NumPy's legacy generator. Sums are float64 here, float32 there.
    Raises ``ValueError`` where a set is smaller than a subset.
    """
    if min(len(generated), len(reference)) < subset_size:
        raise ValueError(
            f"{subset_size} images per subset, but only {len(generated)} generated and "
            f"{len(reference)} reference images"
        )
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        mine = generated[draw.choice(len(generated), subset_size, replace=False)]
        theirs = reference[draw.choice(len(reference), subset_size, replace=False)]
        values.append(unbiased_mmd2(mine, theirs))
    return float(np.mean(values)), float(np.std(values))


def euclidean_distances(first: Array, second: Array) -> Array:
    """Distances [N, M] between rows, float64 from one matrix product."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    squared = np.square(first).sum(1)[:, None] + np.square(second).sum(1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squared, 0))


def _half_sum(terms: Array) -> Array:
    """Sums of float16 [N, D] over D in the order of TensorFlow's vectorised CPU kernel.

    Eight lanes are added in float16, in four interleaved chains from D = 32 on; the lanes are
    then added in float32, what is left of D one by one, and rows of more than 1600 in halves.
    """
    lanes, width = 8, terms.shape[1]
    if width > 200 * lanes:
        cut = lanes * math.ceil(math.ceil(width / 2) / lanes)
        return _half_sum(terms[:, :cut]) + _half_sum(terms[:, cut:])
    packets = terms[:, : width - width % lanes].reshape(len(terms), -1, lanes)
    count = packets.shape[1]
    chains = [np.zeros((len(terms), lanes), np.float16) for _ in range(4)]
    unrolled = count - count % 4
    for packet in range(unrolled):
        chains[packet % 4] = chains[packet % 4] + packets[:, packet]
    total = chains[0]
    for chain in chains[1:]:
        total = total + chain
    for packet in range(unrolled, count):
        total = total + packets[:, packet]
    wide = total.astype(np.float32)
    while wide.shape[1] > 1:
        half = wide.shape[1] // 2
        wide = wide[:, :half] + wide[:, half:]
    tail = np.zeros(len(terms), np.float16)
    for column in range(width - width % lanes, width):
        tail = tail + terms[:, column]
    return tail + wide[:, 0].astype(np.float16)


def half_squared_distances(first: Array, second: Array, block: int = 10_000) -> Array:
    """Squared distances [N, M] as guided-diffusion's evaluator gets them: float16 arithmetic.

    |x|^2 - 2 x.y + |y|^2 from features rounded to float16, each term and each sum rounded to
    float16 (the product accumulates in float32), negative values cut to 0. A ``block`` of rows and
    columns in which anything overflows is computed in float32 instead. Where the norms are much
    larger than the distance, the result is off by whole percents, and a point's distance to
    itself need not be 0. Returned as float32.
    """
    result = np.empty((len(first), len(second)), np.float32)
    for rows in (slice(i, i + block) for i in range(0, len(first), block)):
        for columns in (slice(j, j + block) for j in range(0, len(second), block)):
            a, b = (np.asarray(x, np.float32) for x in (first[rows], second[columns]))
            with np.errstate(over="ignore", invalid="ignore"):
                half_a, half_b = a.astype(np.float16), b.astype(np.float16)
                product = half_a.astype(np.float32) @ half_b.astype(np.float32).T
                product = product.astype(np.float16)
                values = _half_sum(half_a * half_a)[:, None] - np.float16(2) * product
                values = values + _half_sum(half_b * half_b)
            if not np.isfinite(values).all():
                values = np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)
            result[rows, columns] = np.maximum(values, 0)
    return result


def neighbour_radii(distances: Array, neighbours: int = 3) -> Array:
    """Distance [N] to the k-th nearest neighbour from distances [N, N] of a set to itself.

    The smallest entry of a row counts as the point itself, in both programs. Raises
    ``ValueError`` where the set has no k neighbours.
    """
    if distances.shape[1] <= neighbours:
        raise ValueError(f"{distances.shape[1]} points have no {neighbours} neighbours each")
    return np.partition(distances, neighbours, axis=1)[:, neighbours]


def precision_recall(
    generated: Array,
    reference: Array,
    neighbours: int = 3,
    definition: Literal["guided_diffusion", "torch_fidelity"] = "torch_fidelity",
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision: fraction of generated points inside the k-neighbour ball of any reference point;
    recall: fraction of reference points inside the ball of any generated point; the surface counts
    as inside. ``guided_diffusion`` compares squared distances in float16
    (`half_squared_distances`), ``torch_fidelity`` distances in float32 (float64 here): single
    points may differ. Published protocols use 10,000 reference images with the former.
    """
    distances: Callable[[Array, Array], Array] = (
        half_squared_distances if definition == "guided_diffusion" else euclidean_distances
    )
    across = distances(reference, generated)
    around_reference = neighbour_radii(distances(reference, reference), neighbours)
    around_generated = neighbour_radii(distances(generated, generated), neighbours)
    precision = (across <= around_reference[:, None]).any(0).mean()
    recall = (across <= around_generated).any(1).mean()
    return float(precision), float(recall)


def _log_softmax(logits: Array) -> Array:
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _split_score(log_probabilities: Array) -> float:
    """exp of the mean divergence of rows from their mean, for one split."""
    probabilities = np.exp(log_probabilities)
    marginal = np.log(probabilities.mean(0))
    return float(np.exp((probabilities * (log_probabilities - marginal)).sum(1).mean()))


def inception_score(logits: Array, split_size: int = 5000) -> float:
    """Inception score as in guided-diffusion's evaluator: consecutive splits of ``split_size``.

    The mean over splits of exp(mean KL(p(y|x) || p(y))); a shorter last split counts like the
    others (Salimans et al. 2016, with splits).
    """
    values = _log_softmax(logits)
    scores = [_split_score(values[i : i + split_size]) for i in range(0, len(values), split_size)]
    return float(np.mean(scores))


def shuffled_inception_score(
    logits: Array, splits: int = 10, shuffle: bool = True, seed: int = 2020
) -> tuple[float, float]:
    """Inception score as in torch-fidelity: mean and standard deviation over ``splits`` splits.

    Images are shuffled first (NumPy's legacy generator) and divided as evenly as integers allow.
    Raises ``ValueError`` for fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images cannot be divided into {splits} splits")
    values = _log_softmax(logits)
    if shuffle:
        values = values[np.random.RandomState(seed).permutation(len(values))]
    edges = [i * len(values) // splits for i in range(splits + 1)]
    scores = [_split_score(values[a:b]) for a, b in pairwise(edges)]
    return float(np.mean(scores)), float(np.std(scores))


KERNEL = "polynomial degree 3, gamma 1/D, coef0 1"
"""The kernel of KID, in a golden case's words."""


def run_parity_case(case_json: dict[str, Any], tensors: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Every output of a golden case of kind ``fid``, from its inputs.

    ``tensors`` holds ``in/features_reference``, ``in/features_generated`` and
    ``in/logits_generated``. Neighbour counts and split sizes are read from the output names
    (``..._k5``, ``..._split10``), other settings from the case. Returns ``out/...`` -> float64.
    """
    import torch

    settings = case_json.get("settings", {})
    reference, generated, logits = (
        tensors[f"in/{name}"].numpy()
        for name in ("features_reference", "features_generated", "logits_generated")
    )
    mean_r, covariance_r = mean_covariance(reference)
    mean_g, covariance_g = mean_covariance(generated)
    results: dict[str, Any] = {
        "mu_reference": mean_r,
        "sigma_reference": covariance_r,
        "mu_generated": mean_g,
        "sigma_generated": covariance_g,
    }
    for definition in ("edm", "uvit", "guided_diffusion", "torch_fidelity"):
        with suppress(ValueError):  # the program would have stopped: no such output
            results[f"fid_{definition}"] = frechet_distance(
                mean_g, covariance_g, mean_r, covariance_r, definition
            )

    k = settings.get("guided_diffusion_pr", {}).get("k", 3)
    results["precision_guided_diffusion"], results["recall_guided_diffusion"] = precision_recall(
        generated, reference, k, "guided_diffusion"
    )
    for name, points in (("reference", reference), ("generated", generated)):
        radii = neighbour_radii(half_squared_distances(points, points), k)
        results[f"radii_{name}"] = radii[:, None]
    results["pairwise_squared_distances_fp16"] = half_squared_distances(reference, generated)

    stored = "\n".join(case_json.get("outputs", {}))
    for k in {3, 5} | {int(k) for k in re.findall(r"_torch_fidelity_k(\d+)$", stored, re.M)}:
        if min(len(generated), len(reference)) > k:
            precision, recall = precision_recall(generated, reference, k, "torch_fidelity")
            results[f"precision_torch_fidelity_k{k}"] = precision
            results[f"recall_torch_fidelity_k{k}"] = recall

    results["inception_score_guided_diffusion"] = inception_score(logits)
    for size in {10} | {int(n) for n in re.findall(r"_diffusion_split(\d+)$", stored, re.M)}:
        results[f"inception_score_guided_diffusion_split{size}"] = inception_score(logits, size)
    isc = settings.get("torch_fidelity_isc", {})
    splits = isc.get("splits", 10)
    if len(logits) >= splits:
        mean, spread = shuffled_inception_score(
            logits, splits, isc.get("shuffle", True), isc.get("rng_seed", 2020)
        )
        results["inception_score_torch_fidelity"] = mean
        results["inception_score_std_torch_fidelity"] = spread

    kid = settings.get("kid", {})
    if kid.get("kernel", KERNEL) != KERNEL:
        raise ValueError(f"kid.kernel is {kid['kernel']!r}; it must be {KERNEL!r}")
    smaller = min(len(generated), len(reference))
    size = min(kid.get("subset_size", 1000), smaller)
    results["kid_mean_torch_fidelity"], results["kid_std_torch_fidelity"] = kernel_distance(
        generated, reference, kid.get("subsets", 100), size, kid.get("rng_seed", 2020)
    )
    results["mmd2_unbiased_all"] = unbiased_mmd2(generated[:smaller], reference[:smaller])
    return {
        f"out/{name}": torch.as_tensor(np.asarray(value), dtype=torch.float64)
        for name, value in results.items()
    }
