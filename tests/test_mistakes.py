"""Mistakes of a study are one line each, before anything starts, whose advice works."""

import errno
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import typer
from conftest import Project
from miniature import base, measured
from pydantic import BaseModel
from rich.text import Text

from study import cli
from study.arms import runs
from study.data.convert import convert
from study.diffusion import formulation
from study.diffusion.samplers import NoiseSource
from study.diffusion.samplers import sampler as make_sampler
from study.files import UserError
from study.ledger import checks
from study.spec.backbones import FAMILIES
from study.spec.formulations import FORMULATIONS
from study.spec.probes import PROBES
from study.spec.samplers import SAMPLERS
from study.spec.study import Study, load, read


def told(content: dict) -> str:
    """The one line that a study is refused with."""
    with pytest.raises(UserError) as caught:
        runs(load(content))
    (line,) = str(caught.value).splitlines()
    return line


def changed(**changes) -> dict:
    """The smallest study with other values; ``training__lr`` is a key within a section."""
    content = base()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section] = {**content[section], name: value} if name else value
    return content


# --- the file --------------------------------------------------------------------------------

FILES = {
    "a key twice": ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: the key 'c' is given twice, first in"),
    "a section twice": ("arms: []\nseed: [0]\narms: []\n", "line 3: the key 'arms' is given twice"),
    "in a flow": ("a: {b: 1, b: 2}\n", "line 1: the key 'b' is given twice, first in line 1"),
    "in a list": ("a:\n- {b: 1}\n- b: 1\n  b: 2\n", "line 4: the key 'b' is given twice"),
    "beside a merge": ("a: &a {b: 1}\nc:\n  <<: *a\n  d: 1\n  d: 2\n", "line 5: the key 'd'"),
    "json": ('{"a": 1,\n\t"a": 2}', "line 2: the key 'a' is given twice, first in line 1"),
    "number as key": ("1: a\n", "line 1: the key '1' is not text"),
    "on as key": ("a: {on: 1}\n", "the key 'on' is not text"),
    "list as key": ("? [a]\n: 1\n", "a key is text, not a list"),
    "tab": ("a:\n\tb: 1\n", "line 2: a tab; indent with spaces"),
    "octal": ("seed: [010]\n", "line 1: 010 is an octal number"),
    "base 60": ("a: 1:30\n", "1:30 is a number of base 60"),
    "digits": (f"a: {'9' * 5000}\n", f"line 1: {'9' * 40!r} cannot be read"),
    "set": ("a: !!set {b}\n", "line 1: not valid YAML"),
    "python": ("a: !!python/object/apply:os.system [ls]\n", "line 1: not valid YAML"),
    "itself": ("a: &a [*a]\n", "line 1: the anchor stands within itself"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "more than 50 sections"),
    "very deep": ("a: " + "[" * 20000, "more than 50 sections"),
    "deep json": ('{"a": ' + "[" * 20000 + "]" * 20000 + "}", "more than 50 sections"),
    "control": ("a: b\x07\n", "line 1: the character #x0007 is not text"),
    "list": ("- a\n", "a study is a mapping of keys; got a list"),
    "empty": ("", "a study is a mapping of keys; got nothing"),
    "bytes": ("a: 1\nb: é\n".encode("latin-1"), "line 2: not UTF-8; save the file as UTF-8"),
    "utf-16": ("a: é\n".encode("utf-16"), "UTF-16 or UTF-32; save it as UTF-8"),
    "utf-16 without mark": ("a: é\n".encode("utf-16-le"), "UTF-16 or UTF-32; save it as UTF-8"),
    "large": (b"a" * (4 * 2**20 + 1), "above 4 MiB; not a study"),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_an_odd_file_is_one_line(content, words, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("merge", ["", "<<: "])
def test_anchors_that_double_are_refused_before_they_grow(merge, tmp_path):
    path = tmp_path / "bomb.yaml"
    lines = ["a: &a0 {x: 1}"]
    for n in range(1, 40):
        twice = f"[*a{n - 1}, *a{n - 1}]"
        lines.append(f"b{n}: &a{n} " + (f"{{{merge}{twice}}}" if merge else twice))
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 100000 values"):
        read(path)


def test_sound_files_are_read_as_they_stand(tmp_path):
    path = tmp_path / "sound.yaml"
    path.write_bytes(
        b"\xef\xbb\xbftitle: \xc3\xa9\nwhen: 2020-13-45\nbase: &b {lr: 1.0e-3, steps: 1_000}\n"
        b"more:\n  <<: *b\n  steps: 5\n"
    )
    base_section = {"lr": 1e-3, "steps": 1000}
    assert read(path) == {
        "title": "é",
        "when": "2020-13-45",
        "base": base_section,
        "more": {**base_section, "steps": 5},
    }
    path.write_text('{\n\t"a": 1e5, "b": "c\\/d"}')
    assert read(path) == {"a": 1e5, "b": "c/d"}


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="a folder; give the YAML file of a study"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed: [0]\nseed: [1]", "line 3: the key 'seed' is given twice, first in line 2; keep"),
        ("seed: [-1]", "seed[0]: input should be greater than or equal to 0; got -1"),
        ("notebooks: [nope]", "notebooks: there is no notebooks/nope.ipynb; allowed: overview"),
    ],
)
def test_stages_and_workflow_say_the_same_line(line, words, project: Project):
    study = "\n".join(f"{key}: {json.dumps(value)}" for key, value in base().items())
    path = project.folder / "wrong.yaml"
    path.write_text(study.replace("\n", f"\n{line}\n", 1) + "\n")
    wrong = Project(project.folder, "wrong.yaml")
    said = [wrong.study(verb, "--config", "wrong.yaml") for verb in ("runs", "plan", "status")]
    said.append(wrong.snakemake("-n", "--cores", "1"))
    (same,) = {one.stderr.strip().splitlines()[-1] for one in said}
    assert words in same
    assert all(one.returncode for one in said)


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("steps", "1e5", "100000"),
        ("steps", "1.0e+5", "100000"),
        ("steps", 1e5, "100000"),
        ("steps", "100", "100"),
        ("steps", "1_000", "1000"),
        ("lr", "1e-3", "1.0e-3"),
        ("lr", "1E4", "1.0e+4"),
        ("lr", "0.1", "0.1"),
        ("lr", "1e-300", "1.0e-300"),
        ("eps", "1e-8", "1.0e-08"),
    ],
)
def test_advice_on_a_number_works_when_it_is_followed(key, value, advice, tmp_path):
    line = told(changed(**{f"training__{key}": value}))
    assert line.endswith(f"write {advice}")
    assert ("exponent" in line) == (
        isinstance(value, str) and "." not in value and "e" in value.lower()
    )
    path = tmp_path / "study.yaml"
    training = {**base()["training"], "steps": 10, key: "ADVICE"}
    text = json.dumps(changed(training=training)).replace('"ADVICE"', advice)
    path.write_text(text[:-1] + ', "title": text}')  # no JSON, so YAML
    assert getattr(load(path).training, key) == pytest.approx(float(advice))


