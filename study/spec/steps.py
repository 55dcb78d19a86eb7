"""Which steps a discrete process has and a sampler visits: arithmetic that needs no torch.

A study is checked with it before anything starts; the tables of ``study.diffusion.schedules`` are
made with it.
"""

import math
import re
from typing import Annotated

from pydantic import Field

from study.files import UserError

Sigma = Annotated[float, Field(ge=1e-6, le=1e6)]
"""A noise level in EDM terms that single precision can tell from no noise and from nothing else."""

Steps = Annotated[int, Field(ge=2, le=100_000)]
"""Entries of a table over the steps of a process."""

MOST_NOISE = 60.0
"""Largest integral of beta over a process; single precision ends at 88."""


def check_noise(integral: float, keys: str) -> None:
    """Raise ``UserError`` where a process ends with more noise than single precision has."""
    if not integral <= MOST_NOISE:
        raise UserError(
            f"{keys}: betas that add up to {integral:.3g} end beyond single precision; they may "
            f"add up to {MOST_NOISE:g}"
        )


def summed_betas(start: float, end: float, steps: int) -> float:
    """-ln of the last signal level of betas linear in their square root (Stable Diffusion)."""
    low, high = math.sqrt(start), math.sqrt(end)
    roots = (low + (high - low) * step / (steps - 1) for step in range(steps))
    return -sum(math.log1p(-(root**2)) for root in roots)


def linear_end(name: str) -> float | None:
    """X of a schedule linearX, 0.02 of linear (DDPM), ``None`` of any other.

    The last beta is X times 1000 / steps, as the first one is 1e-4 times it.
    """
    match = re.fullmatch(r"linear(\d+(?:\.\d*)?|\.\d+)?", name)
    return None if match is None else float(match[1] or 0.02)


def check_betas(name: str, steps: int) -> None:
    """Raise ``UserError`` where a schedule of that name has betas outside (0, 1]."""
    end = linear_end(name)
    last = None if end is None else 1000 / steps * end
    if last is not None and last > 1:
        raise UserError(
            f"schedule {name} with {steps} steps has betas above 1: the last one is X (0.02 for "
            f"plain linear) times 1000 / steps = {last:g}; take a smaller X or more steps"
        )
    if last == 0:
        raise UserError(f"schedule {name}: a last beta of 0 is no noise; linear0.02 is usual")


def kept_steps(steps: int, respacing: str) -> list[int]:
    """The original steps kept by a respacing, ascending. Raises ``UserError`` where none fits.

    ``""``: all; ``"N"``: N steps at even fractional strides; ``"N1,N2,..."``: as many from each of
    equal sections; ``"ddimN"``: N steps at the smallest integer stride that gives exactly N.
    """
    if not respacing:
        return list(range(steps))
    text = str(respacing).replace(" ", "")
    if text.startswith("ddim") and text[4:].isdigit():
        count = int(text[4:])
        for stride in range(1, steps + 1):
            kept = range(0, steps, stride)
            if len(kept) == count:
                return list(kept)
        near = {len(range(0, steps, stride)) for stride in range(1, steps + 1)}
        below = max((n for n in near if n < count), default=1)
        above = min((n for n in near if n > count), default=steps)
        raise UserError(
            f"respacing {respacing}: no integer stride over {steps} steps gives {count}; "
            + (f"ddim{below} and ddim{above} do" if count < steps else f"at most ddim{steps} does")
        )
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"respacing: {respacing!r} is none of '', 'N', 'N1,N2,...', 'ddimN'")
    kept = []
    start = 0
    for i, count in enumerate(int(part) for part in parts):
        size = steps // len(parts) + (1 if i < steps % len(parts) else 0)
        if count > size:
            whole = f"{steps} steps" if len(parts) == 1 else f"a section of {size} steps"
            raise UserError(f"respacing {respacing}: {count} steps cannot be taken from {whole}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Python's round: halves go to the even number, as in the published respacing. The
        # position is accumulated, not multiplied, because halves depend on that rounding.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept
