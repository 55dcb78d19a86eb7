"""Probes: measurements of a network or of targets that are not sample quality.

A probe is one file with ``measure(subject, options) -> Measured``, a line here, and its options in
``study.probes.options``, which also say what it looks at. Nothing here imports torch.
"""

PROBES: dict[str, str] = {
    "dynamics": "study.probes.dynamics",
    "robustness": "study.probes.robustness",
    "representation": "study.probes.representation",
    "stability_frontier": "study.probes.stability_frontier",
    "cost": "study.probes.cost",
    "target_variance": "study.probes.target_variance",
    "optimal_denoiser": "study.probes.optimal_denoiser",
    "scaling_laws": "study.probes.scaling_laws",
}
"""Module of every probe by its kind."""