@pytest.mark.parametrize("value", ["1.5", "inf", "nan", "ten", "1e999999999", ""])
def test_text_that_is_no_number_gets_no_advice_to_write_it(value):
    assert "write" not in told(changed(training__steps=value))


def _floats(model: type[BaseModel]) -> list[str]:
    """The fields of a model that take a number, alone or in a list."""
    found = []
    for key, field in model.model_fields.items():
        if re.search(r"\bfloat\b", str(field.annotation)):
            found.append(key)
    return found


def _models() -> list[type[BaseModel]]:
    registries = (FORMULATIONS, SAMPLERS, PROBES)
    found = [model for registry in registries for model in registry.values()]
    found += [family.options for family in FAMILIES.values()]

    def sections(model: type[BaseModel]) -> None:
        found.append(model)
        for field in model.model_fields.values():
            for part in _parts(field.annotation):
                if isinstance(part, type) and issubclass(part, BaseModel) and part not in found:
                    sections(part)

    sections(Study)
    return found


def _parts(annotation) -> list:
    return [annotation, *(p for a in getattr(annotation, "__args__", ()) for p in _parts(a))]


@pytest.mark.parametrize("model", _models(), ids=lambda model: model.__name__)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_number_may_be_infinite(model, value):
    for key in _floats(model):
        if key == "S_max" and value == math.inf:
            continue
        for given in (value, [value], [value, value]):
            with pytest.raises(ValueError, match=rf"(?s)\n{key}") as caught:
                model.model_validate_json(json.dumps({key: given}))
            assert any(error["loc"][0] == key for error in caught.value.errors())


