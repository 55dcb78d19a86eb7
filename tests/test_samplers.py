"""Samplers: orders of convergence, seeds, counts, guidance."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from study.diffusion import formulation
from study.diffusion.guidance import guided
from study.diffusion.samplers import NoiseSource, sampler
from study.diffusion.samplers.ablation import default_range, vp_schedule
from study.diffusion.samplers.ancestral import dynamic_threshold
from study.diffusion.samplers.base import StoredNoise
from study.diffusion.samplers.dpm_solver import fast_orders
from study.diffusion.split import SplitDenoiser
from study.files import UserError
from study.parity.mixture import Mixture
from study.spec.formulations import DDPMOptions
from study.spec.guidance import guidance_options, nfe
from study.spec.samplers import SAMPLERS

STD = 0.5
"""Standard deviation of the Gaussian data that the analytic denoisers know."""

SHORT = {
    "edm_heun": {"kind": "edm_heun", "steps": 6},
    "edm_ablation": {"kind": "edm_ablation", "steps": 6, "discretization": "vp", "schedule": "vp"},
    "dpm_solver": {"kind": "dpm_solver", "steps": 7},
    "dpm_solver_pp": {"kind": "dpm_solver_pp", "steps": 8},
    "euler_maruyama": {"kind": "euler_maruyama", "steps": 9},
    "ancestral": {"kind": "ancestral", "respacing": "10"},
    "ddim": {"kind": "ddim", "respacing": "ddim10"},
}
"""A short run of every kind."""

NOISY = {
    "edm_heun": SHORT["edm_heun"] | {"S_churn": 3.0},
    "edm_ablation": SHORT["edm_ablation"] | {"S_churn": 3.0, "scaling": "vp"},
    "euler_maruyama": SHORT["euler_maruyama"],
    "ancestral": SHORT["ancestral"],
    "ddim": SHORT["ddim"] | {"eta": 0.7},
}
"""The kinds that add noise, doing so."""


def gaussian(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """The best denoiser for data N(0, STD^2), in the precision of x."""
    return x * (STD**2 / (STD**2 + sigma**2))


class Counted:
    """A denoiser that counts its calls and shows the ends of a formulation."""

    def __init__(self, sigma_min: float = 0.0, sigma_max: float = math.inf) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.levels: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        self.levels.append(float(sigma))
        return gaussian(x, sigma)


# Orders of convergence, on data N(0, STD^2), where the ODE has a closed solution


def latents(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


def final_error(spec: dict, denoiser=gaussian, exact=None) -> float:
    z = latents()
    *_, last = sampler(spec).states(denoiser, z)
    wanted = exact if exact is not None else lambda z: z * spec["sigma_max"] * shrink(spec)
    return float((last.x - wanted(z.double())).abs().max())


def shrink(spec: dict) -> float:
    """x(0) / x(sigma_max) of the probability-flow ODE."""
    return STD / math.hypot(STD, spec["sigma_max"])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_edm(solver, order):
    spec = {"kind": "edm_heun", "solver": solver, "sigma_min": 1e-3, "sigma_max": 20.0, "rho": 3}
    coarse, fine = (final_error(spec | {"steps": steps}) for steps in (64, 128))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("alpha", [0.5, 2 / 3, 1.0])
@pytest.mark.parametrize(
    ("schedule", "scaling"), [("vp", "vp"), ("linear", "none"), ("ve", "none")]
)
def test_order_of_the_ablation_sampler(alpha, schedule, scaling):
    spec = {"kind": "edm_ablation", "alpha": alpha, "schedule": schedule, "scaling": scaling}
    spec |= {"sigma_min": 1e-3, "sigma_max": 20.0, "rho": 7.0, "discretization": "edm"}
    coarse, fine = (final_error(spec | {"steps": steps}) for steps in (100, 200))
    # The midpoint rule gains an order where dx/dt is smooth in sigma^2, as with schedule ve.
    assert 1.75 < math.log2(coarse / fine) < 3.2
    rough, rougher = (
        final_error(spec | {"steps": steps, "solver": "euler"}) for steps in (200, 100)
    )
    assert math.log2(rougher / rough) == pytest.approx(1, abs=0.25)
    assert fine < rough / 10


def vp_end(t_end: float):
    """Closed solution of the linear VP process from t = 1 to t_end."""
    walked = formulation({"kind": "vpsde"}).process
    times = torch.tensor([1.0, t_end], dtype=torch.float64)
    spread = (walked.cum_alpha(times) * STD**2 + walked.cum_beta(times)).sqrt()
    return lambda z: z * (spread[1] / spread[0])


@pytest.mark.parametrize("kind", ["dpm_solver", "dpm_solver_pp"])
@pytest.mark.parametrize("spacing", ["logsnr", "time"])
def test_dpm_solver_is_of_third_order(kind, spacing):
    spec = {"kind": kind, "spacing": spacing, "t_end": 0.05, "schedule": "linear"}
    coarse, fine = (final_error(spec | {"steps": steps}, exact=vp_end(0.05)) for steps in (95, 191))
    assert 2.7 < math.log2(coarse / fine) < 3.6


def test_order_of_euler_on_the_ode():
    spec = {"kind": "euler_maruyama", "form": "ode", "t_end": 1e-4}
    coarse, fine = (final_error(spec | {"steps": steps}, exact=vp_end(0.0)) for steps in (400, 800))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


def test_ddim_approaches_the_ode():
    spec = {"kind": "ddim", "threshold": "none"}
    made = formulation({"kind": "ddpm"}).schedule
    ends = (made.alphas_cumprod[-1] * STD**2 + 1 - made.alphas_cumprod[-1]).sqrt()
    coarse, fine = (
        final_error(spec | {"respacing": respacing}, exact=lambda z: z * STD / ends)
        for respacing in ("ddim100", "")
    )
    assert fine < coarse / 5
    assert fine < 5e-3


def test_ddim_with_eta_one_is_ancestral_with_the_posterior_variance():
    z, noise = latents(), NoiseSource(range(8), (1, 2, 2))
    spec = {"respacing": "50", "threshold": "none"}
    ddim = sampler({"kind": "ddim", "eta": 1.0, **spec}).sample(gaussian, z, noise=noise)
    ddpm = sampler({"kind": "ancestral", "variance": "small", **spec})
    torch.testing.assert_close(ddim, ddpm.sample(gaussian, z, noise=noise), rtol=1e-5, atol=1e-6)


# Every sampler on every formulation

FORMULATIONS = {
    "edm": {"kind": "edm"},
    "vp": {"kind": "vp"},
    "ve": {"kind": "ve"},
    "iddpm": {"kind": "iddpm"},
    "vpsde-linear": {"kind": "vpsde"},
    "vpsde-cosine": {"kind": "vpsde", "schedule": "cosine", "prediction": "x0"},
    "vpsde-discrete": {"kind": "vpsde", "schedule": "discrete"},
    "ddpm-signed": {"kind": "ddpm", "prediction": "v"},
    "ddpm-unit": {"kind": "ddpm", "prediction": "x0", "variance_values": "unit"},
    "ddpm-fixed": {"kind": "ddpm", "variance": "fixed_small", "steps": 400},
    "ddpm-large": {"kind": "ddpm", "variance": "fixed_large", "rescale_timesteps": True},
    "ddpm-cosine": {"kind": "ddpm", "variance": "fixed_small", "schedule": "cosine"},
}


def gaussian_network(spec: dict):
    """The raw network whose denoiser is the best one for N(0, STD^2), and its formulation."""
    made = formulation(spec)
    kind, options = spec["kind"], made.options

    def level(number: Tensor) -> Tensor:
        """sigma from what the network is told."""
        number = number.double()
        if kind == "edm":
            return (4 * number).exp()
        if kind == "ve":
            return 2 * number.exp()
        if kind == "vp":
            return made.sigma_of_time(number / (options.M - 1))
        if kind == "iddpm":
            return made.u[options.M - 1 - number.long()].double()
        if kind == "vpsde":
            return made.process.nsr(number if made.discrete else number / 999).sqrt()
        return made.schedule.sigma[number.long()]

    def network(scaled: Tensor, number: Tensor, label: Tensor | None = None) -> Tensor:
        sigma = level(number)
        if kind in ("vpsde", "ddpm"):
            alpha = (1 + sigma**2).rsqrt().reshape(-1, 1, 1, 1)
            x, sigma = scaled.double() / alpha, sigma.reshape(-1, 1, 1, 1)
            clean = gaussian(x, sigma)
            eps = (x - clean) / sigma
            outputs = {"x0": clean, "eps": eps, "v": alpha * eps - alpha * sigma * clean}
            raw = outputs[options.prediction]
            if kind == "ddpm" and options.variance == "learned":
                # The posterior variance, in both conventions.
                small = -1.0 if options.variance_values == "signed" else 1.0
                raw = torch.cat([raw, torch.full_like(raw, small)], 1)
            return raw
        c = made.coefficients(sigma)
        skip, out, scale = (value.reshape(-1, 1, 1, 1) for value in (c.skip, c.out, c.input))
        x = scaled.double() / scale
        return (gaussian(x, sigma.reshape(-1, 1, 1, 1)) - skip * x) / out

    return made, network


LONG = {
    "edm_heun": {"kind": "edm_heun", "S_churn": 4.0},
    "edm_ablation": {"kind": "edm_ablation", "discretization": "ve", "steps": 40},
    "dpm_solver": {"kind": "dpm_solver", "steps": 15},
    "dpm_solver_pp": {"kind": "dpm_solver_pp", "steps": 30},
    "euler_maruyama": {"kind": "euler_maruyama", "steps": 100},
    "ancestral": {"kind": "ancestral", "respacing": "100", "threshold": "none"},
    "ddim": {"kind": "ddim", "respacing": "ddim50", "threshold": "none"},
}


@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("kind", LONG)
def test_every_sampler_draws_from_the_data_on_every_formulation(kind, name):
    made, network = gaussian_network(FORMULATIONS[name])
    spec = LONG[kind]
    if name == "ddpm-cosine" and kind == "dpm_solver":
        # Its last step has sigma 2e4, where steps even in lambda are wasted; Lu et al. stop there.
        spec = spec | {"t_start": 0.9946}
    noise = NoiseSource(range(100), (1, 4, 4), seed=3)
    images = sampler(spec).sample(made.denoiser(network), noise.latents(), noise=noise)
    assert images.dtype == torch.float32
    # 1600 independent values: three standard errors are 0.037 of the mean and 0.027 of the spread,
    # to which the samplers' own errors come.
    assert abs(float(images.mean())) < 0.04
    assert float(images.std()) == pytest.approx(STD, rel=0.1)


# Seeds


def test_rows_are_functions_of_their_own_seed():
    whole = NoiseSource(range(10), (3, 4, 4), seed=1)
    part = NoiseSource([7, 2], (3, 4, 4), seed=1)
    for k in (0, 5):
        assert torch.equal(whole.draw(k)[[7, 2]], part.draw(k))
    assert torch.equal(whole.latents()[[7, 2]], part.latents())
    assert torch.equal(whole.draw(3), whole.draw(3))
    distinct = [whole.latents(), whole.draw(0), whole.draw(1)]
    distinct += [NoiseSource(range(10), (3, 4, 4), seed=2).latents()]
    for i, first in enumerate(distinct):
        for second in distinct[:i]:
            assert not torch.isclose(first, second).any(0).all()
    assert len({row.sum().item() for row in whole.latents()}) == 10


def test_noise_is_standard_normal():
    draws = NoiseSource(range(2000), (1, 4, 4)).latents()
    assert abs(float(draws.mean())) < 0.02
    assert float(draws.std()) == pytest.approx(1, abs=0.02)
    assert float((draws**4).mean()) == pytest.approx(3, abs=0.15)
    first, second = draws[::2].flatten(), draws[1::2].flatten()
    assert abs(float((first * second).mean())) < 0.03


@pytest.mark.parametrize("kind", SAMPLERS)
def test_batch_size_and_order_change_nothing(kind):
    solver = sampler(NOISY.get(kind, SHORT[kind]))
    made, network = gaussian_network({"kind": "ddpm"} if kind == "ancestral" else {"kind": "vpsde"})
    denoiser = made.denoiser(network)

    def images(seeds: list[int]) -> Tensor:
        noise = NoiseSource(seeds, (2, 4, 4), seed=5)
        return solver.sample(denoiser, noise.latents(), noise=noise)

    whole = images(list(range(9)))
    parts = torch.cat([images([8, 7, 6, 5]), images([4]), images([3, 2, 1, 0])])
    assert torch.equal(whole, parts.flip(0))
    assert not torch.equal(whole[0], whole[1])


class NoDraws:
    """A noise source that must not be asked."""

    def draw(self, k: int) -> Tensor:
        raise AssertionError(f"draw {k} was made")


@pytest.mark.parametrize(
    "kind", ["edm_heun", "edm_ablation", "dpm_solver", "dpm_solver_pp", "ddim"]
)
def test_deterministic_samplers_draw_nothing(kind):
    drawn = sampler(SHORT[kind]).sample(gaussian, latents(), noise=NoDraws())
    assert torch.equal(drawn, sampler(SHORT[kind]).sample(gaussian, latents()))


def test_the_ode_draws_nothing():
    sampler({"kind": "euler_maruyama", "form": "ode", "steps": 5}).sample(
        gaussian, latents(), noise=NoDraws()
    )


@pytest.mark.parametrize("kind", NOISY)
def test_noise_reaches_the_sample(kind):
    solver = sampler(NOISY[kind])
    first, second = (
        solver.sample(gaussian, latents(), noise=NoiseSource(range(8), (1, 2, 2), seed=seed))
        for seed in (0, 1)
    )
    assert not torch.isclose(first, second).any()
    with pytest.raises(ValueError, match="NoiseSource"):
        solver.sample(gaussian, latents())


# Counts and options


@pytest.mark.parametrize("kind", SAMPLERS)
def test_evaluations_are_counted_right(kind):
    for steps in (1, 2, 3, 7, 12):
        spec = dict(SHORT[kind])
        spec["respacing" if "respacing" in spec else "steps"] = steps
        denoiser, calls = Counted(), []
        sampler(spec).sample(
            denoiser,
            latents(2),
            noise=NoiseSource(range(2), (1, 2, 2)),
            progress=lambda done, total, calls=calls: calls.append((done, total)),
        )
        count = len(denoiser.levels)
        assert count == sampler(spec).nfe == nfe(spec)
        assert calls[-1] == (count, count)
        assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_counts_without_running():
    assert nfe({"kind": "edm_heun", "steps": 18}) == 35
    assert nfe({"kind": "edm_heun", "steps": 18, "solver": "euler"}) == 18
    assert nfe({"kind": "dpm_solver", "steps": 50}, {"kind": "uvit", "scale": 0.4}) == 100
    assert nfe({"kind": "dpm_solver", "steps": 50}, {"kind": "uvit", "scale": 0}) == 50
    assert nfe({"kind": "ancestral", "respacing": "10,15,20"}) == 45
    assert nfe({"kind": "ancestral"}, formulation=DDPMOptions(steps=400)) == 400
    assert nfe({"kind": "ancestral"}) == 1000
    assert nfe({"kind": "ddim", "respacing": "ddim25"}, 1.0, DDPMOptions()) == 25


def test_dpm_solver_orders():
    assert fast_orders(10) == [3, 3, 3, 1]
    assert fast_orders(11) == [3, 3, 3, 2]
    assert fast_orders(12) == [3, 3, 3, 2, 1]
    assert all(sum(fast_orders(steps)) == steps for steps in range(1, 60))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_options_are_plain_json_and_described(kind):
    model = SAMPLERS[kind]
    text = json.dumps(model().model_dump(mode="json"), allow_nan=False)
    assert model.model_validate_json(text, strict=True) == model()
    schema = model.model_json_schema()
    assert json.dumps(schema, allow_nan=False)
    assert all(entry.get("description") for entry in schema["properties"].values())


def test_options_need_no_torch():
    code = (
        "import sys\n"
        "from study.spec.guidance import nfe\n"
        "assert nfe({'kind': 'edm_heun'}) == 35\n"
        "assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "edm_hen"}, "did you mean edm_heun"),
        ({}, "kind None is unknown"),
        ({"kind": "edm_heun", "stepz": 3}, "stepz"),
        ({"kind": "edm_heun", "steps": 0}, "steps"),
        ({"kind": "edm_heun", "sigma_min": 5, "sigma_max": 2}, "not below"),
        ({"kind": "ddim", "respacing": "every other"}, "no respacing"),
        ({"kind": "dpm_solver", "t_end": 0.5, "t_start": 0.2}, "not below"),
    ],
)
def test_mistakes_are_told_on_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        sampler(spec)
    assert "\n" not in str(error.value)


def test_impossible_respacing_is_told():
    with pytest.raises(UserError, match="stride"):
        sampler({"kind": "ddim", "respacing": "ddim999"}).sample(gaussian, latents())


# Noise levels


def test_levels_are_clipped_to_the_denoiser_and_rounded():
    denoiser = Counted(0.05, 10.0)
    for kind in ("edm_heun", "edm_ablation", "dpm_solver", "dpm_solver_pp"):
        denoiser.levels.clear()
        sampler(SHORT[kind]).sample(denoiser, latents(2))
        assert max(denoiser.levels) == pytest.approx(10.0), kind
        assert min(denoiser.levels) > 0.05 * (1 - 1e-6), kind
    made, network = gaussian_network({"kind": "iddpm"})
    levels = sampler({"kind": "edm_heun", "steps": 12}).sigmas(made.denoiser(network))
    assert torch.isin(levels[:-1].float(), made.u).all()
    assert levels[-1] == 0


def test_churn_stays_between_its_bounds():
    class Record:
        def __init__(self) -> None:
            self.drawn: list[int] = []

        def draw(self, k: int) -> Tensor:
            self.drawn.append(k)
            return torch.zeros(2, 1, 2, 2)

    for kind in ("edm_heun", "edm_ablation"):
        spec = {"kind": kind, "steps": 12, "S_churn": 2.0, "S_min": 0.1, "S_max": 5.0}
        spec |= {"sigma_min": 0.002, "sigma_max": 80.0}
        source = Record()
        solver = sampler(spec)
        solver.sample(gaussian, latents(2), noise=source)
        levels = solver.sigmas(gaussian)[:-1]
        assert source.drawn == torch.where((levels >= 0.1) & (levels <= 5.0))[0].tolist()


# Where we differ from released code, in numbers


def test_without_churn_the_vp_schedule_adds_no_noise():
    """Released: sqrt(sigma(t(sigma))^2 - sigma^2), which rounding leaves at 1e-7 to 1e-6."""
    solver = sampler({"kind": "edm_ablation", "discretization": "vp", "schedule": "vp"})
    schedule = solver.schedule(gaussian)
    sigma = schedule.sigma(schedule.time(solver.sigmas(gaussian)[:-1]))
    again = schedule.sigma(schedule.time(sigma))
    released = (again**2 - sigma**2).clamp(min=0).sqrt()
    assert 1e-9 < float(released.max()) < 1e-5
    solver.sample(gaussian, latents(), noise=NoDraws())


def test_default_range_of_the_vp_discretisation():
    """beta_d 19.9, as in EDM; STF's copy has the earlier 19.1."""
    assert default_range("vp", 1e-3)[1] == pytest.approx(152.17, abs=0.01)
    early = vp_schedule(19.1, 0.1).sigma(torch.tensor(1.0, dtype=torch.float64))
    assert float(early) == pytest.approx(124.58, abs=0.01)


