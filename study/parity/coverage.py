"""Which golden case exercises which option of which published system, as a Markdown table."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from study.parity.case import Damaged, kind_of, read
from study.parity.judge import Verdict


@dataclass(frozen=True)
class System:
    """A published system, the kinds that record it, and its options.

    ``options`` maps an option's official name to the values it can take, ``()`` where any number
    or list is allowed; ``inputs`` maps optional inputs of a case to what they switch on; ``tests``
    are the files that test what no case records.
    """

    title: str
    kinds: tuple[str, ...]
    tests: str
    options: dict[str, tuple[Any, ...]]
    inputs: dict[str, str] = field(default_factory=dict)


BOTH = (False, True)
SYSTEMS = (
    System(
        "U-ViT",
        ("uvit", "uvit-noskip", "uvit-t2i"),
        "test_backbones_tokens.py",
        dict.fromkeys(("skip", "conv", "mlp_time_embed", "qkv_bias"), BOTH)
        | dict.fromkeys(
            ("patch_size", "depth", "num_heads", "mlp_ratio", "in_chans", "num_clip_token"), ()
        ),
        {"in/y": "class labels", "in/context": "context tokens"},
    ),
    System(
        "ScaleLong",
        ("scalelong-*",),
        "test_backbones_tokens.py",
        {"scalelong": (0, 1, 2, 3, 4), "kappa": (), "depth": (), "patch_size": ()},
        {"in/y": "class labels"},
    ),
    System(
        "U-DiT",
        ("udit", "udit-alt"),
        "test_backbones_tokens.py",
        {
            "ffn_type": ("rep", "basic"),
            "rep": BOTH,
            "attn_type": ("v2", "v1", None),
            "posemb_type": ("rope2d", None),
            "downsampler": tuple(f"dwconv{kernel}" for kernel in (1, 3, 5, 7, 9)),
            "down_shortcut": BOTH,
            "learn_sigma": BOTH,
            **dict.fromkeys(
                ("down_factor", "depth", "num_heads", "mlp_ratio", "class_dropout_prob"), ()
            ),
        },
        {"in/label_drop_uniform_1": "label dropout in training", "in/cfg_y": "guidance"},
    ),
    System(
        "Patch Diffusion, network",
        ("adm-*",),
        "test_backbones_conv.py",
        {
            "patch_size": (1, 2, 4, 8),
            "out_channels": (3, 6),
            **dict.fromkeys(
                ("classifier_free", "resblock_updown", "use_new_attention_order", "conv_resample"),
                BOTH,
            ),
            **dict.fromkeys(
                (
                    "channel_mult",
                    "num_res_blocks",
                    "attention_resolutions",
                    "num_heads",
                    "num_head_channels",
                    "num_heads_upsample",
                    "num_classes",
                ),
                (),
            ),
        },
        {"in/y": "class labels"},
    ),
    System(
        "EDM: SongUNet and preconditioning",
        ("ddpmpp", "ncsnpp", "precond-*"),
        "test_backbones_conv.py, test_diffusion.py",
        {
            "embedding_type": ("positional", "fourier"),
            "encoder_type": ("standard", "skip", "residual"),
            "decoder_type": ("standard", "skip"),
            **dict.fromkeys(
                (
                    "resample_filter",
                    "channel_mult",
                    "channel_mult_emb",
                    "channel_mult_noise",
                    "num_blocks",
                    "attn_resolutions",
                    "label_dim",
                    "augment_dim",
                    "sigma_data",
                    "sigma_min",
                    "sigma_max",
                    "beta_d",
                    "beta_min",
                    "M",
                    "C_1",
                    "C_2",
                ),
                (),
            ),
        },
        {"in/class_labels": "class labels", "in/augment_labels": "augmentation labels"},
    ),
    System(
        "EDM and STF: losses, targets, augmentation",
        ("edmloss", "vploss", "veloss", "stf", "augment"),
        "test_diffusion.py, test_stf.py, test_augmentation.py",
        {
            "augmentation": ("none", "mirror_odd"),
            **dict.fromkeys(("P_mean", "P_std", "sigma_data", "batch", "rbatch"), ()),
            **dict.fromkeys(("p", "rotate_int", "translate_int", "brightness", "contrast"), ()),
            **dict.fromkeys(("lumaflip", "hue", "saturation"), ()),
        },
        {"in/class_labels": "class labels"},
    ),
    System(
        "EDM: samplers",
        ("sampler-edm-heun", "sampler-edm-ablation"),
        "test_samplers.py",
        {
            "solver": ("euler", "heun"),
            "discretization": ("vp", "ve", "iddpm", "edm"),
            "schedule": ("vp", "ve", "linear"),
            "scaling": ("vp", "none"),
            **dict.fromkeys(("num_steps", "rho", "alpha", "sigma_min", "sigma_max"), ()),
            **dict.fromkeys(("S_churn", "S_min", "S_max", "S_noise", "component_std"), ()),
        },
    ),
    System(
        "U-ViT: diffusion and samplers",
        ("vpsde-*", "sampler-dpm-fast", "sampler-dpm-discrete", "sampler-em"),
        "test_diffusion.py, test_samplers.py",
        {
            "sde": ("VPSDE", "VPSDECosine"),
            "pred": ("noise_pred", "x0_pred"),
            **dict.fromkeys(("beta_min", "beta_max", "orders"), ()),
            **dict.fromkeys(("guidance_scale", "n_classes", "component_std"), ()),
        },
        {"in/y": "class labels"},
    ),
    System(
        "U-DiT and Patch Diffusion: diffusion and samplers",
        ("ddpm-*",),
        "test_diffusion.py, test_samplers.py",
        {
            "model_mean_type": ("xstart", "epsilon", "v"),
            "weight_schedule": ("sqrt_snr", "snr", "snr+1", "truncated_snr", "p2"),
            "sampler": ("ddpm", "ddim"),
            **dict.fromkeys(
                (
                    "learn_sigma",
                    "sigma_small",
                    "use_kl",
                    "predict_xstart",
                    "rescale_timesteps",
                    "rescale_learned_sigmas",
                    "clip_denoised",
                    "dynamic_thresholding",
                ),
                BOTH,
            ),
            **dict.fromkeys(
                (
                    "noise_schedule",
                    "steps",
                    "diffusion_steps",
                    "timestep_respacing",
                    "respacings",
                    "snr_splits",
                    "eta",
                    "guidance_scale",
                    "n_classes",
                ),
                (),
            ),
        },
    ),
    System(
        "Metrics",
        ("fid",),
        "test_parity_metrics.py, test_fidelity.py",
        dict.fromkeys(("k", "splits", "shuffle", "subsets", "subset_size"), ()),
    ),
)


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    """Every named value in a case's JSON, at any depth."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield name, value
            yield from _settings(value)