def test_an_upper_bound_may_be_infinite():
    sampler = {"kind": "edm_heun", "S_churn": 1.0, "S_max": math.inf}
    study = load({**base(), **measured(sampler=sampler)})
    assert study.protocols["final"].sampler[0].S_max == math.inf


# --- values ----------------------------------------------------------------------------------

SPLIT = {"kind": "ddpm", "splits": [0.25]}
CHECKPOINT = {"backbone": "uvit", "checkpoint": "weights.pth"}


def sampler(**options) -> dict:
    return measured(sampler=options)


def arm(**keys) -> dict:
    return {"arms": [{"backbone": "uvit", **keys}]}


def grid(**axes) -> dict:
    return {"grid": {"backbone": ["uvit"], **axes}}


VALUES = [
    (sampler(kind="ddim", respacing="ddim400"), "ddim334 and ddim500 do"),
    (sampler(kind="ddim", respacing="ddim2000"), "at most ddim1000 does"),
    (sampler(kind="ddim", respacing="2000"), "2000 steps cannot be taken from 1000 steps"),
    (sampler(kind="ancestral", respacing="600,600"), "from a section of 500 steps"),
    (
        {"formulation": {"kind": "ddpm", "steps": 100}, **sampler(kind="ddim", respacing=250)},
        "250 steps cannot be taken from 100 steps",
    ),
    (sampler(kind="ddim", timesteps=10), "has betas above 1"),
    (sampler(kind="ddim", schedule="linear5"), "has betas above 1"),
    (sampler(kind="ddim", schedule="linear0"), "a last beta of 0"),
    (sampler(kind="euler_maruyama", t_start=0.1, t_end=0.2), "t_end 0.2 is not below t_start"),
    (sampler(kind="edm_ablation", sigma_min=90.0), "sigma_min 90 is not below sigma_max 80"),
    (sampler(kind="edm_heun", steps=10**9), "protocols.final.sampler.steps: input should be less"),
    ({"formulation": {"kind": "ddpm", "schedule": "linear5"}}, "has betas above 1"),
    ({"formulation": {"kind": "ddpm", "splits": [1e9]}}, "splits: part 0 is empty"),
    ({"formulation": {"kind": "ddpm", "splits": [1.0, 1.0]}}, "one of them is given twice"),
    ({"formulation": {"kind": "edm", "sigma_min": 2.0, "sigma_max": 1.0}}, "must be smaller"),
    (grid(target=["stf(5000)"]), "has only 1797 images; take at most stf(1797)"),
    (grid(training=[{}, {"betas": [0.9, 1.5]}]), "grid.training[1].betas[1]: input should be less"),
    (arm(training={"betas": [0.9, -1]}), "arms[0].training.betas[1]: input should be greater"),
    (
        {
            "formulation": SPLIT,
            "training": {
                **base()["training"],
                "models": [{"split": 0}, {"split": 1, "betas": [0.9, 1.0]}],
            },
        },
        "training.models[1].betas[1]: input should be less than 1",
    ),
    ({"backbones": {"uvit": {"training": {"lr": -1}}}}, "backbones.uvit.training.lr: input should"),
    ({"backbones": {**base()["backbones"], "udit": {"training": {"l": 1}}}}, "backbones.udit.trai"),
    ({"backbones": {**base()["backbones"], "x": {}}}, "backbones.x.family: 'x' is unknown"),
    ({"training": {**base()["training"], "batch": 5000}}, "5000 images of a data set (digits) of"),
    ({"training": {**base()["training"], "warmup": 11}}, "never come to the learning rate"),
    ({"training": {**base()["training"], "dropout": 0.1}}, "uvit has none"),
    (
        {
            "formulation": {"kind": "ve", "sigma_max": 0.1},
            **sampler(kind="edm_heun", sigma_min=0.5),
        },
        "noise levels 0.5 to 80 have nothing in common with the formulation's 0.02 to 0.1",
    ),
    ({"formulation": {"kind": "edm", "P_mean": 50.0}}, "|P_mean| + 6 P_std may be up to 30"),
    ({"training": {**base()["training"], "betas": [0.9]}}, "training.betas: too few values"),
    ({"seed": [-1]}, "seed[0]: input should be greater than or equal to 0; got -1"),
    ({"seed": [{"data": -1}]}, "seed[0].data: input should be greater than or equal to 0"),
    ({"seed": [2**63]}, "seed: 9223372036854775808... is beyond 64 bits"),
    ({"seed": [{"init": 10**30}]}, "seed[0].init: 10000000000000000000... is beyond 64 bits"),
    ({"seed": ["1"]}, "seed[0]: '1' is text (it stands in quotes); write 1"),
    ({"seed": [{"nois": 1}]}, "seed[0].nois: input should be 'data', 'init' or 'noise'"),
    ({"seed": [1, {"data": 1, "init": 1, "noise": 1}]}, "seed: entries 0 and 1 are the same seed"),
    ({"study": 2020}, "study: 2020 is no text to YAML; write it in quotes"),
    ({"study": "datasets"}, "holds the data sets of all studies"),
    ({"study": "a" * 101}, "study: string should have at most 100 characters"),
    ({"dataset": {"name": "x", "source": "zip", "path": ""}}, "dataset.path: string should have"),
    ({"dataset": {"name": "x", "source": "digits", "split": "val"}}, "has only null, train, all"),
    ({"probes": [{"kind": "dynamics", "samples": "512"}]}, "probes[0].samples: '512' is text"),
    (measured(metrics=["fd", "fd"]), "lists one twice"),
    (
        {
            "backbones": {"uvit": {"family": "ddpmpp", "options": {"model_channels": 18}}},
        },
        "a layer of 18 channels cannot be normalised",
    ),
    (
        {"backbones": {"uvit": {"family": "patch_unet", "options": {"channel_mult": [2, 1]}}}},
        "channel_mult must not decrease",
    ),
    (
        {"backbones": {"uvit": {"family": "patch_unet", "options": {"num_heads_upsample": 3}}}},
        "num_heads_upsample 3 does not divide the width 128",
    ),
    (
        {
            "backbones": {
                "uvit": {"family": "patch_unet", "options": {"attention_resolutions": [0]}}
            }
        },
        "attention_resolutions[0]: input should be greater than or equal to 1",
    ),
]