def test_dpm_solver_in_float32_has_the_released_rounding():
    """s at t = 1e-4 is off by 0.3 percent in float32, and a sample moves by up to 5e-4."""
    points = torch.linspace(-1, 1, 8 * 16).sin().reshape(8, 1, 4, 4)
    mixture = Mixture(points, 0.2)
    denoiser = formulation({"kind": "vpsde"}).denoiser(
        lambda x, noise, label: vp_noise(mixture, x, noise)
    )
    z = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    spec = {"kind": "dpm_solver", "steps": 20}
    exact = sampler(spec).sample(denoiser, z)
    single = sampler(spec | {"precision": "float32"}).sample(denoiser, z)
    assert 1e-5 < float((exact - single).abs().max()) < 2e-3
    process = formulation({"kind": "vpsde"}).process
    rough = process.cum_beta(torch.tensor(1e-4)).sqrt()
    fine = process.cum_beta(torch.tensor(1e-4, dtype=torch.float64)).sqrt()
    assert 1e-3 < abs(float(rough / fine) - 1) < 5e-3


def vp_noise(mixture: Mixture, x: Tensor, noise: Tensor) -> Tensor:
    process = formulation({"kind": "vpsde"}).process
    t = noise.double() / 999
    a, s = (f(t).sqrt().reshape(-1, 1, 1, 1) for f in (process.cum_alpha, process.cum_beta))
    return (x - a * mixture(x, a, s)) / s


