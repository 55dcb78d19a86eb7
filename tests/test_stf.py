"""Stable targets: exactness against brute force, limits, memory, and every formulation."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from study.diffusion import formulation
from study.diffusion.stf import StableTarget, reference_batch
from study.spec.formulations import FORMULATIONS

SIGMAS = (1e-3, 1e-2, 0.1, 0.5, 2.0, 20.0, 80.0, 1e3)


def images(count: int, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


def brute_force(x: Tensor, reference: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Weights [B,n] from the differences themselves, in double precision."""
    x, reference = x.double().flatten(1), reference.double().flatten(1)
    gap = x[:, None] - a.double()[:, None, None] * reference
    return (-gap.square().sum(2) / (2 * s.double()[:, None] ** 2)).softmax(1)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_weights_and_targets_match_brute_force_at_every_noise_level(scale):
    reference = images(48, 32)
    # Neighbours closer than the noise, so that small noise levels are undecided as well.
    for j, sigma in enumerate(SIGMAS[:4]):
        reference[20 + j] = reference[j] + sigma / 30 * images(1, 32, seed=j + 1)[0]
    batch = reference[: len(SIGMAS)]
    s = torch.tensor(SIGMAS)
    a = torch.full_like(s, scale)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(5))
    x = scale * batch + s[:, None, None, None] * noise
    target = StableTarget(reference)
    expected = brute_force(x, reference, a, s)
    weights = target.weights(x, a, s)
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    stable = torch.einsum("bn,nchw->bchw", expected, reference.double())
    torch.testing.assert_close(target(x, a, s).double(), stable, rtol=0, atol=2e-6)
    # The levels of the test are not all trivial: some weight is shared, some is not.
    assert expected[:4].max(1).values.max() < 0.99
    assert expected[-1].max() < 0.1


def test_float32_distances_would_not_do_at_little_noise():
    reference = images(20, 32)
    reference[1] = reference[0] + 3e-5 * images(1, 32, seed=1)[0]
    a, s = torch.ones(1), torch.tensor([1e-3])
    x = reference[:1] + s * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    flat, rows = x.flatten(1), reference.flatten(1)
    distance = flat.square().sum(1, keepdim=True) - 2 * flat @ rows.T + rows.square().sum(1)
    single = (-distance / (2 * s**2)).softmax(1)
    exact = brute_force(x, reference, a, s)
    assert (single - exact).abs().max() > 0.1
    assert (StableTarget(reference).weights(x, a, s) - exact).abs().max() < 1e-6


def test_limits_are_the_image_itself_and_the_mean_of_the_reference():
    reference = images(30)
    batch = reference[:4]
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(3))
    one = torch.ones(4)
    target = StableTarget(reference)
    assert torch.equal(target(batch + 1e-3 * noise, one, 1e-3 * one), batch)
    far = target(batch + 1e5 * noise, one, 1e5 * one)
    torch.testing.assert_close(far, reference.mean(0).expand(4, -1, -1, -1), rtol=0, atol=1e-3)


def test_reference_in_chunks_gives_the_same_targets():
    reference = images(37)
    x = reference[:5] + 0.7 * torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    a, s = torch.full((5,), 0.9), torch.tensor([0.01, 0.1, 0.7, 3.0, 50.0])
    whole, parts = StableTarget(reference), StableTarget(reference, chunk=8)
    torch.testing.assert_close(parts(x, a, s), whole(x, a, s), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.weights(x, a, s), whole.weights(x, a, s))


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_batch_times_reference_times_pixels():
    reference = images(200)
    batch, n, pixels = 50, 200, 192
    ones = torch.ones(batch)
    with _Largest() as mode:
        StableTarget(reference)(reference[:batch], ones, ones)
    assert mode.elements == n * pixels
    target = StableTarget(reference, chunk=20)
    with _Largest() as mode:
        target(reference[:batch], ones, ones)
    assert mode.elements == batch * pixels


def test_no_gradient_flows_through_the_target():
    reference = images(10).requires_grad_()
    x = images(2, seed=4).requires_grad_()
    assert not StableTarget(reference)(x, torch.ones(2), torch.ones(2)).requires_grad


def test_an_empty_reference_is_refused():
    with pytest.raises(ValueError, match="n >= 1"):
        StableTarget(torch.empty(0, 3, 8, 8))


def test_batch_of_one_works_where_the_published_code_fails():
    reference = images(12)
    x, one, sigma = reference[:1] + 0.5, torch.ones(1), torch.tensor([0.8])
    stable = StableTarget(reference)(x, one, sigma)
    expected = torch.einsum(
        "bn,nchw->bchw", brute_force(x, reference, one, sigma).float(), reference
    )
    torch.testing.assert_close(stable, expected, rtol=0, atol=1e-6)
    # Theirs: the noise level [1,1,1,1] is squeezed, which for a batch of one leaves no batch axis.
    with pytest.raises(IndexError):
        sigma.reshape(1, 1, 1, 1).squeeze()[:, None]