@pytest.mark.parametrize(("change", "words"), VALUES, ids=[words[:40] for _, words in VALUES])
def test_a_value_that_cannot_be_is_named_before_anything_starts(change, words):
    assert words in told({**base(), **change})


EXTREMES = (1e-300, 1e-9, 1e-6, 1e-3, 0.3, 0.999, 1.0, 2.0, 50.0, 1e3, 1e6, 1e300)
FEW = {kind: {"steps": 4} for kind in SAMPLERS}
FEW |= {kind: {"respacing": "4"} for kind in ("ancestral", "ddim")}


class Shrinking(torch.nn.Module):
    """A network that can do nothing wrong, and notices a noise number that is not finite."""

    def __init__(self, multiplier: int) -> None:
        super().__init__()
        self.multiplier = multiplier

    def forward(self, x, noise, label=None):
        assert noise.isfinite().all()
        return torch.cat([0.1 * x] * self.multiplier, 1)


def accepted(model: type[BaseModel], start: dict) -> Iterator[dict]:
    """What a model takes of extreme numbers, one key at a time, together with ``start``."""
    for key in _floats(model):
        for value in EXTREMES:
            with suppress(ValueError):
                model.model_validate_json(json.dumps({**start, key: value}), strict=True)
                yield {**start, key: value}


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        *((kind, {}) for kind in FORMULATIONS),
        ("vpsde", {"schedule": "cosine"}),
        ("vpsde", {"schedule": "discrete"}),
    ],
)
def test_what_a_formulation_accepts_it_can_do(kind, start):
    images = torch.linspace(-1, 1, 32).reshape(8, 1, 2, 2)
    for options in accepted(FORMULATIONS[kind], start):
        one = formulation({"kind": kind, **options})
        noise = torch.Generator().manual_seed(0)
        draws = (torch.rand if one.draw == "uniform" else torch.randn)(8, generator=noise)
        if one.draw == "uniform":
            draws[:2] = torch.tensor([0.0, 1 - 2**-24])
        loss = one.loss(Shrinking(one.output_multiplier), images, draws, torch.randn(images.shape))
        assert loss.per_sample.isfinite().all(), options
        assert loss.sigma.isfinite().all(), options