# Discrete samplers


def test_thresholds():
    x0 = torch.tensor([[0.1, -0.5, 0.9, 0.2], [0.0, -4.0, 2.0, 1.0]]).reshape(2, 1, 2, 2)
    top = dynamic_threshold(x0, 1.0)
    torch.testing.assert_close(top[0], x0[0])
    torch.testing.assert_close(top[1], x0[1] / 4)
    middle = dynamic_threshold(x0, 0.6)  # the nearest of 0, 1, 2, 4 at rank 1.8 is 2
    torch.testing.assert_close(middle[1], x0[1].clamp(-2, 2) / 2)
    for threshold, largest in (("none", 3.0), ("clip", 1.0), ("dynamic", 1.0)):
        solver = sampler({"kind": "ddim", "respacing": "5", "threshold": threshold})
        last = list(solver.states(lambda x, sigma, label: torch.full_like(x, 3.0), latents(2)))[-1]
        assert float(last.x.max()) == pytest.approx(largest)


def test_variances_of_ancestral_sampling():
    """The spread of the last noisy step is the posterior's, or beta's."""
    ones = StoredNoise(torch.ones(2, 1, 1, 2, 2))
    zeros = StoredNoise(torch.zeros(2, 1, 1, 2, 2))
    spec = {"kind": "ancestral", "respacing": "2", "threshold": "none"}
    for variance, table in (
        ("small", "posterior_log_variance_clipped"),
        ("large", "large_log_variance"),
    ):
        solver = sampler(spec | {"variance": variance})
        with_noise, without = (
            next(solver.states(gaussian, latents(1), noise=noise)).x for noise in (ones, zeros)
        )
        wanted = (getattr(solver.table(gaussian), table)[-1] / 2).exp()
        torch.testing.assert_close(with_noise - without, wanted.expand(1, 1, 2, 2))
    made, network = gaussian_network({"kind": "ddpm"})
    learned = sampler(spec).sample(made.denoiser(network), latents(1), noise=ones)
    small = sampler(spec | {"variance": "small"})
    torch.testing.assert_close(
        learned, small.sample(made.denoiser(network), latents(1), noise=ones)
    )


