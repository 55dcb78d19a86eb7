"""The definitions behind published fidelity numbers, on given features.

Studies are measured with torch-fidelity (`study.fidelity.evaluate`), which is called here too.
Papers were measured with other programs, whose definitions differ in details: they are written out
here, so that a difference between two numbers can be told from a difference between two programs.

Arrays are NumPy: features [N, D]. Distances and scores are without unit; precision and recall are
fractions.
"""

import math
import re
import warnings
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from study.fidelity import neighbours
from study.fidelity.extractors import torch_fidelity as tool
from study.parity.case import Case, Tensors

Array = np.ndarray
FrechetDefinition = Literal["edm", "uvit", "guided_diffusion"]
SETS = ("generated", "reference")


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
    definition: FrechetDefinition,
) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). The definitions differ in the root only:

    - ``edm``: principal root of S2 S1, real part of the trace; no regularisation.
    - ``uvit`` (pytorch-fid) and ``guided_diffusion``: principal root of S1 S2; if that is not
      finite, of the product after adding 1e-6 to both diagonals; an imaginary part of the root's
      diagonal above 1e-3 is an error.

    torch-fidelity takes no root, but the eigenvalues of S1 S2. With fewer images than features the
    covariances are singular. The product still has real, non-negative eigenvalues, and all agree to
    rounding; they part where the root is not finite. ``edm`` is then not finite either.

    Raises ``ValueError`` for a large imaginary part (``uvit``, ``guided_diffusion``).
    """
    mean1, mean2, covariance1, covariance2 = (
        np.asarray(value, np.float64) for value in (mean1, mean2, covariance1, covariance2)
    )
    offset = float(np.square(mean1 - mean2).sum())
    traces = float(np.trace(covariance1) + np.trace(covariance2))
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


def neighbour_radii(distances: Array, neighbours: int) -> Array:
    """Distance [N] to the k-th nearest neighbour from distances [N, N] of a set to itself.

    The smallest entry of a row counts as the point itself. Raises
    ``ValueError`` where the set has no k neighbours.
    """
    if distances.shape[1] <= neighbours:
        raise ValueError(f"{distances.shape[1]} points have no {neighbours} neighbours each")
    return np.partition(distances, neighbours, axis=1)[:, neighbours]


def precision_recall(generated: Array, reference: Array, neighbours: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of guided-diffusion's evaluator.

    Precision: fraction of generated points inside the k-neighbour ball of any reference point;
    recall: fraction of reference points inside the ball of any generated point; the surface counts
    as inside. Squared distances are compared in float16 (`half_squared_distances`); torch-fidelity
    compares distances in float32, and single points may differ. Published protocols use 10,000
    reference images with the former.
    """
    across = half_squared_distances(reference, generated)
    around_reference, around_generated = (
        neighbour_radii(half_squared_distances(points, points), neighbours)
        for points in (reference, generated)
    )
    precision = (across <= around_reference[:, None]).any(0).mean()
    recall = (across <= around_generated).any(1).mean()
    return float(precision), float(recall)


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """Inception score as in guided-diffusion's evaluator: consecutive splits of ``split_size``.

    The mean over splits of exp(mean KL(p(y|x) || p(y))); a shorter last split counts like the
    others (Salimans et al. 2016, with splits). torch-fidelity shuffles, and divides evenly.
    """
    scores = [
        tool.metric_isc.isc_features_to_metric(part, splits=1, shuffle=False)
        for part in logits.split(split_size)
    ]
    return float(np.mean([score[tool.KEY_METRIC_ISC_MEAN] for score in scores]))


KERNEL = "polynomial degree 3, gamma 1/D, coef0 1"
"""The kernel of KID, as a case names it: torch-fidelity's."""