@pytest.mark.parametrize("process", ["edm", "ddpm"])
@pytest.mark.parametrize("start", [{}, {"discretization": "vp", "schedule": "vp"}], ids=str)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_what_a_sampler_accepts_it_can_do(kind, start, process):
    if start and kind != "edm_ablation":
        pytest.skip("a discretisation belongs to edm_ablation")
    start = {**FEW[kind], **start, **({"S_churn": 1.0} if kind.startswith("edm") else {})}
    one = formulation({"kind": process})
    denoiser = one.denoiser(Shrinking(one.output_multiplier))
    noise = NoiseSource([0, 1], (1, 2, 2))
    for options in accepted(SAMPLERS[kind], start):
        found = make_sampler({"kind": kind, **options}).sample(
            denoiser, noise.latents(), None, noise=noise
        )
        assert found.isfinite().all(), options


IDLE = [
    (grid(skip_scaling=[{"method": "none", "kappa": 0.5}]), "kappa cannot act"),
    (grid(skip_scaling=[{"method": "ls", "innermost": 2.0}]), "innermost cannot act"),
    (grid(target=[{"kind": "dsm", "reference": 5}]), "reference cannot act"),
    (arm(checkpoint="w.pth", training={"lr": 0.1}), "arms[0].training.lr cannot act"),
    (arm(checkpoint="w.pth", target="stf(64)"), "arms[0].target cannot act"),
    (sampler(kind="edm_heun", S_noise=1.1), "S_noise cannot act"),
    (sampler(kind="edm_ablation", C_1=0.1), "C_1 cannot act"),
    (sampler(kind="edm_ablation", solver="euler", alpha=0.5), "alpha cannot act"),
    (sampler(kind="ddim", quantile=0.5), "quantile cannot act"),
    (
        {"formulation": {"kind": "ddpm", "steps": 100}, **sampler(kind="ddim", timesteps=100)},
        "timesteps cannot act",
    ),
    ({"formulation": {"kind": "vpsde", "cosine_s": 0.1}}, "cosine_s cannot act"),
    ({"formulation": {"kind": "vpsde", "schedule": "cosine", "beta_min": 0.2}}, "beta_min cannot"),
    ({"formulation": {"kind": "ddpm", "loss": "kl", "weighting": "snr"}}, "weighting cannot act"),
    ({"dataset": {"name": "d", "source": "digits", "moments": "mean_std"}}, "moments cannot act"),
    ({"dataset": {"name": "d", "source": "digits", "scale": 2.0}}, "scale cannot act"),
    ({"dataset": {"name": "d", "source": "digits", "path": "/x"}}, "path cannot act"),
    ({"dataset": {"name": "d", "source": "digits", "resize": "box"}}, "resize cannot act"),
    (
        {"dataset": {"name": "d", "source": "latents", "path": "/x", "crop": "center"}},
        "crop cannot act",
    ),
]