def test_splits_take_their_own_steps():
    made = formulation({"kind": "ddpm", "variance": "fixed_small", "prediction": "x0"})
    seen: dict[int, list[float]] = {0: [], 1: []}

    def network(index: int):
        def call(x: Tensor, number: Tensor, label: Tensor | None) -> Tensor:
            seen[index].append(float(number[0]))
            return torch.zeros_like(x)

        return call

    denoiser = SplitDenoiser([made.denoiser(network(0)), made.denoiser(network(1))], [0.25])
    spec = {"kind": "ancestral", "respacing": "50"}
    sampler(spec).sample(denoiser, latents(2), noise=NoiseSource(range(2), (1, 2, 2)))
    assert max(seen[0]) <= 395 < 396 <= min(seen[1])
    assert len(seen[0]) + len(seen[1]) == 50
    for calls in seen.values():
        calls.clear()
    sampler({"kind": "edm_heun", "steps": 10}).sample(denoiser, latents(2))
    assert len(seen[0]) + len(seen[1]) == 19
    assert max(seen[0]) <= 395 < 396 <= min(seen[1])
    with pytest.raises(UserError, match="2 models"):
        SplitDenoiser([made.denoiser(network(0))], [0.25])


# Guidance


class Labelled:
    """A denoiser that answers with its label plus the channel number."""

    sigma_min, sigma_max = 0.01, 50.0

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        channels = torch.arange(x.shape[1], dtype=x.dtype).reshape(1, -1, 1, 1)
        return torch.zeros_like(x) + channels + label.reshape(-1, 1, 1, 1)