def _torch_fidelity(case: Case, tensors: Tensors, counts: set[int]) -> dict[str, float]:
    """torch-fidelity's own numbers (precision and recall: ours), with the settings of a case."""
    generated, reference = (tensors[f"in/features_{name}"].double() for name in SETS)
    logits, smaller = tensors["in/logits_generated"], min(len(generated), len(reference))
    settings = case.get("settings", {})
    isc, kid = settings.get("torch_fidelity_isc", {}), settings.get("kid", {})
    if kid.get("kernel", KERNEL) != KERNEL:
        raise ValueError(f"kid.kernel is {kid['kernel']!r}; it must be {KERNEL!r}")
    statistics = map(tool.metric_fid.fid_features_to_statistics, (generated, reference))
    found = tool.metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    numbers = {"fid": found[tool.KEY_METRIC_FID]}
    found = tool.metric_kid.kid_features_to_metric(
        generated,
        reference,
        kid_subsets=kid.get("subsets", 100),
        kid_subset_size=min(kid.get("subset_size", 1000), smaller),
        rng_seed=kid.get("rng_seed", 2020),
        verbose=False,
    )
    numbers["kid_mean"] = found[tool.KEY_METRIC_KID_MEAN]
    numbers["kid_std"] = found[tool.KEY_METRIC_KID_STD]
    splits, seed = isc.get("splits", 10), isc.get("rng_seed", 2020)
    if len(logits) >= splits:
        shuffle = isc.get("shuffle", True)
        found = tool.metric_isc.isc_features_to_metric(logits, splits, shuffle, seed)
        numbers["inception_score"] = found[tool.KEY_METRIC_ISC_MEAN]
        numbers["inception_score_std"] = found[tool.KEY_METRIC_ISC_STD]
    named = {f"{name}_torch_fidelity": number for name, number in numbers.items()}
    for k in counts:
        if smaller > k:
            limits = neighbours.radii(reference, k)
            precision, recall = neighbours.precision_recall(generated, reference, limits, k)
            named[f"precision_torch_fidelity_k{k}"] = precision
            named[f"recall_torch_fidelity_k{k}"] = recall
    return named


def fid(case: Case, tensors: Tensors) -> Tensors:
    """Fidelity metrics of given features, by each program's definition.

    Neighbour counts and split sizes are in the output names (``..._k5``, ``..._split10``).
    """
    stored = "\n".join(case.get("outputs", {}))
    generated, reference = (tensors[f"in/features_{name}"].numpy() for name in SETS)
    logits, smaller = tensors["in/logits_generated"], min(len(generated), len(reference))
    moments = {name: mean_covariance(points) for name, points in zip(SETS, (generated, reference))}
    counts = {int(k) for k in re.findall(r"_torch_fidelity_k(\d+)$", stored, re.M)}
    found: dict[str, Any] = _torch_fidelity(case, tensors, counts)

    for name, (mean, covariance) in moments.items():
        found |= {f"mu_{name}": mean, f"sigma_{name}": covariance}
    for definition in ("edm", "uvit", "guided_diffusion"):
        with suppress(ValueError):  # the program would have stopped: no such output
            distance = frechet_distance(*moments["generated"], *moments["reference"], definition)
            found[f"fid_{definition}"] = distance
    found["mmd2_unbiased_all"] = tool.metric_kid.kernel_mmd(
        *(points[:smaller].astype(np.float64) for points in (generated, reference))
    )

    k = case.get("settings", {}).get("guided_diffusion_pr", {}).get("k", 3)
    precision, recall = precision_recall(generated, reference, k)
    found |= {"precision_guided_diffusion": precision, "recall_guided_diffusion": recall}
    for name, points in zip(SETS, (generated, reference)):
        radii = neighbour_radii(half_squared_distances(points, points), k)
        found[f"radii_{name}"] = radii[:, None]
    found["pairwise_squared_distances_fp16"] = half_squared_distances(reference, generated)

    found["inception_score_guided_diffusion"] = inception_score(logits)
    for size in re.findall(r"_guided_diffusion_split(\d+)$", stored, re.M):
        score = inception_score(logits, int(size))
        found[f"inception_score_guided_diffusion_split{size}"] = score
    return {
        f"out/{name}": torch.as_tensor(np.asarray(value), dtype=torch.float64)
        for name, value in found.items()
    }
