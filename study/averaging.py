"""How the average of the weights forgets: its decay, and what it still holds of the start.

Plans and states read this too, so it imports no torch.
"""

from study.spec.run import Spec
from study.spec.training import Ema

BEGUN = 0.01
"""Share of the initial weights below which an average has begun."""


def decay(settings: Ema, batch: int, images_seen: int) -> float:
    """Decay of the step that follows ``images_seen`` images.

    That of ``rate`` (per step) or ``halflife`` (in images, as in EDM). With ``rampup`` the
    half-life is at most that share of what was seen so far (Karras et al. 2022, released training
    loop), so the first step replaces the initial weights.
    """
    fixed = 0.5 ** (batch / settings.halflife) if settings.rate is None else settings.rate
    if settings.rampup is None:
        return fixed
    return min(fixed, 0.5 ** (batch / max(settings.rampup * images_seen, 1e-8)))


def initial_share(settings: Ema, batch: int, steps: int) -> float:
    """Share of the average after ``steps`` steps that the weights of the first step make."""
    if settings.rampup is None:
        return decay(settings, batch, 0) ** steps
    share = 1.0
    for step in range(1, steps):
        share *= decay(settings, batch, step * batch)
        if share < BEGUN:
            break
    return share


def remark(spec: Spec, which: str = "ema", step: int | None = None) -> str:
    """What to say of a run's average called ``which`` at ``step`` (``None``: the last).

    Empty where it has begun, and for ``raw`` and imported weights. The networks of a split
    formulation are averaged each over its own steps.
    """
    settings = spec.training.averages.get(which)
    if settings is None or spec.checkpoint is not None:
        return ""
    left, share = spec.steps if step is None else step, 0.0
    for model in spec.models:
        done = min(left, model.steps)
        left -= done
        share = max(share, initial_share(settings, spec.training.batch, done))
    if share < BEGUN:
        return ""
    name = "the average" if which == "ema" else f"the average {which}"
    return f"{name} still holds {100 * share:.0f} % of the initial weights"
