"""The papers' numbers and settings as data, each with its source.

``published.csv`` holds one number per line: numbers that a paper or a released repository states
(``origin`` "stated"), and points read off a published figure (``origin`` "digitised", with the
reading error). Protocols say how those numbers were measured, so that a report can spell out how
ours differ. No number here comes from memory.
"""

import csv
import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Number:
    """One published value. ``value`` is text; ``number`` is its float where it is one."""

    paper: str
    table_or_figure: str
    dataset: str
    model: str
    method: str
    setting: str
    metric: str
    value: str
    unit: str
    origin: str
    reading_error: str
    source: str

    @property
    def number(self) -> float | None:
        try:
            return float(self.value)
        except ValueError:
            return None


@dataclass(frozen=True)
class Protocol:
    """How a paper measured quality on a dataset; texts as a reader should see them."""

    paper: str
    dataset: str
    images: int
    sampler: str
    nfe: int
    tool: str
    reference: str
    weights: str
    training: str


_UVIT_TOOL = "port of pytorch-fid (Inception pool3, PNG images)"
PROTOCOLS = (
    Protocol(
        "U-ViT",
        "cifar10",
        50_000,
        "Euler–Maruyama on the reverse VP SDE, 1000 steps",
        1000,
        _UVIT_TOOL,
        "CIFAR-10 train, statistics supplied by the authors",
        "EMA 0.9999, checkpoint with the best FID on 10 000 samples",
        "500 000 steps of 128 images",
    ),
    Protocol(
        "U-ViT",
        "celeba64",
        50_000,
        "Euler–Maruyama on the reverse VP SDE, 1000 steps",
        1000,
        _UVIT_TOOL,
        "50 000 CelebA training images, DDIM crop",
        "EMA 0.9999, checkpoint with the best FID on 10 000 samples",
        "500 000 steps of 128 images",
    ),
    Protocol(
        "U-ViT",
        "imagenet64",
        50_000,
        "DPM-Solver (fast), 50 steps, no guidance",
        50,
        _UVIT_TOOL,
        "guided-diffusion ImageNet 64 statistics",
        "EMA 0.9999, checkpoint with the best FID on 10 000 samples",
        "300 000 steps of 1024 images",
    ),
    Protocol(
        "U-DiT",
        "imagenet256-latent",
        50_000,
        "ancestral DDPM, 250 of 1000 steps",
        250,
        "guided-diffusion evaluator (TensorFlow Inception)",
        "guided-diffusion ImageNet 256 reference batch",
        "EMA 0.9999, last checkpoint",
        "400 000 steps of 256 images",
    ),
    Protocol(
        "STF",
        "cifar10",
        50_000,
        "EDM Heun, 18 steps",
        35,
        "EDM's fid.py (PyTorch translation of the TensorFlow Inception)",
        "CIFAR-10 train",
        "EMA, half-life 0.5 million images",
        "200 million images, batch 512, reference batch 1024 per process",
    ),
    Protocol(
        "EDM",
        "cifar10",
        50_000,
        "EDM Heun, 18 steps",
        35,
        "EDM's fid.py (PyTorch translation of the TensorFlow Inception)",
        "CIFAR-10 train",
        "EMA, half-life 0.5 million images; minimum over three blocks of sampling seeds",
        "200 million images, batch 512",
    ),
    Protocol(
        "EDM",
        "imagenet64",
        50_000,
        "EDM stochastic sampler, 256 Heun steps",
        511,
        "EDM's fid.py (PyTorch translation of the TensorFlow Inception)",
        "ImageNet 64 train",
        "EMA; minimum over three blocks of sampling seeds",
        "ADM network, re-trained by EDM",
    ),
)

# Names that the papers use for one dataset, in our word for it.
_DATASETS = {
    "CIFAR10": "cifar10",
    "CIFAR-10 uncond": "cifar10",
    "CIFAR-10 cond": "cifar10",
    "CelebA 64x64": "celeba64",
    "ImageNet 64x64": "imagenet64",
    "ImageNet-64": "imagenet64",
    "ImageNet 256x256 latent": "imagenet256-latent",
}
# A paper's own models, by the backbone family they belong to.
_FAMILIES = (
    ("U-ViT", r"^U-ViT", "uvit"),
    ("U-DiT", r"^U-DiT", "udit"),
    ("STF", r"^EDM \+ STF", "ddpmpp"),
    ("EDM", r"^EDM \(config F", "ddpmpp"),
)


@cache
def _all() -> tuple[Number, ...]:
    text = resources.files("study").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(Number(**row) for row in csv.DictReader(text.splitlines()))


def numbers(**where: str) -> list[Number]:
    """Published numbers whose fields equal the given texts, in the file's order.

    >>> numbers(paper="STF", metric="FID-50K")[0].value
    '1.9'
    """
    return [
        number
        for number in _all()
        if all(getattr(number, field) == text for field, text in where.items())
    ]


def rows(**where: str) -> list[dict[str, str]]:
    """Like :func:`numbers`, as plain rows for a table."""
    return [asdict(number) for number in numbers(**where)]


# What a published data set is here: the source that reads its own files, its side in pixels, its
# training images. Latents have no files of their own, and their number is that of an archive.
_OWN_SOURCE = {"cifar10": "cifar10", "celeba64": "celeba", "imagenet64": "imagenet"}
_SIDE = {"cifar10": 32, "celeba64": 64, "imagenet64": 64, "imagenet256-latent": 32}
_IMAGES = {"cifar10": 50_000, "celeba64": 162_770, "imagenet64": 1_281_167}


