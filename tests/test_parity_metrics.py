"""The definitions of published fidelity numbers, as the wing of parity writes them out."""

import numpy as np
import pytest
import torch

from study.fidelity.evaluate import measure
from study.parity import metrics

DEFINITIONS = ("edm", "uvit", "guided_diffusion")


def test_frechet_distance_of_commuting_gaussians():
    """For diagonal covariances it is |m1 - m2|^2 + sum (sd1 - sd2)^2."""
    mean1, mean2 = np.array([0.0, 1, 2]), np.array([1.0, 1, 0])
    deviations1, deviations2 = np.array([1.0, 2, 3]), np.array([2.0, 2, 0])
    want = 5 + 1 + 0 + 9
    for definition in DEFINITIONS:
        found = metrics.frechet_distance(
            mean1, np.diag(deviations1**2), mean2, np.diag(deviations2**2), definition
        )
        assert found == pytest.approx(want), definition


@pytest.mark.parametrize(
    ("generated", "reference", "width"), [(60, 50, 8), (9, 12, 20), (30, 8, 24)]
)
def test_definitions_agree_also_with_fewer_images_than_features(generated, reference, width):
    draw = np.random.RandomState(0)
    a = draw.randn(generated, width).astype(np.float32)
    b = (draw.randn(reference, width) @ draw.randn(width, width)).astype(np.float32)
    mine, theirs = metrics.mean_covariance(a), metrics.mean_covariance(b)
    found = {
        definition: metrics.frechet_distance(*mine, *theirs, definition)
        for definition in DEFINITIONS
    }
    tool = measure(torch.from_numpy(a), None, torch.from_numpy(b), ("fd",))["fd"].value
    assert found == dict.fromkeys(found, pytest.approx(tool, rel=1e-5))


def test_definitions_differ_where_the_root_is_imaginary():
    zero, one = np.zeros(2), np.eye(2)
    indefinite = np.diag([1.0, -1.0])
    with pytest.raises(ValueError, match="imaginary"):
        metrics.frechet_distance(zero, indefinite, zero, one, "uvit")
    # The real part of the root counts.
    assert metrics.frechet_distance(zero, indefinite, zero, one, "edm") == pytest.approx(0)
    with pytest.raises(ValueError, match="no definition"):
        metrics.frechet_distance(zero, one, zero, one, "clean")


def test_a_root_that_is_not_finite_is_regularised_by_some_definitions(monkeypatch):
    zero, one = np.zeros(2), np.eye(2)
    root = metrics._matrix_root

    def fails_on_plain(product):
        return root(product) if product[0, 0] != 1 else np.full((2, 2), np.nan)

    monkeypatch.setattr(metrics, "_matrix_root", fails_on_plain)
    shifted = metrics.frechet_distance(zero, one, zero, one, "guided_diffusion")
    assert shifted == pytest.approx(-4e-6, rel=1e-3)  # 2 + 2 - 2 * 2 * (1 + 1e-6)
    assert np.isnan(metrics.frechet_distance(zero, one, zero, one, "edm"))


def test_precision_and_recall_of_points_on_a_line():
    """Reference 0 1 2 3, generated 1.5 10 10.5 11; the nearest-neighbour balls are easy to draw."""
    reference = np.array([[0.0], [1], [2], [3]])
    generated = np.array([[1.5], [10], [10.5], [11]])
    # Reference balls have radius 1: only 1.5 lies inside one. The ball of 1.5 has radius 8.5.
    assert metrics.precision_recall(generated, reference, 1) == (0.25, 1)
    # A far generated point takes the ball of 1.5 away.
    assert metrics.precision_recall(generated[1:], reference, 1) == (0, 0)
    with pytest.raises(ValueError, match="neighbours"):
        metrics.precision_recall(generated, reference, 4)


def test_half_precision_distances_lose_accuracy_and_survive_overflow():
    draw = np.random.RandomState(0)
    near = (draw.randn(20, 40) * 0.1 + 5).astype(np.float32)
    exact = np.square(near[:, None].astype(np.float64) - near).sum(-1)
    rounded = metrics.half_squared_distances(near, near)
    off_diagonal = ~np.eye(20, dtype=bool)
    error = np.abs(rounded[off_diagonal] / exact[off_diagonal] - 1)
    assert error.max() > 0.1  # norms are 1000 times larger
    far = near * 200  # squared norms beyond the largest float16
    found = metrics.half_squared_distances(far, far)
    assert np.isfinite(found).all()
    assert found[off_diagonal] == pytest.approx(exact[off_diagonal] * 200**2, rel=0.1)
    # Overflow in one block leaves the others in float16.
    mixed = metrics.half_squared_distances(np.concatenate([near, far]), near, block=20)
    assert (mixed[:20] == rounded).all()


@pytest.mark.parametrize("width", [1, 8, 13, 32, 70, 1601])
def test_half_sum_has_the_accuracy_of_float16(width):
    terms = np.random.RandomState(0).rand(5, width).astype(np.float16)
    exact = terms.astype(np.float64).sum(1)
    assert metrics._half_sum(terms).dtype == np.float16
    assert metrics._half_sum(terms).astype(float) == pytest.approx(exact, rel=5e-3)


def test_inception_score_of_consecutive_splits():
    certain = (torch.eye(4) * 100).repeat_interleave(10, 0)  # ten sure images of each of 4 classes
    assert metrics.inception_score(certain) == pytest.approx(4)
    assert metrics.inception_score(certain, split_size=10) == pytest.approx(1)  # one class a split
