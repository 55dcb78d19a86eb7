"""U-ViT's VP SDE, its discrete form and its samplers."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from study.diffusion import formulation
from study.diffusion.base import column
from study.diffusion.guidance import guided
from study.diffusion.samplers import sampler
from study.diffusion.samplers.base import StoredNoise
from study.diffusion.schedules import stable_diffusion_betas
from study.diffusion.vpsde import VPSDE, eps_of_x0, score_of_eps, x0_of_eps
from study.parity.case import Case, Tensors
from study.parity.mixture import Mixture

SDES = {
    "VPSDE": ("linear", {"beta_min": "beta_min", "beta_max": "beta_max"}),
    "VPSDECosine": ("cosine", {"s": "cosine_s"}),
}
"""Official classes: our schedule, and our names of their arguments."""

PREDICTIONS = {"noise_pred": "eps", "x0_pred": "x0"}


def _prediction(case: Case) -> str:
    named = "x0_pred" if "x0_pred" in case["model"] else "noise_pred"
    return PREDICTIONS[case.get("pred", named)]


def _uvit_stand_in(last: float) -> Callable[..., Tensor]:
    """0.8 x - 0.3 (model time) / last + 0.1 label."""

    def network(x: Tensor, noise: Tensor, label: Tensor | None) -> Tensor:
        out = 0.8 * x - 0.3 * column(noise, x) / last
        return out if label is None else out + 0.1 * column(label, x)

    return network


def continuous(case: Case, tensors: Tensors) -> Tensors:
    """Continuous VP SDE: LSimple, conversions, and the functions of time (in float32)."""
    given = case.get("constructor") or {}
    # Older cases name process and prediction in the model's text alone.
    cosine = "cosine" in case["model"].lower() or "s" in given
    schedule, arguments = SDES[case.get("sde") or ("VPSDECosine" if cosine else "VPSDE")]
    spec = {"kind": "vpsde", "schedule": schedule, "prediction": _prediction(case)}
    spec |= {arguments[key]: value for key, value in given.items()}
    made = formulation(spec)
    assert isinstance(made, VPSDE)
    process, t = made.process, tensors["in/t"]
    network = _uvit_stand_in(999)
    loss = made.loss_at(t, network, tensors["in/x0"], tensors["in/noise"], tensors.get("in/y"))
    x = loss.noisy
    if spec["prediction"] == "eps":
        eps, x0 = loss.prediction, x0_of_eps(process, x, t, loss.prediction)
    else:
        eps, x0 = eps_of_x0(process, x, t, loss.prediction), loss.prediction
    out = {
        "out/loss": loss.per_sample,
        "out/xt": x,
        "out/model_time": made.noise_number(t),
        "out/noise_prediction": eps,
        "out/x0_prediction": x0,
        "out/score": score_of_eps(process, t, eps),
    }
    if "in/t_grid" in tensors:
        grid = tensors["in/t_grid"]
        for name in ("cum_alpha", "cum_beta", "snr", "nsr", "diffusion"):
            out[f"out/grid/{name}"] = getattr(process, name)(grid)
        out["out/grid/alpha"] = process.cum_alpha(grid).sqrt()
        out["out/grid/sigma"] = process.cum_beta(grid).sqrt()
    return out


def discrete(case: Case, tensors: Tensors) -> Tensors:
    """Stable-Diffusion schedule: LSimple and the tables."""
    given = dict(case["schedule"])
    # Older cases have the same in words as well.
    if not all(str(number) in case.get("betas", str(given)) for number in given.values()):
        raise ValueError("betas and schedule do not say the same")
    spec = {"kind": "vpsde", "schedule": "discrete", "prediction": _prediction(case)}
    names = {"start": "beta_start", "end": "beta_end", "steps": "steps"}
    made = formulation(spec | {names[key]: value for key, value in given.items()})
    assert isinstance(made, VPSDE)
    process, n = made.process, tensors["in/n"].long()
    network = _uvit_stand_in(process.steps)
    loss = made.loss_at(n, network, tensors["in/x0"], tensors["in/noise"], tensors.get("in/y"))
    return {
        "out/loss": loss.per_sample,
        "out/xn": loss.noisy,
        "out/model_time": made.noise_number(n),
        "out/betas": process.betas,
        "out/cum_alphas": process.cum_alphas,
        "out/cum_betas": process.cum_betas,
    }


class _UViTStandIn:
    """The mixture as U-ViT's network: the exact noise, called with the model's time, recorded."""

    def __init__(self, case: Case, tensors: Tensors, signal: Callable[[Tensor], Tensor]) -> None:
        self.mixture = Mixture(tensors["in/points"], case["component_std"], case.get("n_classes"))
        self.signal = signal
        self.states: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.states.append(x)
        self.times.append(float(noise[0]))
        signal = self.signal(noise.double())
        sigma = (1 - signal.square()).sqrt()
        clean = self.mixture(x, signal, sigma, label)
        return (x.double() - column(signal, clean) * clean) / column(sigma, clean)

    def forget(self) -> None:
        """Drop what was recorded."""
        self.states, self.times = [], []

    def calls(self, wanted: int) -> list[int]:
        """Which of our network calls are the ``wanted`` recorded ones.

        Both passes of a guided pair see the same x and time; a case may hold one or both.
        """
        return [number * len(self.times) // wanted for number in range(wanted)]


def _linear_signal(model_time: Tensor) -> Tensor:
    """alpha of the linear SDE (beta 0.1 to 20) at 999 t."""
    t = model_time / 999
    return (-(0.1 * t + 19.9 * t**2 / 2) / 2).exp()


def _discrete_signal(model_time: Tensor) -> Tensor:
    """alpha of Stable Diffusion's schedule at steps 1..1000, ln alpha linear between them."""
    table = (1 - stable_diffusion_betas()).log().cumsum(0) / 2
    n = model_time.clamp(1, 1000)
    left = n.floor().long().clamp(max=999)
    return torch.lerp(table[left - 1], table[left], n - left).exp()