def dataset_key(dataset: dict[str, Any]) -> str | None:
    """The published dataset that a dataset spec can be, or None.

    ``dataset`` is the study's dataset section, note included. A name is not enough: a part of the
    images, another split, side or colour is another dataset, and so is a lossy copy, one whose
    name, path or note speaks of JPEG or of losses. What a folder, zip or archive of that name
    holds is not known here: `beside` looks at how many images it has.
    """
    words = " ".join(str(dataset.get(key) or "") for key in ("name", "path", "note")).lower()
    if re.search(r"jpe?g|lossy|webp", words):
        return None
    if dataset.get("max_images") or dataset.get("split") not in (None, "train"):
        return None
    source, name = dataset.get("source"), str(dataset.get("name") or "").lower()
    name = re.sub(r"[^a-z0-9]", "", name)
    key = None
    if source == "cifar10" or re.match(r"cifar10(?!0)", name):
        key = "cifar10"
    elif name.startswith("celeba") and not name.startswith("celebahq"):
        key = "celeba64"
    elif name.startswith("imagenet"):
        key = "imagenet256-latent" if source == "latents" else "imagenet64"
    if key is None or source == "digits":
        return None
    side = dataset.get("resolution")
    known = side is None and (source == "cifar10" or key == "imagenet256-latent")
    if not known and side != _SIDE[key]:
        return None
    if key != "imagenet256-latent":
        foreign = set(_OWN_SOURCE.values()) - {_OWN_SOURCE[key]} | {"lsun", "ffhq", "afhq"}
        if source in foreign | {"latents"} or dataset.get("color") not in (None, "rgb", "keep"):
            return None
    return key


def beside(
    dataset: dict[str, Any], spec: dict[str, Any], metric: str, identity: dict[str, Any]
) -> list[dict[str, Any]]:
    """Published numbers that may stand beside ``metric`` of a run, with every known difference.

    Comparable means: the same dataset, measured against all of its training images, the Inception
    FID, as many generated images, and the same family of backbone, conditioning and target. Where
    the images did not come from the dataset's own files, a difference says so. Each row has
    ``number`` (:class:`Number`), ``protocol`` (:class:`Protocol` or None) and ``differences``
    (texts "what: theirs; ours").
    """
    found = re.fullmatch(r"fid_(\d+)(_[0-9a-f]{8})?", metric)
    key = dataset_key(dataset)
    if not found or key is None:
        return []
    if key in _IMAGES and str(identity.get("reference_images")) != str(_IMAGES[key]):
        return []
    images = int(found.group(1))
    family = spec["backbone"]["family"]
    conditional = bool(spec.get("training", {}).get("conditional"))
    stable = spec["target"]["kind"] == "stf"
    answer = []
    for number in _all():
        if _DATASETS.get(number.dataset) != key or number.origin != "stated":
            continue
        if not number.metric.startswith(f"FID-{images // 1000}K") or images % 1000:
            continue
        if not any(
            number.paper == paper and re.search(pattern, number.model) and family == ours
            for paper, pattern, ours in _FAMILIES
        ):
            continue
        if (number.paper == "STF") != stable:
            continue
        if key == "cifar10" and ("cond" in number.dataset.split()) != conditional:
            continue
        protocol = next(
            (p for p in PROTOCOLS if p.paper == number.paper and p.dataset == key), None
        )
        answer.append(
            {
                "number": number,
                "protocol": protocol,
                "differences": [
                    *_origin(key, dataset, identity),
                    *_guidance(number, identity),
                    *_differences(protocol, spec, identity),
                ],
            }
        )
    return answer


def _origin(key: str, dataset: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Where our images came from, if not from the dataset's own files."""
    source, name = dataset.get("source"), dataset.get("name")
    answer = []
    if source != _OWN_SOURCE.get(key):
        answer.append(f"images: theirs the data set's own files; ours a {source} named {name}")
    if identity.get("reference") != name and key in _IMAGES:
        answer.append(f"reference: theirs the data set itself; ours {identity.get('reference')}")
    return answer


def _guidance(number: Number, identity: dict[str, Any]) -> list[str]:
    ours = identity.get("guidance")
    theirs = number.setting or "none stated"
    return [f"guidance: theirs {theirs}; ours {ours}"] if ours else []


def _differences(
    protocol: Protocol | None, spec: dict[str, Any], identity: dict[str, Any]
) -> list[str]:
    if protocol is None:
        return ["how the published number was measured is not known to us"]
    training = spec.get("training", {})
    ours = {
        "sampler": _sampler(identity.get("sampler")),
        "network evaluations per image": identity.get("nfe"),
        "tool": f"{identity.get('tool')} {identity.get('tool_version') or ''}".strip(),
        "reference": f"{identity.get('reference')} ({identity.get('split')}, "
        f"{identity.get('reference_images')} images)",
        "weights": identity.get("weights"),
        "training": f"{training.get('steps')} steps of {training.get('batch')} images",
    }
    theirs = {
        "sampler": protocol.sampler,
        "network evaluations per image": protocol.nfe,
        "tool": protocol.tool,
        "reference": protocol.reference,
        "weights": protocol.weights,
        "training": protocol.training,
    }
    return [
        f"{what}: theirs {theirs[what]}; ours {ours[what]}"
        for what in theirs
        if str(theirs[what]) != str(ours[what])
    ]


def _sampler(sampler: Any) -> str:
    if not isinstance(sampler, dict):
        return str(sampler)
    options = ", ".join(f"{key} {sampler[key]}" for key in sorted(sampler) if key != "kind")
    return f"{sampler.get('kind')} ({options})" if options else str(sampler.get("kind"))
