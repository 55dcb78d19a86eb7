"""How the average of the weights forgets: its decay, and what it still holds of the start.

Plans and states read this too, so it imports no torch.
"""

from collections.abc import Mapping
from typing import Any

from study.arms import models

BEGUN = 0.01
"""Share of the initial weights below which an average has begun."""


def decay(settings: Mapping[str, Any], batch: int, images_seen: int) -> float:
    """Decay of the step that follows ``images_seen`` images.

    That of ``rate`` (per step) or ``halflife`` (in images, as in EDM). With ``rampup`` the
    half-life is at most that share of what was seen so far (Karras et al. 2022, released training
    loop), so the first step replaces the initial weights.
    """
    rate, rampup = settings.get("rate"), settings.get("rampup")
    fixed = 0.5 ** (batch / settings["halflife"]) if rate is None else rate
    if rampup is None:
        return fixed
    return min(fixed, 0.5 ** (batch / max(rampup * images_seen, 1e-8)))


def initial_share(settings: Mapping[str, Any], batch: int, steps: int) -> float:
    """Share of the average after ``steps`` steps that the weights of the first step make."""
    if settings.get("rampup") is None:
        return decay(settings, batch, 0) ** steps
    share = 1.0
    for step in range(1, steps):
        share *= decay(settings, batch, step * batch)
        if share < BEGUN:
            break
    return share


def remark(spec: Mapping[str, Any]) -> str:
    """What to say of the averaged weights of a run: empty where the average has begun.

    The networks of a split formulation are averaged each over its own steps.
    """
    training = spec["training"]
    shares = [
        initial_share(training["ema"], training["batch"], model["steps"])
        for model in models(spec)
        if model["steps"] > 0
    ]
    share = max(shares, default=0.0)
    if "checkpoint" in spec or share < BEGUN:
        return ""
    return f"the average still holds {100 * share:.0f} % of the initial weights"