def test_reference_without_augmentation_is_kept_where_the_published_code_overwrites_it():
    given = images(16)
    training, rest = given[:8], given[8:]
    ours = reference_batch(training, rest)
    assert torch.equal(ours, given)
    # Theirs: the training images are assigned to the rest of the reference, so that every image
    # stands in it twice and the others are lost; other sizes raise.
    theirs = given.clone()
    theirs[8:] = training
    sigma, one = torch.full((8,), 1e4), torch.ones(8)
    x = training + sigma[:, None, None, None] * torch.randn(
        training.shape, generator=torch.Generator().manual_seed(0)
    )
    mean_ours, mean_theirs = StableTarget(ours)(x, one, sigma), StableTarget(theirs)(x, one, sigma)
    torch.testing.assert_close(mean_ours[0], given.mean(0), rtol=0, atol=2e-2)
    torch.testing.assert_close(mean_theirs[0], training.mean(0), rtol=0, atol=2e-2)
    assert (mean_ours - mean_theirs).abs().max() > 0.3
    with pytest.raises(RuntimeError):
        given.clone()[8:].copy_(training[:5])


SPECS = [{"kind": kind} for kind in FORMULATIONS] + [
    {"kind": "vpsde", "schedule": "cosine", "prediction": "x0"},
    {"kind": "vpsde", "schedule": "discrete"},
    {"kind": "ddpm", "prediction": "v", "variance": "fixed_small"},
    {"kind": "ddpm", "prediction": "x0", "weighting": "sqrt_snr", "variance_values": "unit"},
]


def network_for(made, channels=3):
    def network(x, noise, label=None, **conditioning):
        return torch.cat([x * 0.5 + 0.1] * made.output_multiplier, 1).tanh()

    return network


def draws(made, count: int, seed: int = 9) -> Tensor:
    make = torch.randn if made.draw == "normal" else torch.rand
    return make(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_stable_targets_work_in_every_formulation(spec):
    made = formulation(spec)
    reference = images(40)
    batch = reference[:16]
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(7))
    draw = draws(made, 16)
    network = network_for(made)
    plain = made.loss(network, batch, draw, noise)
    stable = made.loss(network, batch, draw, noise, stable_target=StableTarget(reference))
    a, s = (v.float() for v in made.scales(stable.level))
    expected = torch.einsum(
        "bn,nchw->bchw", brute_force(stable.noisy, reference, a, s).float(), reference
    )
    torch.testing.assert_close(stable.clean, expected, rtol=0, atol=1e-5)
    assert torch.equal(plain.clean, batch)
    assert torch.isfinite(stable.per_sample).all()
    assert (stable.per_sample - plain.per_sample).abs().max() > 1e-3
    # Whatever the parametrisation, target and noisy image together say which x_0 is meant.
    column = (slice(None), None, None, None)
    if getattr(made.options, "prediction", "x0") == "eps":
        rebuilt = a[column] * stable.clean + s[column] * stable.target
        torch.testing.assert_close(rebuilt, stable.noisy, rtol=1e-4, atol=1e-4)
    elif made.options.kind == "ddpm" and made.options.prediction == "v":
        rebuilt = a[column] * stable.noisy - s[column] * stable.target
        torch.testing.assert_close(rebuilt, stable.clean, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(stable.target, stable.clean)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_reference_of_the_image_alone_is_denoising_score_matching(spec):
    made = formulation(spec)
    batch = images(1)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(7))
    draw = draws(made, 1)
    network = network_for(made)
    plain = made.loss(network, batch, draw, noise)
    stable = made.loss(network, batch, draw, noise, stable_target=StableTarget(batch))
    assert torch.equal(stable.per_sample, plain.per_sample)


@pytest.mark.parametrize("kind", ["ve", "vp"])
def test_ve_and_vp_losses_use_the_stable_target_where_the_published_ones_do_not(kind):
    # Theirs: the VE loss accepts the arguments and ignores them, i.e. is the plain loss; the VP
    # loss does not accept them, i.e. raises TypeError.
    made = formulation({"kind": kind})
    reference = images(40)
    noise = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    draw = torch.full((8,), 0.8 if kind == "ve" else 0.2)
    network = network_for(made)
    published = made.loss(network, reference[:8], draw, noise)
    ours = made.loss(network, reference[:8], draw, noise, stable_target=StableTarget(reference))
    mean = reference.mean(0)
    assert (published.target - mean).abs().mean() > 0.3
    assert (ours.target - mean).abs().mean() < 0.3 * (published.target - mean).abs().mean()


def test_kl_loss_learns_the_mean_of_the_stable_image_and_the_variance_of_the_image():
    made = formulation({"kind": "ddpm", "loss": "kl", "prediction": "x0"})
    reference = images(6)
    batch = reference[:3]
    t = torch.tensor([300, 500, 900])
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(1))

    def gradient(stable_target):
        output = torch.cat([batch * 0.5, batch * 0.3], 1).requires_grad_()
        loss = made.loss_at(t, lambda *_, **__: output, batch, noise, stable_target=stable_target)
        loss.per_sample.sum().backward()
        return output.grad[:, :3], output.grad[:, 3:], loss

    stable = StableTarget(reference)
    mean_dsm, variance_dsm, plain = gradient(None)
    mean_stf, variance_stf, steady = gradient(stable)
    torch.testing.assert_close(variance_stf, variance_dsm)
    torch.testing.assert_close(steady.per_sample, plain.per_sample)
    # d KL / d (x_0 prediction) is proportional to prediction - x_0.
    prediction = batch * 0.5
    crossed = mean_stf * (prediction - batch)
    size = crossed.abs().max().item()
    expected = mean_dsm * (prediction - steady.clean)
    torch.testing.assert_close(crossed, expected, rtol=1e-3, atol=1e-4 * size)
    assert (steady.clean - batch).abs().max() > 0.1