DESCRIPTIVE = ("inputs", "outputs", "notes", "weights", "environment", "storage", "tolerance")


def _used(folder: Path, name: str) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The values of every setting in a case (as JSON -> value), and the names of its inputs."""
    case, tensors = read(folder, name)
    found: dict[str, dict[str, Any]] = {}
    for key, value in _settings({k: v for k, v in case.items() if k not in DESCRIPTIVE}):
        found.setdefault(key, {})[json.dumps(value)] = value
    return found, {key for key in tensors if key.startswith("in/")}


def _cell(groups: dict[str, list[str]]) -> str:
    parts = (f"`{value}`: {', '.join(cases)}" for value, cases in groups.items())
    return "; ".join(parts).replace("|", "\\|")


def coverage(folder: str | Path, verdicts: Iterable[Verdict]) -> str:
    """Markdown: system x option x the cases that exercise it, from the cases of a folder.

    A damaged case covers nothing.
    """
    used: dict[str, tuple[dict[str, dict[str, Any]], set[str]]] = {}
    verdicts = list(verdicts)
    for one in verdicts:
        try:
            used[one.case] = _used(Path(folder), one.case)
        except Damaged:
            continue
    passed = sum(one.passed for one in verdicts)
    lines = [
        "# Parity with the official implementations",
        "",
        "<!-- made by: study parity tests/golden --markdown study/PARITY.md -->",
        "",
        f"{passed} of {len(verdicts)} golden cases pass. A case records weights, inputs and "
        "outputs of a run of the official code; `study parity tests/golden` replays them (the "
        "command takes any folder of cases). Below: which case exercises which value of which "
        "option. Values in the last column are in no case; what is tested of them is in the files "
        "named under each heading.",
    ]
    for system in SYSTEMS:
        cases = [
            case
            for case in used
            if any(fnmatchcase(kind_of(case), pattern) for pattern in system.kinds)
        ]
        lines += ["", f"## {system.title}", ""]
        lines += [f"Cases: {', '.join(cases) or 'none'}. Other tests: {system.tests}.", ""]
        lines += ["| option | value: cases | in no case |", "|---|---|---|"]
        for option, allowed in system.options.items():
            groups: dict[str, list[str]] = {}
            for case in cases:
                for value in used[case][0].get(option, {}).values():
                    # 0 and 1 stand for false and true in some constructors.
                    value = bool(value) if allowed == BOTH and value in (0, 1) else value
                    groups.setdefault(json.dumps(value), []).append(case)
            absent = [json.dumps(value) for value in allowed if json.dumps(value) not in groups]
            if groups or absent:
                missing = ", ".join(f"`{text}`" for text in absent)
                lines.append(f"| {option} | {_cell(groups)} | {missing} |")
        for tensor, meaning in system.inputs.items():
            having = [case for case in cases if tensor in used[case][1]]
            row = (", ".join(having), "") if having else ("", "given")
            lines.append(f"| {meaning} (`{tensor}`) | {row[0]} | {row[1]} |")
    return "\n".join(lines) + "\n"
