"""The published configurations: what they say, where it stands, and that the stages can do it."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Project
from miniature import base, measured
from PIL import Image
from safetensors.torch import load_file, save_file

from study import sources
from study.arms import runs
from study.data import Archive
from study.data.convert import convert
from study.files import UserError, read_json
from study.ledger import plan
from study.network import arithmetic
from study.sampling.decoder import LatentDecoder, load_decoder
from study.sampling.draw import generate
from study.spec.backbones import FAMILIES
from study.spec.measuring import Measurement
from study.spec.study import load, read
from study.training import Interrupted, train

FOLDER = ROOT / "workflow/studies/published"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
FACTS = Path(__file__).resolve().parents[2] / "shared/papers/published_configs.json"

SIZES = {
    # study: family and preset whose options it must equal
    "uvit-cifar10": ("uvit", "cifar10-S2"),
    "uvit-celeba64": ("uvit", "celeba64-S4"),
    "uvit-imagenet64-mid": ("uvit", "imagenet64-M4"),
    "uvit-imagenet64-large": ("uvit", "imagenet64-L4"),
    "uvit-imagenet256-large": ("uvit", "imagenet256-L2"),
    "uvit-imagenet256-huge": ("uvit", "imagenet256-H2"),
    "uvit-imagenet512-large": ("uvit", "imagenet512-L4"),
    "uvit-imagenet512-huge": ("uvit", "imagenet512-H4"),
    "uvit-mscoco": ("uvit", "mscoco-S2"),
    "uvit-mscoco-deep": ("uvit", "mscoco-S2-deep"),
    "scalelong-cifar10": ("uvit", "cifar10-S2"),
    "udit-s": ("udit", "S"),
    "udit-b": ("udit", "B"),
    "udit-l": ("udit", "L"),
    "patch-imagenet256": ("patch_unet", "imagenet256_p4"),
    "patch-ffhq1024": ("patch_unet", "ffhq1024_p4"),
    "patch-lsun256-p2": ("patch_unet", "lsun_p2"),
    "patch-lsun256-p4": ("patch_unet", "lsun_p4"),
    "patch-lsun256-p8": ("patch_unet", "lsun_p8"),
    "stf-cifar10-ncsnpp": ("ncsnpp", "cifar10"),
    "stf-cifar10-ddpmpp": ("ddpmpp", "cifar10"),
}
UVIT = {
    "uvit-cifar10": "cifar10_uvit_small",
    "uvit-celeba64": "celeba64_uvit_small",
    "uvit-imagenet64-mid": "imagenet64_uvit_mid",
    "uvit-imagenet64-large": "imagenet64_uvit_large",
    "uvit-imagenet256-large": "imagenet256_uvit_large",
    "uvit-imagenet256-huge": "imagenet256_uvit_huge",
    "uvit-imagenet512-large": "imagenet512_uvit_large",
    "uvit-imagenet512-huge": "imagenet512_uvit_huge",
    "uvit-mscoco": "mscoco_uvit_small",
    "uvit-mscoco-deep": "mscoco_uvit_small_deep",
}


def unsourced(content: dict) -> list[str]:
    return [one.key for one in sources.settings(content, load(content)) if one.source is None]


# --- the files -------------------------------------------------------------------------------


def test_every_published_configuration_is_a_file():
    assert set(FILES) == set(SIZES)


@pytest.mark.parametrize("name", FILES)
def test_every_setting_has_a_source(name):
    assert unsourced(read(FILES[name])) == []


def test_a_setting_without_a_source_is_found():
    content = read(FILES["uvit-cifar10"])
    del content["sources"]["training.lr"]
    content["training"]["clip"] = 1.0
    assert unsourced(content) == ["training.lr", "training.clip"]


@pytest.mark.parametrize("name", FILES)
def test_study_is_called_as_its_file_and_names_its_code(name):
    study = load(FILES[name])
    assert study.study == name
    assert study.published.needs and study.published.differences
    for repository in study.published.repositories.values():
        assert re.fullmatch(r"[0-9a-f]{12,40}", repository.commit)


@pytest.mark.parametrize("name", FILES)
def test_network_is_the_preset_of_that_size(name):
    family, preset = SIZES[name]
    kind = FAMILIES[family]
    whole = kind.options.model_validate(kind.presets[preset]).model_dump(mode="json")
    for run in runs(load(FILES[name])).values():
        assert run.spec.content()["backbone"] == {
            "family": family,
            "options": whole,
            "noise_scale": 1.0,
        }


@pytest.mark.parametrize(
    "name",
    ["uvit-mscoco", "scalelong-cifar10", "udit-s", "patch-imagenet256", "stf-cifar10-ncsnpp"],
)
def test_network_has_as_many_parameters_as_the_released_one(name, tmp_path):
    study = load(FILES[name])
    rows = plan.plan(study, tmp_path, counting=True)
    assert rows[0].network.parameters == study.published.parameters


@pytest.mark.skipif(not FACTS.is_file(), reason="the facts of the papers are not here")
@pytest.mark.parametrize("name", UVIT)
def test_uvit_follows_the_released_configuration(name):
    facts = json.loads(FACTS.read_text())["u-vit"]["configs"][UVIT[name]]
    study = load(FILES[name])
    training, (measurement,) = study.training, study.protocols["final"].cells()
    assert training.steps == facts["train"]["n_steps"]
    assert training.batch == facts["train"]["batch_size"]
    assert training.lr == facts["optimizer"]["lr"]
    assert list(training.betas) == facts["optimizer"]["betas"]
    assert training.weight_decay == facts["optimizer"]["weight_decay"]
    assert training.warmup == facts["lr_scheduler"]["warmup_steps"]
    assert training.conditional == (facts["train"].get("mode") == "cond")
    assert measurement["images"] == facts["sample"]["n_samples"]
    assert measurement["sampler"].steps == facts["sample"]["sample_steps"]
    assert study.published.parameters == facts["n_params"]
    scale = facts["sample"].get("scale")
    guidance = measurement["guidance"]
    assert (guidance.scale if guidance else None) == scale
    if training.conditional:
        assert training.label_dropout == facts["dataset"].get("p_uncond", 0.0)
    if "z_shape" in facts:
        shape = [study.dataset.channels, study.dataset.resolution, study.dataset.resolution]
        assert shape == facts["z_shape"]


def test_scalelong_is_uvit_with_five_scalings_and_two_batch_sizes():
    scaled = runs(load(FILES["scalelong-cifar10"]))
    batches = [run.spec.training.batch for run in scaled.values()]
    methods = {str(run.axes["skip_scaling"]) for run in scaled.values()}
    assert sorted(batches) == [64] * 5 + [128] * 5
    assert methods == {"none", "inv_sqrt2", "cs(0.5)", "ls", "ls_unshared"}
    assert set(runs(load(FILES["uvit-cifar10"]))) < set(scaled)


@pytest.mark.parametrize("size", "sbl")
def test_guidance_of_udit_is_a_matter_of_sampling_alone(size):
    (run,) = runs(load(FILES[f"udit-{size}"])).values()
    plain, guided = run.measurements
    assert (plain.cell.guidance.scale, guided.cell.guidance.scale) == (1.0, 1.5)
    others = {"guidance": plain.cell.guidance}
    assert guided.cell.model_copy(update=others) == plain.cell


def test_split_models_train_in_the_published_order():
    (run,) = runs(load(FILES["patch-imagenet256"])).values()
    assert run.spec.steps == 2 * 500_000
    first, second = run.spec.models
    assert (first.split, second.split, second.start) == (1, 0, 1)


@pytest.mark.parametrize("name", ["scalelong-cifar10", "udit-b"])
def test_dry_run_lists_every_job_and_names_data_that_is_not_there(name, project):
    published = Project(project.folder, f"workflow/studies/published/{name}.yaml")
    listed = published.snakemake("-n", "--cores", "2")
    done = published.jobs(listed)
    path = load(FILES[name]).dataset.path
    last = listed.stderr.splitlines()[-1]
    assert (listed.returncode, last) == (2, f"study: dataset.path: {path}: no such file or folder")
    assert done["train"] == len(runs(load(FILES[name])))
    assert done["convert"] == 1 + (load(FILES[name]).dataset.reference is not None)


# --- study provenance ------------------------------------------------------------------------


def test_provenance_shows_values_sources_and_conflicts(capsys):
    sources.show(str(FILES["uvit-imagenet256-large"]))
    said = capsys.readouterr().out
    assert re.search(
        r"training\.label_dropout +0\.15 +code \* +configs/imagenet256_uvit_large", said
    )
    assert re.search(r"^ +paper +0\.1 +as issue 14", said, re.MULTILINE)
    assert "0 without a source" in said
    assert "- FID 3.4 (README checkpoints" in said


@pytest.mark.parametrize(
    ("name", "key", "other"),
    [
        ("scalelong-cifar10", "training.batch", 64),
        ("udit-b", "published.parameters", "204.43M"),
        ("stf-cifar10-ddpmpp", "grid.target", 4096),
        ("patch-imagenet256", "training.label_dropout", 0),
    ],
)
def test_known_conflicts_are_told(name, key, other):
    source = load(FILES[name]).sources[key]
    assert other in [conflict.value for conflict in source.conflicts]


def test_a_study_is_found_by_its_file_or_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert sources.find("uvit-cifar10") == FILES["uvit-cifar10"].relative_to(ROOT)
    assert sources.find(str(FILES["udit-s"])) == FILES["udit-s"]
    assert sources.find("digits") == Path("config.yaml")
    with pytest.raises(UserError, match="neither a file nor a study of this folder; studies: conf"):
        sources.find("uvit-cifar11")


def told(change: dict) -> str:
    with pytest.raises(UserError) as caught:
        runs(load({**base(), **change}))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"training.lrr": "code(a)"}, "the study sets no such key; did you mean 'training.lr'?"),
        ({"training.lr": "code a"}, "is not of the form code(place) or ours(reason)"),
        ({"training.lr": "ours()"}, "ours needs a note"),
        ({"training.lr": {"source": "code"}}, "code needs where"),
        ({"training.lr": "memory(x)"}, "input should be 'paper', 'code', 'readme' or 'ours'"),
    ],
)
def test_a_source_must_say_something_of_a_key_that_is_set(source, words):
    assert words in told({"sources": source})


# --- what a published protocol asks of a study ------------------------------------------------

DIGITS = base()["dataset"]
LATENTS = {"name": "z", "source": "latents", "path": "z"}
IMAGES = {"name": "x", "source": "folder", "path": "x"}
DECODER = {"weights": "vae.pth", "scale": 1.0}
DDPM = {"kind": "ddpm", "splits": [0.25]}


def training(**more) -> dict:
    return {**base()["training"], **more}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": LATENTS}, "dataset.decoder: missing; z holds latents"),
        (
            {"dataset": {**LATENTS, "decoder": DECODER}},
            "dataset.reference: missing; z holds latents",
        ),
        ({"dataset": {**DIGITS, "decoder": DECODER}}, "dataset.decoder: digits holds images"),
        (
            {"dataset": {**DIGITS, "reference": {**IMAGES, "name": "digits"}}},
            "dataset.reference.name: 'digits' is the name of dataset, with other settings",
        ),
        (measured(guidance=1.5), "protocols.final.guidance needs training.cond"),
        (
            {**measured(guidance=1.5), "training": training(conditional=True)},
            "the null label is never trained; set training.label_dropout",
        ),
        (
            {
                "training": training(conditional=True, label_dropout=0.1),
                "backbones": {"uvit": {"preset": "tiny", "options": {"null_label": False}}},
            },
            "training.label_dropout: the network has no null label; set its option null_label",
        ),
        (
            {
                "training": training(conditional=True, label_dropout=0.1),
                "backbones": {"uvit": {"family": "udit", "preset": "tiny"}},
                "grid": {"backbone": ["uvit"]},
            },
            "U-DiT drops labels itself, with its option class_dropout_prob",
        ),
        ({"formulation": {**DDPM, "split": 0}}, "formulation.split: samples need the models of"),
        ({"training": training(models=[{"split": 0}])}, "models belongs to formulation.splits"),
        (
            {"formulation": DDPM, "training": training(models=[{"split": 0}, {"split": 0}])},
            "each of split 0 to 1 is to be there once, got [0, 0]",
        ),
        (
            {
                "formulation": DDPM,
                "training": training(models=[{"split": 0, "start": 1}, {"split": 1}]),
            },
            "training.models[0].start: the model of split 1 does not come earlier",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_is_one_line(change, words):
    assert words in told(change)


def test_guidance_may_be_a_number_or_a_mapping():
    content = {**base(), "training": training(conditional=True, label_dropout=0.1)}
    for guidance in (1.5, {"scale": 1.5}):
        study = load({**content, **measured(guidance=guidance)})
        assert runs(study)
        (one,) = study.protocols["final"].guidance
        assert one.model_dump(mode="json") == {"scale": 1.5}


def test_texts_are_refused_before_anything_starts():
    study = load(FILES["uvit-mscoco"])
    (run,) = runs(study).values()
    assert "hold no texts" in run.spec.unsupported
    assert run.spec.unsupported in plan.summary(study, plan.plan(study, counting=False))
    assert next(iter(runs(load(base())).values())).spec.unsupported is None


# --- what the stages do with it --------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({"name": "digits", "source": "digits", "max_images": 32}, path)
    return path


def spec(family: str, options: dict, **sections) -> dict:
    content = {**base(), "grid": {"backbone": [family]}, "backbones": {family: options}, **sections}
    return next(iter(runs(load(content)).values())).spec


def trained(folder: Path, data: Path, the_spec: dict, **more) -> dict[str, torch.Tensor]:
    train(the_spec, data, folder / "train", folder / "state", threads=1, **more)
    return load_file(folder / "train/weights.safetensors")


def split_spec(*models: dict) -> dict:
    return spec(
        "patch_unet",
        {"preset": "tiny"},
        formulation={"kind": "ddpm", "splits": [0.25], "prediction": "x0"},
        training=training(steps=3, ema={"rate": 0.5}, models=list(models)),
    )


def part(weights: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    prefix = f"networks.{number}."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def test_split_models_train_one_after_another(digits, tmp_path):
    still = {"split": 0, "start": 1, "lr": 1e-30}
    weights = trained(tmp_path / "a", digits, split_spec({"split": 1}, still))
    status = read_json(tmp_path / "a/train/status.json")
    assert (status["step"], status["steps"]) == (6, 6)
    # The second model starts from the average of the first; its own steps leave that alone.
    noisy, clean = part(weights, 1), part(weights, 0)
    assert all(torch.equal(noisy[key], clean[key]) for key in noisy)
    moving = {"split": 0, "lr": 1e-2}
    other = trained(tmp_path / "b", digits, split_spec({"split": 1}, moving))
    assert all(torch.equal(noisy[key], value) for key, value in part(other, 1).items())
    assert not all(torch.equal(clean[key], value) for key, value in part(other, 0).items())


def test_split_models_resume_to_the_same_bytes_and_sample_together(digits, tmp_path):
    the_spec = split_spec({"split": 1, "steps": 2}, {"split": 0, "start": 1, "betas": [0.9, 0.9]})
    trained(tmp_path / "whole", digits, the_spec)
    stop = tmp_path / "stop"
    stop.touch()
    for _ in range(4):
        with pytest.raises(Interrupted):
            trained(tmp_path / "parts", digits, the_spec, stop_file=stop)
    trained(tmp_path / "parts", digits, the_spec)
    for name in ("weights.safetensors", "raw.safetensors", "dynamics.parquet"):
        whole, parts = (tmp_path / folder / "train" / name for folder in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name

    def images() -> np.ndarray:
        four = Measurement(sampler={"kind": "ancestral", "respacing": "4"}, images=4)
        folder = tmp_path / "whole/measurements" / four.name
        generate(tmp_path / "whole", four, digits, folder)
        return np.load(folder / "samples.npz")["arr_0"]

    both = images()
    path = tmp_path / "whole/train/weights.safetensors"
    for number in (0, 1):
        weights = load_file(path)
        changed = {
            k: v + 1 if k.startswith(f"networks.{number}.") else v for k, v in weights.items()
        }
        save_file(changed, path)
        assert not np.array_equal(images(), both), f"model {number} has no part in sampling"
        save_file(weights, path)


def test_udit_drops_labels_in_training(digits, tmp_path):
    options = {"preset": "tiny", "options": {"class_dropout_prob": 0.5}}
    the_spec = spec("udit", options, training=training(steps=4, lr=1e-2, conditional=True))
    weights = trained(tmp_path / "a", digits, the_spec)
    options["options"]["class_dropout_prob"] = 1e-9
    never = spec("udit", options, training=training(steps=4, lr=1e-2, conditional=True))
    other = trained(tmp_path / "b", digits, never)
    for number in (1, 2, 3):
        key = f"y_embedder_{number}.embedding_table.weight"
        # Without a drop the null row, the last one, stays as it was at the start.
        assert not torch.equal(weights[key][-1], other[key][-1]), key


def test_tf32_is_allowed_only_where_it_is_asked_for():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with arithmetic("tf32"):
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    with arithmetic("fp32"):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_a_data_set_must_have_the_stated_classes(tmp_path):
    with pytest.raises(UserError, match="the labels have 10 classes, not 1000"):
        convert({"name": "d", "source": "digits", "classes": 1000}, tmp_path / "d.zip")


# --- latents -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> LatentDecoder:
    torch.manual_seed(0)
    return LatentDecoder(channels=4, widths=[32, 64], blocks=2, scale=0.5).eval()


def diffusers_name(key: str) -> str:
    """What diffusers calls a tensor of a decoder with two levels."""
    key = re.sub(
        r"decoder\.mid\.block_(\d)", lambda m: f"decoder.mid_block.resnets.{int(m[1]) - 1}", key
    )
    key = key.replace("decoder.mid.attn_1.norm", "decoder.mid_block.attentions.0.group_norm")
    key = re.sub(r"decoder\.mid\.attn_1\.([qkv])\.", r"decoder.mid_block.attentions.0.to_\1.", key)
    key = key.replace("decoder.mid.attn_1.proj_out", "decoder.mid_block.attentions.0.to_out.0")
    key = re.sub(
        r"decoder\.up\.(\d)\.block\.", lambda m: f"decoder.up_blocks.{1 - int(m[1])}.resnets.", key
    )
    key = re.sub(
        r"decoder\.up\.(\d)\.upsample\.",
        lambda m: f"decoder.up_blocks.{1 - int(m[1])}.upsamplers.0.",
        key,
    )
    key = key.replace("nin_shortcut", "conv_shortcut")
    return key.replace("decoder.norm_out", "decoder.conv_norm_out")


def test_decoder_reads_both_namings_and_divides_by_the_scale(decoder, tmp_path):
    latents = torch.randn(2, 4, 4, 4)
    expected = decoder.decode(latents)
    assert expected.shape == (2, 3, 8, 8)
    checkpoint = {f"first_stage_model.{k}": v for k, v in decoder.state_dict().items()}
    torch.save({"state_dict": {**checkpoint, "model.x": torch.ones(1)}}, tmp_path / "a.ckpt")
    renamed = {diffusers_name(k): v for k, v in decoder.state_dict().items()}
    renamed = {
        k: v.flatten(1) if ".attentions." in k and v.ndim == 4 else v for k, v in renamed.items()
    }
    save_file({**renamed, "encoder.conv_in.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    for name in ("a.ckpt", "b.safetensors"):
        torch.testing.assert_close(load_decoder(tmp_path / name, 0.5).decode(latents), expected)
    halved = load_decoder(tmp_path / "a.ckpt", 1.0).decode(latents * 2)
    torch.testing.assert_close(halved, expected)


def test_stable_diffusions_decoder_has_the_known_size():
    with torch.device("meta"):
        whole = LatentDecoder(4, [128, 256, 512, 512], 3, 0.18215)
    assert sum(p.numel() for p in whole.parameters()) == 49_490_199


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x": torch.ones(1)}, "not the decoder"),
        (None, "no such file"),
        ("text", "not a file of weights"),
    ],
)
def test_another_file_is_no_decoder(content, words, tmp_path):
    path = tmp_path / "vae.pth"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        load_decoder(path, 1.0)
    assert "\n" not in str(caught.value)


def test_latents_become_images(decoder, tmp_path):
    source, data = tmp_path / "source", tmp_path / "latents.zip"
    source.mkdir()
    moments = np.random.default_rng(0).normal(size=(12, 8, 8, 8)).astype(np.float32)
    np.savez(source / "all.npz", moments=moments, labels=np.arange(12) % 3)
    dataset = {"name": "z", "source": "latents", "path": str(source), "moments": "mean_logvar"}
    dataset |= {"scale": 0.5, "channels": 4, "classes": 3, "resolution": 8}
    convert(dataset, data)
    torch.save(decoder.state_dict(), tmp_path / "vae.pth")
    vae = str(tmp_path / "vae.pth")
    (run,) = runs(
        load(
            {
                **base(),
                "dataset": {
                    **dataset,
                    "reference": IMAGES,
                    "decoder": {"weights": vae, "scale": 0.5},
                },
                "grid": {"backbone": ["uvit"]},
                "backbones": {"uvit": {"options": {"embed_dim": 16, "depth": 2, "num_heads": 2}}},
                "training": training(
                    steps=2, conditional=True, label_dropout=0.5, precision="tf32"
                ),
                **measured(guidance=1.5, images=5, extractors="pixels", metrics=["fd"]),
            }
        )
    ).values()
    trained(tmp_path / "run", data, run.spec)
    (measurement,) = run.measurements
    folder = tmp_path / "run/measurements" / measurement.name
    plain = measurement.cell.model_copy(update={"decoder": None})
    with pytest.raises(UserError, match=r"dataset\.decoder: missing"):
        generate(tmp_path / "run", plain, data, folder)
    generate(tmp_path / "run", measurement.cell, data, folder, decoder=vae)
    images = np.load(folder / "samples.npz")["arr_0"]
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    facts = read_json(folder / "generate.json")
    assert facts["decoder"]["scale"] == 0.5 and len(facts["decoder"]["weights_sha256"]) == 64
    assert Archive(data).moments and zipfile.is_zipfile(data)
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 16
