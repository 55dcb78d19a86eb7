"""Who computes a case: its kind -> the function that returns its outputs."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial

from study.parity import ddpm, edm, metrics, networks, vpsde
from study.parity.case import Runner

KINDS: dict[str, Runner] = {
    **dict.fromkeys(("uvit", "uvit-noskip", "uvit-t2i", "scalelong-*"), networks.uvit),
    **dict.fromkeys(("udit", "udit-alt"), networks.udit),
    "adm-*": networks.patch_unet,
    **dict.fromkeys(("ddpmpp", "ncsnpp"), networks.songunet),
    **{f"{kind}loss": partial(edm.loss, kind) for kind in ("edm", "vp", "ve")},
    **{f"precond-{kind}": partial(edm.precond, kind) for kind in ("edm", "vp", "ve", "iddpm")},
    "stf": edm.stable_target,
    "augment": edm.augment,
    "sampler-edm-heun": partial(edm.samplers, "edm_heun"),
    "sampler-edm-ablation": partial(edm.samplers, "edm_ablation"),
    "vpsde-uvit": vpsde.continuous,
    "vpsde-uvit-discrete": vpsde.discrete,
    "sampler-dpm-fast": vpsde.dpm_solver,
    "sampler-dpm-discrete": vpsde.dpm_solver_pp,
    "sampler-em": vpsde.euler_maruyama,
    "ddpm-schedule": ddpm.schedules,
    "ddpm-patch-split": ddpm.splits,
    "ddpm-patch-loss": ddpm.patch_losses,
    "ddpm-patch-sample": ddpm.patch_samples,
    "ddpm-dit": ddpm.udit,
    "fid": metrics.fid,
}
"""A runner takes a case's JSON and tensors; ``*`` in a kind stands for any ending."""


def runner_of(kind: str, kinds: Mapping[str, Runner] = KINDS) -> Runner | None:
    """The runner of a kind, ``None`` where nobody knows it."""
    return next((kinds[pattern] for pattern in kinds if fnmatchcase(kind, pattern)), None)