def test_guidance_as_each_paper_defines_it():
    x, label = torch.zeros(2, 4, 2, 2), torch.tensor([1, 3])
    cond, null = Labelled()(x, 1.0, label), Labelled()(x, 1.0, torch.tensor([10, 10]))

    def mixed(kind: str, scale: float) -> Tensor:
        return guided(Labelled(), {"kind": kind, "scale": scale}, null_label=10)(x, 1.0, label)

    torch.testing.assert_close(mixed("edm", 1.5), null + 1.5 * (cond - null))
    torch.testing.assert_close(mixed("patch", 1.5), null + 1.5 * (cond - null))
    torch.testing.assert_close(mixed("uvit", 0.4), cond + 0.4 * (cond - null))
    torch.testing.assert_close(mixed("uvit", 0.4), mixed("edm", 1.4))
    udit = mixed("udit", 1.5)
    torch.testing.assert_close(udit[:, :3], (null + 1.5 * (cond - null))[:, :3])
    torch.testing.assert_close(udit[:, 3:], cond[:, 3:])


def test_no_guidance_is_the_denoiser_itself():
    denoiser = Labelled()
    for guidance in (None, {"kind": "uvit", "scale": 0}, {"kind": "edm", "scale": 1}):
        assert guided(denoiser, guidance, 10) is denoiser
    wrapped = guided(denoiser, 3.0, 10)
    assert (wrapped.sigma_min, wrapped.sigma_max) == (0.01, 50.0)
    assert not hasattr(wrapped, "output")