@pytest.mark.parametrize(
    ("key", "text", "why"),
    [
        ("skip_scaling", "ls(0.7)", "only cs takes a number, as in cs(0.7)"),
        ("target", "dsm(64)", "only stf takes a number, as in stf(1024)"),
    ],
)
def test_a_number_where_none_belongs_is_told_once(key, text, why):
    said = told({**base(), **grid(**{key: [text]})})
    assert said == f'grid.{key}[0]: {why}; got "{text}"'


@pytest.mark.parametrize(("change", "words"), IDLE, ids=[words for _, words in IDLE])
def test_a_key_that_cannot_act_is_refused(change, words):
    assert words in told({**base(), **change})


def test_a_key_that_cannot_act_may_stand_at_its_default():
    sampler = {"kind": "edm_heun", "S_noise": 1.0, "S_max": "inf"}
    content = {**base(), **measured(sampler=sampler)}
    content["grid"] = {"backbone": ["uvit"], "skip_scaling": [{"method": "none", "kappa": 0.7}]}
    assert len(runs(load(content))) == 1


def test_home_is_known_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    images = {"name": "i", "source": "folder", "path": "~/images", "resolution": 8}
    study = load(
        changed(
            dataset={
                "name": "x",
                "source": "latents",
                "path": "~/latents",
                "decoder": {"weights": "~/decoder.pt", "scale": 1.0},
                "reference": images,
            },
            **measured(extractors={"kind": "inception", "weights": "~/fid.pth"}),
            arms=[{"backbone": "uvit", "checkpoint": "~/w.pth"}],
        )
    )
    assert [
        study.dataset.path,
        study.dataset.decoder.weights,
        study.extractors["inception"].weights,
        study.dataset.reference.path,
        study.arms[0].checkpoint.path,
    ] == [
        f"/home/someone/{name}" for name in ("latents", "decoder.pt", "fid.pth", "images", "w.pth")
    ]


