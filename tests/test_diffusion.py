"""Formulations: what must hold in each of them."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from study.diffusion import formulation
from study.diffusion.ddpm import (
    eps_of_x0,
    loss_weights,
    posterior_mean,
    v_of_x0,
    x0_of_eps,
    x0_of_v,
)
from study.diffusion.schedules import (
    Schedule,
    kept_steps,
    respace,
    schedule,
    split_mask,
    split_models,
    stable_diffusion_betas,
)
from study.diffusion.vpsde import CosineSDE, DiscreteProcess, LinearSDE
from study.diffusion.vpsde import eps_of_x0 as sde_eps
from study.diffusion.vpsde import x0_of_eps as sde_x0
from study.files import UserError
from study.spec.formulations import FORMULATIONS

SPECS = [
    *({"kind": kind} for kind in FORMULATIONS),
    {"kind": "vpsde", "prediction": "x0"},
    {"kind": "vpsde", "schedule": "cosine"},
    {"kind": "vpsde", "schedule": "discrete"},
    {"kind": "vpsde", "schedule": "discrete", "prediction": "x0"},
    {"kind": "ddpm", "prediction": "x0", "weighting": "sqrt_snr", "variance_values": "unit"},
    {"kind": "ddpm", "prediction": "v", "variance": "fixed_large", "schedule": "cosine"},
    {"kind": "ddpm", "weighting": "p2", "loss": "rescaled_mse", "steps": 200},
    {"kind": "ddpm", "loss": "rescaled_kl", "variance": "fixed_small"},
]


def images(count=6, size=4, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


def normal(count=6, size=4, seed=1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def draws(made, count=6) -> Tensor:
    make = torch.randn if made.draw == "normal" else torch.rand
    return make(count, generator=torch.Generator().manual_seed(2))


def network_for(made):
    """An arbitrary smooth function of the image and the noise number."""

    def network(x: Tensor, noise: Tensor, label=None, **conditioning) -> Tensor:
        assert x.dtype == noise.dtype == torch.float32 and noise.shape == (len(x),)
        out = (0.7 * x + 0.1 * (noise / 100).cos()[:, None, None, None]).tanh()
        if label is not None:
            out = out + 0.1 * label[:, None, None, None]
        return torch.cat([out] + [0.3 * out] * (made.output_multiplier - 1), 1)

    return network


# The registry


def test_registry_imports_no_torch_until_a_formulation_is_made():
    code = "import sys, study.diffusion, study.spec.formulations; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_every_kind_has_options_and_documentation_of_each():
    assert set(FORMULATIONS) == set(FORMULATIONS)
    for model in FORMULATIONS.values():
        for name, about in model.model_fields.items():
            assert name == "kind" or about.description


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "edn"}, "kind 'edn' is unknown"),
        ({"kind": "edm", "P_men": 1}, "formulation.P_men"),
        ({"kind": "edm", "sigma_data": 0}, "formulation.sigma_data"),
        ({"kind": "ddpm", "schedule": "sqrt"}, "formulation.schedule"),
        ({"kind": "ddpm", "splits": [0.25]}, "splits needs split"),
        ({"kind": "ddpm", "splits": [0.25], "split": 2}, "split must lie in 0..1"),
        ({"kind": "ddpm", "splits": [1e8], "split": 0}, "empty"),
        ({"kind": "ddpm", "steps": 10}, "betas above 1"),
        ({"kind": "ve", "sigma_max": 0.01}, "sigma_min must be smaller"),
    ],
)
def test_mistakes_are_told_in_one_line(spec, words):
    with pytest.raises(UserError) as error:
        formulation(spec)
    assert words in str(error.value) and "\n" not in str(error.value)


# What holds in every formulation


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_loss_and_denoiser_agree_on_the_clean_image(spec):
    made = formulation(spec)
    network = network_for(made)
    label = torch.arange(6)
    loss = made.loss(network, images(), draws(made), normal(), label)
    a, s = (value.float()[:, None, None, None] for value in made.scales(loss.level))
    torch.testing.assert_close(loss.noisy, a * images() + s * normal())
    x = loss.noisy / a
    denoised = made.denoiser(network)(x, loss.sigma, label)
    kind = getattr(made.options, "prediction", "x0")
    if getattr(made.options, "weighting", "uniform") != "uniform":
        kind = "x0"
    clean = {
        "x0": lambda: loss.prediction,
        "eps": lambda: (loss.noisy - s * loss.prediction) / a,
        "v": lambda: a * loss.noisy - s * loss.prediction,
    }[kind]()
    torch.testing.assert_close(denoised, clean, rtol=1e-4, atol=1e-4 * float(loss.sigma.max()))
    assert loss.per_sample.shape == loss.level.shape == loss.sigma.shape == (6,)
    assert torch.isfinite(loss.per_sample).all()
    reduced = loss.elements.flatten(1)
    family = spec["kind"] in ("edm", "vp", "ve", "iddpm")
    torch.testing.assert_close(loss.per_sample, reduced.sum(1) if family else reduced.mean(1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_denoiser_takes_any_float_type_and_scalar_noise_levels(spec):
    made = formulation(spec)
    denoise = made.denoiser(network_for(made))
    x = images()
    sigma = float(denoise.round_sigma(torch.tensor(0.7)))
    batch = denoise(x, torch.full((6,), sigma))
    assert batch.dtype == torch.float32 and batch.shape == x.shape
    torch.testing.assert_close(denoise(x.double(), sigma), batch)
    torch.testing.assert_close(denoise(x, torch.tensor(sigma, dtype=torch.float64)), batch)
    torch.testing.assert_close(denoise(x[:1], torch.tensor([sigma]).reshape(1, 1, 1, 1)), batch[:1])
    assert 0 <= denoise.sigma_min < 0.05 and denoise.sigma_max > 10
    twice = denoise.round_sigma(denoise.round_sigma(torch.tensor([0.1, 3.3])))
    assert torch.equal(twice, denoise.round_sigma(torch.tensor([0.1, 3.3])))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_noise_levels_are_positive_finite_and_within_what_the_denoiser_supports(spec):
    made = formulation(spec)
    ends = torch.tensor([-3.0, 3.0]) if made.draw == "normal" else torch.tensor([0.0, 1 - 2**-24])
    sigma = made.sigma(made.levels(ends))
    assert ((sigma > 0) & torch.isfinite(sigma)).all()
    denoise = made.denoiser(network_for(made))
    if spec["kind"] != "vpsde":  # its times reach below and above published sampling
        assert sigma.min() >= denoise.sigma_min * 0.9 and sigma.max() <= denoise.sigma_max * 1.001
    loss = made.loss(network_for(made), images(2), ends, normal(2))
    assert torch.isfinite(loss.per_sample).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_noise_scale_multiplies_what_the_network_is_told(spec):
    told = []
    for scale in (1.0, 2.5):
        made = formulation(spec, noise_scale=scale)
        inner = network_for(made)

        def network(x, noise, label=None, inner=inner, **conditioning):
            told.append(noise)
            return inner(x, noise, label)

        loss = made.loss(network, images(), draws(made), normal())
        made.denoiser(network)(images(), loss.sigma)
        torch.testing.assert_close(told[-2], made.noise_number(loss.level))
    torch.testing.assert_close(told[2], 2.5 * told[0])
    torch.testing.assert_close(told[3], 2.5 * told[1])


def test_a_perfect_denoiser_has_no_loss():
    made = formulation({"kind": "edm"})
    clean = images()
    loss = made.denoiser_loss(lambda *_, **__: clean, clean, draws(made), normal())
    assert loss.per_sample.eq(0).all()


# EDM family


def test_edm_inputs_and_targets_have_unit_variance():
    made = formulation({"kind": "edm", "sigma_data": 0.5})
    for sigma in (0.01, 0.5, 50.0):
        c = made.coefficients(torch.tensor([sigma]))
        variance = 0.5**2 + sigma**2
        assert float(c.input**2 * variance) == pytest.approx(1)
        # target of F: (y - c_skip (y + n)) / c_out
        residual = (1 - c.skip) ** 2 * 0.5**2 + c.skip**2 * sigma**2
        assert float(residual / c.out**2) == pytest.approx(1, rel=1e-4)
        assert float(made.weight(torch.tensor([sigma])) * c.out**2) == pytest.approx(1, rel=1e-5)


def test_vp_time_and_noise_level_are_inverse():
    made = formulation({"kind": "vp"})
    t = torch.linspace(1e-5, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(made.time_of_sigma(made.sigma_of_time(t)), t, rtol=1e-6, atol=1e-9)
    assert made.sigma_min == pytest.approx(math.sqrt(math.expm1(0.5 * 19.9e-10 + 1e-6)))
    assert made.sigma_max == pytest.approx(152.167, rel=1e-5)


def test_iddpm_rounds_to_its_table():
    made = formulation({"kind": "iddpm", "M": 50})
    assert (made.u.diff() < 0).all() and made.u[50] == 0
    inside = made.levels(torch.linspace(0, 0.999, 200))
    assert torch.equal(made.round_sigma(inside), inside)
    assert torch.equal(made.index(made.u), torch.arange(51))
    assert made.noise_number(made.u[:1]).item() == 49
    assert made.output_multiplier == 2
    assert formulation({"kind": "iddpm", "variance_channels": False}).output_multiplier == 1


# U-ViT's processes


@pytest.mark.parametrize(
    "process",
    [LinearSDE(), CosineSDE(), DiscreteProcess(stable_diffusion_betas())],
    ids=lambda process: type(process).__name__,
)
def test_process_functions_belong_together(process):
    t = torch.linspace(process.t_min, process.t_max, 40, dtype=torch.float64)
    a, b = process.cum_alpha(t), process.cum_beta(t)
    torch.testing.assert_close(a + b, torch.ones_like(t))
    torch.testing.assert_close(process.nsr(t), b / a)
    torch.testing.assert_close(process.snr(t), a / b)
    torch.testing.assert_close(process.time(process.nsr(t).sqrt()), t, rtol=1e-6, atol=1e-7)
    x, eps = normal(40), normal(40, seed=5)
    x0 = sde_x0(process, x, t, eps)
    torch.testing.assert_close(sde_eps(process, x, t, x0), eps, rtol=1e-2, atol=2e-2)
    if not isinstance(process, DiscreteProcess):
        # d ln(cum_alpha) / dt = -g^2
        step = 1e-6
        slope = (process.cum_alpha(t + step).log() - a.log()) / step
        inner = slice(1, -1)
        torch.testing.assert_close(
            slope[inner], -(process.diffusion(t)[inner] ** 2), rtol=1e-3, atol=1e-3
        )


def test_discrete_process_interpolates_between_its_steps():
    process = DiscreteProcess(stable_diffusion_betas())
    n = torch.tensor([1, 2, 500, 999, 1000])
    torch.testing.assert_close(process.cum_beta(n), process.cum_beta(n.double()), rtol=1e-9, atol=0)
    between = process.cum_alpha(torch.tensor([1.5], dtype=torch.float64))
    assert process.cum_alphas[2] < between < process.cum_alphas[1]
    outside = process.cum_alpha(torch.tensor([0.5, 1000.5], dtype=torch.float64))
    assert process.cum_alphas[1] < outside[0] < 1 and outside[1] < process.cum_alphas[1000]


def test_vpsde_levels_and_network_times():
    continuous = formulation({"kind": "vpsde"})
    t = continuous.levels(torch.tensor([0.0, 0.25, 0.75]))
    assert t[0] > 0 and t[1:].tolist() == [0.25, 0.75]
    assert continuous.noise_number(t)[2].item() == pytest.approx(999 * 0.75)
    discrete = formulation({"kind": "vpsde", "schedule": "discrete"})
    n = discrete.levels(torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert n.tolist() == [1, 501, 1000]
    assert discrete.noise_number(n).tolist() == [1, 501, 1000]


@pytest.mark.parametrize("schedule_name", ["linear", "cosine", "discrete"])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_vpsde_views_are_of_the_same_denoiser(schedule_name, prediction):
    made = formulation({"kind": "vpsde", "schedule": schedule_name, "prediction": prediction})
    denoise = made.denoiser(network_for(made))
    t = torch.full((6,), 300.0 if schedule_name == "discrete" else 0.3, dtype=torch.float64)
    a, s = made.scales(t)
    x = images()
    column = (slice(None), None, None, None)
    clean = denoise(x / a.float()[column], made.sigma(t))
    torch.testing.assert_close(denoise.x0(x, t), clean, rtol=1e-4, atol=1e-4)
    eps = (x - a.float()[column] * clean) / s.float()[column]
    torch.testing.assert_close(denoise.eps(x, float(t[0])), eps, rtol=1e-4, atol=1e-4)


# Discrete diffusion


def test_schedule_tables_are_those_of_the_chain():
    table = schedule("linear", 1000)
    a, b = table.alphas_cumprod, table.betas
    torch.testing.assert_close(a[10] * (1 - b[11]), a[11])
    torch.testing.assert_close(table.sigma, table.snr.rsqrt())
    # Bayes: 1 / posterior variance = alpha / beta + 1 / (1 - abar_prev)
    precision = (1 - b[1:]) / b[1:] + 1 / (1 - a[:-1])
    torch.testing.assert_close(1 / table.posterior_variance[1:], precision)
    assert torch.equal(table.nearest(table.sigma.float()), torch.arange(1000))
    assert table.nearest(torch.tensor([0.0, 1e9])).tolist() == [0, 999]
    assert table.at("betas", torch.tensor([3, 5])).dtype == torch.float64
    assert table.at("betas", torch.tensor([3, 5]), images(2)).shape == (2, 1, 1, 1)


def test_named_schedules():
    assert float(schedule("linear", 500).betas[-1]) == pytest.approx(0.04)
    assert float(schedule("linear0.015", 1000).betas[-1]) == pytest.approx(0.015)
    cosine = schedule("cosine", 1000)
    assert float(cosine.betas.max()) == 0.999
    middle = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert float(cosine.alphas_cumprod[499]) == pytest.approx(middle, rel=1e-3)
    assert torch.equal(schedule("squaredcos_cap_v2", 1000).betas, cosine.betas)
    for name in ("linear-1", "quadratic", "linear1e-3"):
        with pytest.raises(UserError, match="unknown name"):
            schedule(name, 1000)


def test_respacing():
    assert kept_steps(10, "") == list(range(10))
    assert kept_steps(10, "5") == [0, 2, 4, 7, 9]  # strides of 9/4: 2.25, 4.5, 6.75
    assert kept_steps(10, "2,3") == [0, 4, 5, 7, 9]
    assert kept_steps(11, "1,1,1") == [0, 4, 8]  # sections of 4, 4, 3
    assert kept_steps(1000, "ddim25") == list(range(0, 1000, 40))
    base = schedule("cosine", 1000)
    short = respace(base, "50")
    torch.testing.assert_close(short.alphas_cumprod, base.alphas_cumprod[short.timestep_map])
    assert short.original_steps == 1000 and len(short) == 50
    twice = respace(short, "10")
    torch.testing.assert_close(twice.alphas_cumprod, base.alphas_cumprod[twice.timestep_map])
    one = respace(base, "1")
    assert torch.isfinite(one.posterior_log_variance_clipped).all()
    for wrong in ("ddim30x", "0", "11,-1", "ddim", "a"):
        with pytest.raises(UserError, match="is none of"):
            kept_steps(1000, wrong)
    with pytest.raises(UserError, match="no integer stride"):
        kept_steps(1000, "ddim300")
    with pytest.raises(UserError, match="section of 5"):
        kept_steps(10, "6,1")
    with pytest.raises(UserError, match="betas"):
        Schedule(torch.tensor([0.1, 1.2]))


def test_conversions_between_predictions():
    table = schedule("linear", 1000)
    t = torch.tensor([0, 10, 300, 700, 990, 999])
    x0, eps = images(), normal()
    x = table.at("signal", t, x0) * x0 + table.at("noise", t, x0) * eps
    torch.testing.assert_close(eps_of_x0(table, x, t, x0), eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x0_of_eps(table, x, t, eps), x0, rtol=1e-3, atol=1e-3)
    v = table.at("signal", t, x0) * eps - table.at("noise", t, x0) * x0
    torch.testing.assert_close(v_of_x0(table, x, t, x0), v, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x0_of_v(table, x, t, v), x0, rtol=1e-3, atol=1e-3)
    assert torch.equal(posterior_mean(table, x, torch.zeros_like(t), x0), x0)


def test_the_two_conventions_of_learned_variance_point_in_opposite_directions():
    signed = formulation({"kind": "ddpm"})
    unit = formulation({"kind": "ddpm", "variance_values": "unit"})
    small = formulation({"kind": "ddpm", "variance": "fixed_small"})
    x, t = images(), torch.tensor([0, 1, 5, 100, 500, 999])
    one = torch.ones_like(x)
    posterior = small.log_variance(None, x, t).expand_as(x)
    beta = signed.schedule.at("log_betas", t, x).expand_as(x)
    torch.testing.assert_close(signed.log_variance(one, x, t), beta)
    torch.testing.assert_close(signed.log_variance(-one, x, t), posterior)
    torch.testing.assert_close(unit.log_variance(one, x, t), posterior)
    torch.testing.assert_close(unit.log_variance(0 * one, x, t), beta)
    torch.testing.assert_close(
        unit.log_variance(0.3 * one, x, t), signed.log_variance(0.4 * one, x, t)
    )
    large = formulation({"kind": "ddpm", "variance": "fixed_large"}).log_variance(None, x, t)
    torch.testing.assert_close(large.expand_as(x)[1:], beta[1:])
    torch.testing.assert_close(large[0].expand_as(x[0]), posterior[0])


def test_weights_of_the_x0_error_match_a_uniform_eps_error_at_snr():
    eps = formulation({"kind": "ddpm", "variance": "fixed_small"})
    snr = formulation({"kind": "ddpm", "variance": "fixed_small", "weighting": "snr"})
    t = torch.tensor([1, 10, 100, 500, 800, 999])
    network = network_for(eps)
    plain = eps.loss_at(t, network, images(), normal())
    weighted = snr.loss_at(t, network, images(), normal())
    torch.testing.assert_close(weighted.per_sample, plain.per_sample, rtol=1e-3, atol=1e-4)
    table = eps.schedule
    torch.testing.assert_close(loss_weights(table, "snr+1"), 1 / (1 - table.alphas_cumprod))
    assert float(loss_weights(table, "truncated_snr").min()) == 1


@pytest.mark.parametrize("kind", ["mse", "rescaled_mse", "kl", "rescaled_kl"])
def test_which_loss_trains_what(kind):
    made = formulation({"kind": "ddpm", "loss": kind, "steps": 100})
    t = torch.tensor([0, 1, 10, 50, 80, 99])
    mean = normal(seed=8).requires_grad_()
    variance = (0.1 * normal(seed=9)).requires_grad_()
    output = torch.cat([mean, variance], 1)
    loss = made.loss_at(t, lambda *_, **__: output, images(), normal())
    base = formulation({"kind": "ddpm", "loss": kind.removeprefix("rescaled_"), "steps": 100})
    plain = base.loss_at(t, lambda *_, **__: output, images(), normal())
    factor = {"rescaled_mse": 0.1, "rescaled_kl": 100.0}.get(kind, 1.0)
    torch.testing.assert_close(loss.terms["vb"], factor * plain.terms["vb"])
    if kind.endswith("mse"):
        torch.testing.assert_close(loss.per_sample, loss.terms["mse"] + loss.terms["vb"])
        (gradient,) = torch.autograd.grad(loss.terms["mse"].sum(), mean, retain_graph=True)
        loss.per_sample.sum().backward()
        torch.testing.assert_close(mean.grad, gradient)  # the variational term adds nothing
    else:
        torch.testing.assert_close(loss.per_sample, loss.terms["vb"])
        loss.per_sample.sum().backward()
        assert mean.grad.abs().amin((1, 2, 3)).min() > 0
    assert variance.grad.abs().sum() > 0


def test_variational_term_is_zero_for_the_true_posterior_and_counts_bits():
    made = formulation({"kind": "ddpm", "prediction": "x0"})
    quantised = (images() * 127.5 + 127.5).round() / 127.5 - 1
    t = torch.tensor([1, 5, 50, 400, 800, 999])
    output = torch.cat([quantised, -torch.ones_like(quantised)], 1)  # posterior variance
    loss = made.loss_at(t, lambda *_, **__: output, quantised, normal())
    torch.testing.assert_close(loss.terms["vb"], torch.zeros(6), rtol=0, atol=1e-6)
    first = made.loss_at(torch.zeros_like(t), lambda *_, **__: output, quantised, normal())
    # At t = 0 the bin of half-width 1/255 has this share of the Gaussian around its middle.
    std = math.exp(0.5 * float(made.schedule.posterior_log_variance_clipped[0]))
    bits = -math.log2(math.erf(1 / 255 / std / math.sqrt(2)))
    torch.testing.assert_close(first.terms["vb"], torch.full((6,), bits), rtol=0.02, atol=1e-3)


def test_splits_cover_all_steps_and_their_losses_add_up():
    snr = schedule("linear", 1000).snr
    splits = [4.0, 0.25]
    masks = torch.stack([split_mask(snr, splits, j) for j in range(3)])
    assert torch.equal(masks.sum(0), torch.ones(1000, dtype=torch.int64))
    assert torch.equal(masks.int().argmax(0), split_models(snr, splits))
    # An SNR that equals a bound is sampled by the noisier model, trained by the cleaner one.
    tied = torch.tensor([5.0, 4.0, 1.0])
    assert split_models(tied, [4.0]).tolist() == [0, 1, 1]
    assert split_mask(tied, [4.0], 0).tolist() == [True, True, False]
    parts = [formulation({"kind": "ddpm", "splits": splits, "split": j}) for j in range(3)]
    whole = formulation({"kind": "ddpm"})
    network, total = network_for(whole), 0.0
    for part in parts:
        draw = (torch.arange(len(part.timesteps)) + 0.5) / len(part.timesteps)
        levels = part.levels(draw)
        assert torch.equal(levels, part.timesteps)
        loss = part.loss(network, images(len(draw)), draw, normal(len(draw)))
        plain = whole.loss_at(levels, network, images(len(draw)), normal(len(draw)))
        torch.testing.assert_close(loss.per_sample, plain.per_sample * len(draw) / 1000)
        total += part.share
    assert total == pytest.approx(1)


def test_rescaled_timesteps():
    made = formulation({"kind": "ddpm", "steps": 250, "rescale_timesteps": True})
    assert made.noise_number(torch.tensor([0, 100])).tolist() == [0, 400]