def _uvit(
    case: Case, tensors: Tensors, spec: dict[str, Any], options: Callable[[str], dict[str, Any]]
) -> Tensors:
    """Runs of U-ViT's samplers; ``options`` gives a run's sampler, with its noise under "noise"."""
    signal = _discrete_signal if spec.get("schedule") == "discrete" else _linear_signal
    out: Tensors = {}
    for name in case["runs"]:
        chosen = options(name)
        noise = chosen.pop("noise", None)
        network = _UViTStandIn(case, tensors, signal)
        denoiser = formulation(spec).denoiser(network)
        scale = case.get("guidance_scale")
        if scale is not None:
            denoiser = guided(denoiser, {"kind": "uvit", "scale": scale}, case["n_classes"])
        elif case.get("n_classes") is not None and "in/y" not in tensors:
            raise ValueError("n_classes needs in/y")
        stored = None if noise is None else StoredNoise(noise)
        latents = tensors.get(f"in/{name}/latents", tensors["in/latents"])
        labels = tensors.get("in/y")
        labels = None if labels is None else labels.long()
        *_, last = sampler(chosen).states(denoiser, latents, labels, stored)
        out[f"out/{name}/x_float64"] = last.x
        # The official float32 run, whose trajectory the recorded calls are.
        network.forget()
        run = case["runs"][name]
        solver = sampler(chosen | ({"precision": "float32"} if "dpm" in chosen["kind"] else {}))
        *_, last = solver.states(denoiser, latents, labels, stored)
        out[f"out/{name}/x"] = last.x
        passes = len(network.times) // chosen["steps"]
        if run["model_calls"] not in (chosen["steps"], passes * chosen["steps"]):
            raise ValueError(f"{name}: model_calls is {run['model_calls']}, not {chosen['steps']}")
        if "orders" in run and list(run["orders"]) != solver.orders():
            raise ValueError(f"{name}: orders are {run['orders']}, ours {solver.orders()}")
        for output, described in case["outputs"].items():
            quantity = output.removeprefix(f"out/{name}/")
            if quantity in ("t_of_each_model_call", "model_time_of_each_call"):
                calls = network.calls(described["shape"][0])
                times = torch.tensor([network.times[call] for call in calls], dtype=torch.float64)
                out[output] = times / 999 if quantity.startswith("t_") else times
            elif quantity == "x_of_each_model_call":
                calls = network.calls(described["shape"][0])
                out[output] = torch.stack([network.states[call] for call in calls])
            elif quantity == "timesteps":
                out[output] = solver.times(denoiser)
            elif quantity == "orders":
                out[output] = torch.tensor(solver.orders())
    return out


def dpm_solver(case: Case, tensors: Tensors) -> Tensors:
    """DPM-Solver fast on the linear SDE, on every run of the case."""

    def options(name: str) -> dict[str, Any]:
        return {"kind": "dpm_solver", "steps": sum(case["runs"][name]["orders"])}

    return _uvit(case, tensors, {"kind": "vpsde"}, options)


def dpm_solver_pp(case: Case, tensors: Tensors) -> Tensors:
    """DPM-Solver++ fast on Stable Diffusion's schedule, on every run of the case."""

    def options(name: str) -> dict[str, Any]:
        return {"kind": "dpm_solver_pp", "steps": sum(case["runs"][name]["orders"])}

    out = _uvit(case, tensors, {"kind": "vpsde", "schedule": "discrete"}, options)
    out["out/betas"] = stable_diffusion_betas()
    return out


def euler_maruyama(case: Case, tensors: Tensors) -> Tensors:
    """Euler-Maruyama on the reverse SDE and Euler on its ODE, on every run of the case."""

    def options(name: str) -> dict[str, Any]:
        numbers = re.findall(r"\d+", name)
        steps = int(numbers[0]) if numbers else case["runs"][name]["model_calls"]
        noise = tensors.get(f"in/{name}/noise", tensors.get(f"in/steps{steps}/noise"))
        form = "ode" if "ode" in name else "sde"
        return {"kind": "euler_maruyama", "form": form, "steps": steps, "noise": noise}

    return _uvit(case, tensors, {"kind": "vpsde"}, options)