def test_a_bare_scale_takes_the_kind_of_the_formulation():
    kinds = {
        "edm": "edm",
        "vpsde-linear": "uvit",
        "ddpm-signed": "udit",
        "ddpm-unit": "patch",
    }
    for name, kind in kinds.items():
        made, network = gaussian_network(FORMULATIONS[name])
        assert guided(made.denoiser(network), 2.5, 10).options.kind == kind
        assert guidance_options(2.5, made.options).kind == kind


def test_guidance_needs_labels():
    denoiser = guided(Labelled(), 3.0, 10)
    with pytest.raises(UserError, match="labels"):
        denoiser(torch.zeros(1, 1, 2, 2), 1.0)
    with pytest.raises(UserError, match="no classes"):
        guided(Labelled(), 3.0, 0)
    with pytest.raises(UserError, match="scale"):
        guided(Labelled(), {"kind": "edm"}, 10)
    with pytest.raises(ValidationError):
        SAMPLERS["ddim"](guidance=3.0)


def test_discrete_guidance_guides_the_mean_and_keeps_the_variance():
    """In float64 Patch Diffusion's way through the noise changes nothing; in float32, 1e-4."""
    points = torch.linspace(-1, 1, 8 * 16).sin().reshape(8, 1, 4, 4)
    made = formulation({"kind": "ddpm", "prediction": "x0", "variance_values": "unit"})
    mixture = Mixture(points, 0.2, classes=2)

    def network(x: Tensor, number: Tensor, label: Tensor) -> Tensor:
        abar = made.schedule.alphas_cumprod[number.long()]
        clean = mixture(x, abar.sqrt(), (1 - abar).sqrt(), label)
        return torch.cat([clean, label.reshape(-1, 1, 1, 1).expand_as(clean)], 1)

    plain = made.denoiser(network)
    patch = guided(plain, {"kind": "patch", "scale": 4.0}, null_label=2)
    x, t, label = latents(4).repeat(1, 1, 2, 2), torch.full((4,), 999), torch.tensor([0, 1, 0, 1])
    cond, null = plain.output(x, t, label), plain.output(x, t, torch.full((4,), 2))
    wanted = null[:, :1] + 4 * (cond[:, :1] - null[:, :1])
    double, single = patch.output(x.double(), t, label), patch.output(x, t, label)
    torch.testing.assert_close(double[:, :1], wanted.double(), rtol=1e-6, atol=1e-6)
    assert 1e-6 < float((single[:, :1] - wanted).abs().max()) < 1e-3
    torch.testing.assert_close(single[:, 1:], cond[:, 1:])


def test_guidance_sharpens_the_class():
    """With stronger guidance, samples stand nearer to their class's centres."""
    points = torch.cat([torch.full((4, 1, 2, 2), -0.5), torch.full((4, 1, 2, 2), 0.5)])
    mixture = Mixture(points, 0.4, classes=2)

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return mixture(x, 1.0, sigma, label)

    label = torch.tensor([1] * 64)
    means = [
        float(
            sampler({"kind": "edm_heun", "steps": 12})
            .sample(guided(denoiser, scale, 2), latents(64), label)
            .mean()
        )
        for scale in (1.0, 2.0, 4.0)
    ]
    assert means[0] == pytest.approx(0.5, abs=0.1)
    assert means[0] < means[1] < means[2]


def test_draws_that_are_made_ahead_are_the_same():
    plain, ahead = (NoiseSource(range(3), (2, 4, 4), ahead=one) for one in (False, True))
    assert torch.equal(plain.latents(), ahead.latents())
    for k in (0, 1, 2, 5, 6, 0):
        assert torch.equal(plain.draw(k), ahead.draw(k))
    threads = [one for one in threading.enumerate() if one.name.startswith("study-ahead")]
    assert threads
    del ahead  # as between the batches of a generation: no thread may stay
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