@pytest.mark.parametrize("words", [["--config", "~/own.yaml"], ["--config=~/own.yaml"]])
def test_home_is_known_on_the_command_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(json.dumps(base()))
    monkeypatch.setattr(sys, "argv", ["study", "runs", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "uvit · none · dsm" in capsys.readouterr().out


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/where")

    monkeypatch.setattr("study.files.write_text", full)
    monkeypatch.setattr(sys, "argv", ["study", "schema", "--write", "/some/where"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "study: /some/where: no space left on device\n"


# --- what lies here --------------------------------------------------------------------------


def test_missing_files_are_named_until_their_work_is_done(tmp_path):
    study = load(
        changed(
            dataset={"name": "x", "source": "folder", "path": str(tmp_path / "images")},
            **measured(extractors={"kind": "inception", "weights": str(tmp_path / "fid.pth")}),
            grid={"backbone": ["uvit"]},
            arms=[{"name": "theirs", "backbone": "uvit", "checkpoint": str(tmp_path / "w.pth")}],
        )
    )
    found = runs(study)
    results = tmp_path / "results"

    def lines() -> list[str]:
        return [line.split(":")[0] for line in checks.missing_files(study, found, results)]

    assert lines() == ["dataset.path", "extractor inception", "theirs"]
    (tmp_path / "images").mkdir()
    assert lines() == ["extractor inception", "theirs"]
    theirs = next(run.name for run in found.values() if run.display == "theirs")
    for name in found:
        (measurement,) = found[name].measurements
        for made in ("train/status.json", f"measurements/{measurement.name}/inception.json"):
            path = results / "tiny/runs" / name / made
            path.parent.mkdir(parents=True, exist_ok=True)
            if made.startswith("measurements") or name == theirs:
                path.touch()
    assert lines() == []


def test_a_converted_data_set_is_compared_with_the_settings(tmp_path):
    content = changed(
        dataset={"name": "own", "source": "archive", "path": "own.zip"},
        grid={"backbone": ["uvit"], "target": ["stf(60)"]},
    )
    archive = tmp_path / "datasets/own.zip"
    archive.parent.mkdir()
    small = {"name": "own", "source": "digits", "max_images": 40}
    convert(small, archive)
    study = load(content)
    with pytest.raises(UserError, match=r"stf\(60\): data set own has only 40 images"):
        checks.check(study, runs(study), tmp_path)
    reference = {"name": "r", "source": "folder", "path": "r", "resolution": 16}
    content["grid"]["target"] = ["dsm"]
    content["dataset"]["reference"] = reference
    content |= measured(extractors="pixels", metrics=["fd"])
    study = load(content)
    words = "r has resolution 16, but the samples are like own, whose resolution is 8"
    with pytest.raises(UserError, match=words):
        checks.check(study, runs(study), tmp_path)
    content["dataset"]["reference"] |= {"resolution": 8, "color": "grey"}
    study = load(content)
    assert checks.check(study, runs(study), tmp_path) == []
    (line,) = checks.kept_archives(study, tmp_path)
    assert line == f"dataset.path: own.zip: no such file or folder; {archive} stays in use"


def test_a_stale_archive_decides_nothing(tmp_path):
    """What would be converted anew is not compared with settings that say so."""
    archive = tmp_path / "datasets/own.zip"
    archive.parent.mkdir()
    small = {"name": "own", "source": "digits", "max_images": 40}
    convert(small, archive)
    own = {"name": "own", "source": "folder", "path": str(tmp_path), "color": "grey"}
    own["resolution"] = 16
    reference = {"name": "r", "source": "folder", "path": "r", "color": "grey", "resolution": 16}
    content = changed(
        dataset={**own, "reference": reference},
        grid={"backbone": ["uvit"], "target": ["stf(60)"]},
        **measured(extractors="pixels", metrics=["fd"]),
    )
    study = load(content)
    assert checks.check(study, runs(study), tmp_path) == []


def test_a_reference_of_another_shape_is_known_from_the_settings(tmp_path):
    reference = {"name": "r", "source": "folder", "path": "r", "resolution": 8, "color": "rgb"}
    study = load(changed(dataset__reference=reference))
    with pytest.raises(UserError, match="r has channels 3, but the samples are like digits"):
        checks.check(study, runs(study), tmp_path)


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("latin-1", "config.yaml, line 8: not UTF-8; save the file as UTF-8"),
        ("utf-16", "config.yaml: UTF-16 or UTF-32; save it as UTF-8"),
    ],
)
def test_the_workflow_says_in_one_line_that_it_cannot_read_its_file(encoding, words, project):
    path = project.folder / "config.yaml"
    text = path.read_text(encoding="utf-8").replace("title: ", "title: Über ")
    path.write_text(text, encoding=encoding)
    done = project.python("-m", "snakemake", "-n", "--cores", "1")
    assert done.returncode == 2
    assert done.stderr == f"study: {words}\n"


def test_a_missing_weights_file_ends_the_dry_run_with_its_name(project: Project):
    content = changed(**measured(extractors={"kind": "inception", "weights": "/no/where.pth"}))
    path = Path(project.folder / "wrong.yaml")
    path.write_text(json.dumps(content))
    done = Project(project.folder, "wrong.yaml").snakemake("-n", "--cores", "1")
    assert done.returncode
    last = done.stderr.splitlines()[-1]
    assert last == "study: extractor inception: weights: /no/where.pth: no such file or folder"


def test_no_word_of_the_help_is_taken_for_markup():
    """In rich's markup ``[default: 1]`` is a style, and not shown."""
    lost = []
    for name, verb in typer.main.get_command(cli.app).commands.items():
        for text in [verb.help, *(getattr(one, "help", None) for one in verb.params)]:
            plain = (text or "").replace("\\[", "[")
            if Text.from_markup(text or "").plain != plain:
                lost.append(f"{name}: {text}")
    assert not lost
