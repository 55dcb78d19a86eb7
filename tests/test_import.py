"""Official checkpoints: recognised, imported unchanged, and never executed."""

import argparse
import builtins
import io
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pyarrow.parquet
import pytest
import torch
from miniature import base, measured
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from study import arms
from study.cli import app
from study.data.convert import convert
from study.files import UserError, read_json, sha256
from study.importing import arm_of, import_checkpoint, import_run, open_checkpoint
from study.importing.reading import LEGACY_MAGIC, read
from study.ledger import digest
from study.network import build_network
from study.parity import official
from study.sampling.draw import generate
from study.spec.measuring import Measurement
from study.spec.run import Spec
from study.spec.study import load

MARK = "code in the file was executed"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def canary(monkeypatch):
    """Whatever a malicious file of these tests does, it ends here, and is noticed."""
    called = []
    monkeypatch.setattr(builtins, "longskip_canary", lambda *_: called.append(MARK), raising=False)
    yield called
    assert not called, MARK


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({"source": "digits"}, path)
    return path


def awake(network):
    """Every parameter redrawn, so that no branch is silent."""
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return network.eval()


def uvit(**changes):
    arguments = {
        "img_size": 8,
        "in_chans": 1,
        "patch_size": 2,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "mlp_ratio": 2,
    }
    return awake(official.uvit(**(arguments | changes)))


def udit(**changes):
    arguments = {
        "input_size": 8,
        "in_channels": 1,
        "hidden_size": 12,
        "depth": [1, 1, 1, 1, 1],
        "num_heads": 3,
        "mlp_ratio": 2,
        "num_classes": 10,
        "down_factor": [2, 2, 1, 2, 2],
        "attn_type": "v2",
        "posemb_type": "rope2d",
        "downsampler": "dwconv5",
        "down_shortcut": 1,
    }
    return awake(official.udit(**(arguments | changes)))


def patched(**changes):
    arguments = {
        "image_size": 8,
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 2,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "patch_size": 2,
        "channel_mult": [1, 2],
        "use_scale_shift_norm": True,
        "num_head_channels": 16,
        "use_new_attention_order": True,
    }
    return awake(official.patch_unet(**(arguments | changes)))


SONG = {
    "img_resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "channel_mult_emb": 2,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.13,
    "augment_dim": 9,
}
NCSN = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}


def song(**changes):
    return awake(official.songunet(**(SONG | changes)))


# --- EDM's files: network objects that carry their own source code -----------------------------


class Persistent:
    """An object that pickles as those of EDM's ``persistent_class`` do."""

    source = "import builtins\nbuiltins.longskip_canary()\n"

    def __init__(self, class_name, state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self.class_name,
            "state": self.state,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


@pytest.fixture
def edm(monkeypatch):
    """Stand-ins for the modules that EDM's pickles name, so that this process can write them."""

    def _reconstruct_persistent_obj(meta):
        builtins.longskip_canary()

    class EasyDict(dict):
        def __getattr__(self, name):
            if name in self:
                return self[name]
            raise AttributeError(name)

    modules = {
        name: types.ModuleType(name)
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    modules["dnnlib.util"].EasyDict = EasyDict
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return EasyDict


OFFICIAL_CLASSES = {"Block": "UNetBlock", "Conv": "Conv2d", "Positional": "PositionalEmbedding"}


def persistent(module, **recorded):
    """A network as EDM pickles it: every one of its own layers is persistent, PyTorch's are not."""
    children = {
        name: None if child is None else persistent(child)
        for name, child in module._modules.items()
    }
    if isinstance(module, nn.ModuleDict):
        native = nn.ModuleDict()
        native._modules = children
        return native
    state = {k: v for k, v in nn.Module.__dict__["__dict__"].__get__(module).items() if k[0] == "_"}
    name = type(module).__name__
    # Some of EDM's arguments are NumPy numbers.
    arguments = recorded or {"skip_scale": np.sqrt(0.5), "attention": np.bool_(True)}
    state |= {"_modules": children, "_init_args": (), "_init_kwargs": arguments}
    return Persistent(OFFICIAL_CLASSES.get(name, name), state)


def preconditioned(network, class_name="EDMPrecond", attributes=None, **recorded):
    state = dict(nn.Module().__dict__)
    attributes = {"sigma_data": 0.5, "sigma_min": 0, "sigma_max": float("inf")} | (attributes or {})
    state |= attributes | {"_init_args": (), "_init_kwargs": {}}
    state["_modules"] = {"model": persistent(network, **recorded)}
    return Persistent(class_name, state)


def snapshot(easy, network, **recorded):
    loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
    return {
        "ema": preconditioned(network, **recorded),
        "loss_fn": loss,
        "augment_pipe": Persistent("AugmentPipe", {"p": 0.15, "xflip": 1e8, "_buffers": {}}),
        "dataset_kwargs": easy(path="cifar10.zip", use_labels=False, class_name="ImageFolder"),
    }


# --- imported unchanged ------------------------------------------------------------------------


def imported(run_dir):
    """The network of a run folder, as ``study generate`` builds it, and its status."""
    status = read_json(run_dir / "train" / "status.json")
    spec = status["spec"]
    shape = types.SimpleNamespace(
        resolution=spec["dataset"]["resolution"] or 8, channels=1, num_classes=10
    )
    network = build_network(Spec.read(spec), shape).eval()
    network.load_state_dict(load_file(run_dir / "train" / "weights.safetensors"))
    return network, status


def same_output(one, other, label=None):
    x, noise = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 300.0])
    with torch.no_grad():
        return torch.equal(one(x, noise, label), other(x, noise, label))


LABELS = torch.tensor([0, 7, 9])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("changes", "more", "scaling"),
    [
        ({}, {}, "none"),
        ({"num_classes": 11}, {}, "none"),
        ({"num_classes": 10}, {}, "none"),
        ({"mlp_time_embed": True, "qkv_bias": True, "conv": False}, {}, "none"),
        ({"skip": False}, {}, "none"),
        ({"scalelong": 2, "kappa": 0.7}, {"scalelong": 2, "kappa": 0.7}, "cs"),
        ({"scalelong": 1}, {"scalelong": 1}, "inv_sqrt2"),
        ({"scalelong": 3}, {}, "ls"),
        ({"scalelong": 4}, {}, "ls_unshared"),
    ],
)
def test_uvit_and_scalelong(tmp_path, digits, changes, more, scaling, legacy):
    network = uvit(**changes)
    path = tmp_path / "nnet_ema.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    status = import_checkpoint(
        path, tmp_path / "run", data=digits, options={"num_heads": 3, **more}
    )
    made, written = imported(tmp_path / "run")
    label = LABELS if "num_classes" in changes else None
    assert same_output(made, network, label)
    assert status["spec"]["skip_scaling"]["method"] == scaling
    assert written["imported"]["sha256"] == sha256(path)
    assert written["imported"]["layout"] == "U-ViT"
    assert written["skips"] == (0 if changes.get("skip") is False else 2)
    assert status["spec"]["backbone"]["options"]["null_label"] == (changes != {"num_classes": 10})


def test_what_is_assumed_is_said(tmp_path, capsys):
    torch.save(uvit().state_dict(), tmp_path / "nnet.pth")
    import_checkpoint(tmp_path / "nnet.pth", tmp_path / "run", options={"num_heads": 3})
    lines = capsys.readouterr().out.splitlines()
    said = next(line for line in lines if line.startswith("Assumed"))
    assert "scalelong 0" in said and "formulation" in said and "num_heads" not in said
    import_checkpoint(
        tmp_path / "nnet.pth",
        tmp_path / "run",
        options={"num_heads": 3, "scalelong": 0},
        process="vpsde",
    )
    assert "nothing" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"rep": 0}, {}),
        ({"learn_sigma": False, "class_dropout_prob": 0}, {}),
        (
            {"ffn_type": "basic", "attn_type": None, "posemb_type": None, "downsampler": "dwconv3"},
            {"num_heads": 3, "posemb_type": None},
        ),
    ],
)
def test_udit_has_averaged_and_raw_weights(tmp_path, digits, changes, more):
    network, other = udit(**changes), udit(**changes)
    content = {
        "model": other.state_dict(),
        "ema": network.state_dict(),
        "opt": torch.optim.AdamW(other.parameters()).state_dict(),
        "args": argparse.Namespace(model="U-DiT-S", image_size=64, num_classes=1000),
    }
    torch.save(content, tmp_path / "0400000.pt")
    options = {"down_factor": [2, 2, 1, 2, 2], **more}
    import_checkpoint(tmp_path / "0400000.pt", tmp_path / "run", data=digits, options=options)
    made, status = imported(tmp_path / "run")
    assert same_output(made, network, LABELS)
    made.load_state_dict(load_file(tmp_path / "run" / "train" / "raw.safetensors"))
    assert same_output(made, other, LABELS)
    assert status["imported"]["weights"] == {"ema": "ema", "raw": "model"}
    assert status["imported"]["arguments"]["model"] == "U-DiT-S"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 10},
        {"num_classes": 10, "classifier_free": False},
        {"out_channels": 1, "resblock_updown": True, "num_res_blocks": 2},
        {"channel_mult": [1, 1], "conv_resample": False, "attention_resolutions": [1, 2]},
        {"channel_mult": [2, 3], "out_channels": 1},
        {"patch_size": 1, "channel_mult": [1, 1, 2], "attention_resolutions": [4]},
    ],
)
def test_patch_diffusion(tmp_path, digits, changes):
    network = patched(**changes)
    torch.save(network.state_dict(), tmp_path / "ema_0.9999_500000.pt")
    import_checkpoint(
        tmp_path / "ema_0.9999_500000.pt",
        tmp_path / "run",
        data=digits,
        options={"num_head_channels": 16},
    )
    made, status = imported(tmp_path / "run")
    assert same_output(made, network, LABELS if "num_classes" in changes else None)
    variance = "fixed_large" if changes.get("out_channels") == 1 else "learned"
    assert status["spec"]["formulation"]["variance"] == variance


@pytest.mark.parametrize(
    ("changes", "preconditioning", "attributes", "kind"),
    [
        ({}, "EDMPrecond", {}, "edm"),
        (NCSN, "VEPrecond", {"sigma_min": 0.02, "sigma_max": 100}, "ve"),
        ({"label_dim": 10, "augment_dim": 0}, "VPPrecond", {"beta_d": 19.9, "M": 1000}, "vp"),
        ({"out_channels": 2}, "iDDPMPrecond", {"C_1": 0.001, "C_2": 0.008, "M": 1000}, "iddpm"),
        ({"augment_dim": 6}, "EDMPrecond", {"sigma_data": 0.4}, "edm"),
    ],
)
def test_edm_snapshot(tmp_path, digits, edm, changes, preconditioning, attributes, kind):
    network = song(**changes)
    arguments = SONG | changes
    content = snapshot(edm, network, class_name=preconditioning, attributes=attributes, **arguments)
    path = tmp_path / "network-snapshot-200000.pkl"
    path.write_bytes(pickle.dumps(content))
    import_checkpoint(path, tmp_path / "run", data=digits)
    made, status = imported(tmp_path / "run")
    spec = status["spec"]
    if "label_dim" in changes:
        assert same_output(made, network, LABELS)
    assert same_output(made, network)
    assert spec["formulation"]["kind"] == kind
    assert spec["formulation"].items() >= attributes.items() or kind == "ve"
    assert spec["backbone"]["family"] == ("ncsnpp" if changes == NCSN else "ddpmpp")
    assert spec["training"]["augment"] == (0.15 if arguments["augment_dim"] == 9 else 0.0)
    assert spec["training"]["dropout"] == 0.13
    assert status["imported"]["dataset_kwargs"]["path"] == "cifar10.zip"
    assert status["imported"]["assumed"] == {}


@pytest.mark.parametrize("keys", [("net",), ("ema", "net")], ids=["edm", "stf"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_training_state(tmp_path, digits, edm, keys, form):
    networks = {key: song() for key in keys}
    content = {key: preconditioned(one, **SONG) for key, one in networks.items()}
    optimizer = torch.optim.Adam(networks["net"].parameters())
    content |= {"optimizer_state": optimizer.state_dict(), "step": 1000}
    path = tmp_path / "training-state-001000.pt"
    with path.open("wb") as file:
        torch.save(content, file) if form == "torch" else pickle.dump(content, file)
    import_checkpoint(path, tmp_path / "run", data=digits)
    made, _ = imported(tmp_path / "run")
    assert same_output(made, networks[keys[0]])
    made.load_state_dict(load_file(tmp_path / "run" / "train" / "raw.safetensors"))
    assert same_output(made, networks["net"])


def test_tensors_that_share_storage_or_are_half_precision(tmp_path, digits, edm):
    network = song()
    network.half()
    weight = network.map_layer0.weight
    weight.data = weight.data.t().contiguous().t()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(snapshot(edm, network, **SONG)))
    import_checkpoint(tmp_path / "a.pkl", tmp_path / "run", data=digits)
    made, _ = imported(tmp_path / "run")
    assert all(value.dtype == torch.float32 for value in made.state_dict().values())
    assert torch.equal(made.map_layer0.weight, weight.float())


# --- what a run folder is for ------------------------------------------------------------------


def six_samples(**sampler):
    return Measurement(sampler=sampler or {"kind": "edm_heun", "steps": 2}, images=6)


@pytest.mark.parametrize("kind", ["dynamics", "robustness", "representation"])
def test_imported_run_is_probed(tmp_path, digits, edm, kind):
    from study.probes.base import probe

    (tmp_path / "a.pkl").write_bytes(pickle.dumps(snapshot(edm, song(), **SONG)))
    import_checkpoint(tmp_path / "a.pkl", tmp_path / "run", data=digits)
    out = tmp_path / "run/probes" / f"{kind}.parquet"
    found = probe(kind, digits, out, {"samples": 8}, run_dir=tmp_path / "run", threads=1)
    assert (found["status"], found["rows"] > 0) == ("done", True)
    assert found["weights_sha256"] and found["spec"]["backbone"]["family"] == "ddpmpp"


def test_imported_run_generates_and_is_measured(tmp_path, digits, edm):
    from study.fidelity.evaluate import evaluate
    from study.fidelity.reference import make_reference

    content = snapshot(edm, song(), **SONG)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    run = tmp_path / "run"
    import_checkpoint(tmp_path / "a.pkl", run, data=digits)
    measurement = six_samples()
    folder = run / "measurements" / measurement.name
    result = generate(run, measurement, digits, folder)
    assert result["images"] == 6
    made = np.load(folder / "samples.npz")["arr_0"]
    assert made.shape == (6, 8, 8, 1) and made.std() > 0
    make_reference(digits, "pixels", None, tmp_path / "reference")
    settings = {"extractor": "pixels", "metrics": ["fd"]}
    evaluate(folder / "samples.npz", tmp_path / "reference", settings, folder / "pixels.json")
    assert read_json(folder / "pixels.json")["metrics"]["fd_pixels_6"] > 0


def test_logs_are_there_and_empty(tmp_path, digits):
    torch.save(uvit().state_dict(), tmp_path / "nnet.pth")
    import_checkpoint(tmp_path / "nnet.pth", tmp_path / "run", options={"num_heads": 3})
    for name in ("dynamics", "timing"):
        table = pyarrow.parquet.read_table(tmp_path / "run" / "train" / f"{name}.parquet")
        assert table.num_rows == 0
        assert table.column_names == ["step", "quantity", "where", "value"]
    status = read_json(tmp_path / "run" / "train" / "status.json")
    assert (status["status"], status["step"], status["images_seen"]) == ("done", 0, 0)


# --- an arm that names a checkpoint ------------------------------------------------------------


def study(**arm):
    content = base()
    del content["grid"]
    content["formulation"] = {"kind": "vpsde"}
    content |= measured(sampler={"kind": "dpm_solver", "steps": 4})
    arm = {"backbone": "uvit", "checkpoint": "weights/nnet_ema.pth", **arm}
    return content | {"arms": [arm]}


def only(content):
    (run,) = arms.runs(load(content)).values()
    return run


def test_path_is_no_setting_but_name_and_hash_are():
    first = only(study())
    assert first.checkpoint == "weights/nnet_ema.pth"
    assert first.display.endswith("nnet_ema.pth")
    moved = only(study(checkpoint="elsewhere/nnet_ema.pth"))
    assert (moved.name, moved.spec) == (first.name, first.spec)
    named = only(study(checkpoint={"path": "x.pth", "name": "nnet_ema.pth"}))
    assert named.name == first.name
    assert only(study(checkpoint={"path": "weights/nnet.pth"})).name != first.name
    hashed = only(study(checkpoint={"path": "x.pth", "sha256": "0" * 64}))
    renamed = only(study(checkpoint={"path": "y.pth", "name": "y", "sha256": "0" * 64}))
    assert hashed.name == renamed.name != first.name


def test_training_settings_of_the_study_are_none_of_an_imported_run():
    first = only(study())
    longer = study()
    longer["training"] = {"steps": 99, "batch": 4, "lr": 0.1, "clip": 1.0}
    longer["seed"] = [0, 1, 2]
    assert only(longer).name == first.name
    conditional = only(study(training={"conditional": True}))
    assert conditional.name != first.name
    assert first.spec.steps == 0


def test_trained_arms_keep_their_names():
    content = study()
    content["grid"] = base()["grid"]
    without = {**content, "arms": []}
    assert set(arms.runs(load(without))) < set(arms.runs(load(content)))
    trained = [run for run in arms.runs(load(content)).values() if run.grid]
    assert all(run.checkpoint is None and run.spec.checkpoint is None for run in trained)


def test_canonical_form_of_an_imported_run_is_completed_to_its_spec():
    for named in ("a.pth", {"path": "a.pth", "sha256": "0" * 64}):
        run = only(study(checkpoint=named, training={"conditional": True}))
        assert Spec.read(run.spec.chosen) == run.spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0, 1]}, "one trained network"),
        ({"checkpoint": {"path": "a.pth", "sha256": "abc"}}, "sha256"),
        ({"checkpoint": {"paht": "a.pth"}}, "did you mean 'path'"),
        (
            {"formulation": {"kind": "ddpm", "splits": [0.25]}, "backbone": "patch_unet"},
            "holds one network",
        ),
    ],
)
def test_arms_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        arms.runs(load(study(**change)))


def test_two_files_of_one_name_are_told_apart_or_refused():
    content = study()
    content["arms"] += [{"backbone": "uvit", "checkpoint": "other/nnet_ema.pth"}]
    with pytest.raises(UserError, match=r"arms\[1\]\.checkpoint.*give them names"):
        arms.runs(load(content))
    content["arms"][1]["checkpoint"] = {"path": "other/nnet_ema.pth", "name": "later"}
    assert len(arms.runs(load(content))) == 2


def test_code_of_the_trainer_and_of_the_import_are_apart():
    run = only(study())
    trained = run.spec.model_copy(update={"checkpoint": None})
    assert digest.training(run.spec) != digest.training(trained)
    modules = digest.closure(digest._verbs()["train"])
    assert not any(module.startswith("study.importing") for module in modules)
    importing = digest.closure(digest._verbs()["import"])
    assert "study.importing.reading" in importing and "study.training.loop" not in importing


def test_arm_of_a_study_from_import_to_samples(tmp_path, digits, capsys):
    path = tmp_path / "nnet_ema.pth"
    network = uvit(depth=6, scalelong=2, kappa=0.7, num_classes=11)
    torch.save(network.state_dict(), path)
    options = {"num_heads": 3, "scalelong": 2, "kappa": 0.7}
    status = import_checkpoint(path, tmp_path / "by hand", data=digits, options=options)
    said = capsys.readouterr().out.splitlines()[-1]
    arm = json.loads(said.removeprefix("As an arm of a study: "))
    assert arm == arm_of(status, path)
    content = study()
    content["backbones"] = {}
    run = only(content | {"arms": [arm]})

    arguments = {
        "--spec": run.spec.key,
        "--checkpoint": run.checkpoint,
        "--code": digest.training(run.spec),
        "--data": digits,
        "--out": tmp_path / run.name / "train",
        "--state": tmp_path / run.name / "state",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    done = CliRunner().invoke(app, ["train", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    made, written = imported(tmp_path / run.name)
    assert same_output(made, network, LABELS)
    assert written["run"] == run.name and written["code"] == digest.training(run.spec)
    assert Spec.read(written["spec"]) == run.spec

    from study.ledger.status import outdated

    assert outdated(run, written) == ""
    measurement = six_samples(kind="dpm_solver", steps=4)
    folder = tmp_path / run.name / "measurements" / measurement.name
    result = generate(tmp_path / run.name, measurement, digits, folder)
    assert result["status"] == "done"
    assert len(np.load(folder / "samples.npz")["arr_0"]) == 6


def test_another_file_than_the_named_one_is_refused(tmp_path, digits):
    torch.save(uvit(depth=6).state_dict(), tmp_path / "a.pth")
    run = only(study(checkpoint={"path": "a.pth", "sha256": "0" * 64}))
    with pytest.raises(UserError, match="another file"):
        import_run(run.spec, tmp_path / "a.pth", digits, tmp_path / "run" / "train")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"num_blocks": 2}}, "num_blocks 1, not 2"),
        ({"options": {"embedding_type": "fourier"}}, "embedding_type 'positional', not 'fourier'"),
        ({"formulation": {"kind": "vp"}}, "kind 'edm', not 'vp'"),
        ({"formulation": {"kind": "edm", "sigma_data": 0.7}}, r"sigma_data 0\.5, not 0\.7"),
    ],
)
def test_what_a_file_says_of_its_network_must_agree_with_the_arm(
    tmp_path, digits, edm, change, message
):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(snapshot(edm, song(), **SONG)))
    options = {"model_channels": 16, "channel_mult": [1, 2], "channel_mult_emb": 2, "num_blocks": 1}
    options |= {"attn_resolutions": [4]} | change.pop("options", {})
    arm = {"backbone": "ddpmpp", "checkpoint": "a.pkl", "formulation": {"kind": "edm"}}
    arm |= {"training": {"augment": 0.12}, "options": options}
    right = study(
        **(arm | {"options": options | {"num_blocks": 1, "embedding_type": "positional"}})
    )
    import_run(only(right).spec, tmp_path / "a.pkl", digits, tmp_path / "right" / "train")
    with pytest.raises(UserError, match=message):
        import_run(only(study(**(arm | change))).spec, tmp_path / "a.pkl", digits, tmp_path / "run")


def test_weights_that_do_not_fit_the_arm_are_refused(tmp_path, digits):
    torch.save(uvit(embed_dim=96, depth=6).state_dict(), tmp_path / "nnet_ema.pth")
    with pytest.raises(UserError, match=r"do not fit .*places: pos_embed is \[1, 17, 96\]"):
        import_run(only(study()).spec, tmp_path / "nnet_ema.pth", digits, tmp_path / "train")
    assert not (tmp_path / "train" / "status.json").exists()


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 12}, r"depth: 12 was given, but the file has 4"),
        ({"img_size": 32}, r"img_size: 32 was given, but the file has 8"),
        ({"dept": 4}, "dept: unknown"),
        ({"scalelong": 3}, "the file has no gates"),
        ({"scalelong": 7}, "allowed: 0, 1, 2, 3, 4"),
    ],
)
def test_options_that_contradict_the_file(tmp_path, options, message):
    torch.save(uvit().state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "run", options=options)


def test_preset_that_contradicts_the_file_and_unknown_preset(tmp_path):
    torch.save(uvit().state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="embed_dim: 512 was given, but the file has 48"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "run", preset="cifar10-S2")
    with pytest.raises(UserError, match="allowed: tiny, cifar10-S2"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "run", preset="cifar10")


def test_network_for_other_images(tmp_path, digits):
    torch.save(uvit(img_size=16).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="resolution 16, but the data set has 8"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "run", data=digits)
    torch.save(uvit(num_classes=101).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="101 rows, but there are 10 classes"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "run", data=digits)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: torch.optim.Adam(uvit().parameters()).state_dict(), "state of an optimiser"),
        (lambda: {"weight": torch.ones(2)}, "none of this project's networks"),
        (lambda: {"epoch": 3}, "holds no network"),
        (lambda: torch.ones(3), "holds no network"),
        (
            lambda: official.uvit(
                img_size=8, patch_size=2, embed_dim=48, depth=4, num_heads=3, num_clip_token=7
            ).state_dict(),
            "text features",
        ),
        (
            lambda: {
                "time_embed.0.weight": torch.ones(4, 4),
                "input_blocks.0.0.weight": torch.ones(4, 3, 3, 3),
                "input_blocks.1.0.emb_layers.1.weight": torch.ones(4, 4),
            },
            "ADM",
        ),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    torch.save(content(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "run")


def test_networks_of_edm_that_are_no_backbones(tmp_path, edm):
    content = {"ema": preconditioned(song(), **SONG)}
    content["ema"].state["_modules"]["model"].class_name = "DhariwalUNet"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="DhariwalUNet"):
        open_checkpoint(tmp_path / "a.pkl")


@pytest.mark.parametrize("cut", [0, 3, 40, -2000, -1])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_damaged_files_are_one_line(tmp_path, edm, form, cut):
    content = {"w": torch.ones(300)}
    buffer = io.BytesIO()
    if form == "pickle":
        pickle.dump({"ema": preconditioned(song(), **SONG)}, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
    (tmp_path / "a.pt").write_bytes(buffer.getvalue()[:cut])
    with pytest.raises(UserError, match=r"a\.pt: (not a checkpoint that can|an empty)") as caught:
        read(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_line_on_the_command_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "run")


# --- malicious files ---------------------------------------------------------------------------


class Reduced:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Module(nn.Linear):
    """A network of a class that only the attacker has."""


CANARY = "__import__('builtins').longskip_canary()"


def payloads(folder):
    return {
        "os.system": Reduced(os.system, f"touch '{folder / 'executed'}'"),
        "eval": Reduced(eval, CANARY),
        "exec": Reduced(exec, CANARY),
        "getattr": Reduced(getattr, "text", "upper"),
        "__import__": Reduced(__import__, "os"),
        "torch.load": Reduced(torch.load, "file.pt"),
        "torch.hub": Reduced(torch.hub.load, "user/repository", "model"),
        "module": Module(2, 2),
        "numpy": Reduced(np.load, "file.npy", None, True),
    }


WANTED = {
    "os.system": r"(posix|nt|os)\.system",
    "eval": r"builtins\.eval",
    "exec": r"builtins\.exec",
    "getattr": r"builtins\.getattr",
    "__import__": r"builtins\.__import__",
    "torch.load": r"torch\.(serialization\.)?load",
    "torch.hub": r"torch\.hub\.load",
    # Protocol 0 names the function that makes objects of the class before the class.
    "module": r"test_import\.Module|copy_?reg\._reconstructor",
    "numpy": r"numpy\.load|numpy\.lib\S*\.load",
}


def dump(content, form):
    """Bytes of a file in one of the forms that checkpoints have."""
    buffer = io.BytesIO()
    if form.startswith("protocol"):
        pickle.dump(content, buffer, protocol=int(form[-1]))
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


def test_the_canary_tells_when_something_is_executed(canary, edm):
    pickle.loads(dump({"a": Reduced(eval, CANARY)}, "protocol 4"))
    pickle.loads(dump(Persistent("EDMLoss", {}), "protocol 4"))
    assert canary == [MARK, MARK]
    canary.clear()


FORMS = ("zip", "legacy", "protocol 0", "protocol 2", "protocol 4")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WANTED)
def test_calls_in_a_checkpoint_are_refused(tmp_path, name, form):
    content = OrderedDict(uvit().state_dict())
    content["extra"] = payloads(tmp_path)[name]
    path = tmp_path / "nnet.pth"
    path.write_bytes(dump(content, form))
    with pytest.raises(UserError, match=rf"refused, because it wants ({WANTED[name]});"):
        import_checkpoint(path, tmp_path / "run")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", ["zip", "protocol 2", "protocol 4"])
@pytest.mark.parametrize("name", WANTED)
def test_calls_inside_a_network_object_are_refused(tmp_path, edm, name, form):
    content = snapshot(edm, song(), **SONG)
    inner = content["ema"].state["_modules"]["model"]
    inner.state["_modules"]["enc"]._modules["8x8_conv"].state["hook"] = [payloads(tmp_path)[name]]
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(dump(content, form))
    with pytest.raises(UserError, match=rf"refused, because it wants ({WANTED[name]});"):
        read(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_object_in_the_legacy_form_is_refused(tmp_path, edm):
    (tmp_path / "a.pt").write_bytes(dump({"net": preconditioned(song(), **SONG)}, "legacy"))
    with pytest.raises(UserError, match=r"wants torch_utils\.persistence\._reconstruct"):
        read(tmp_path / "a.pt")


def test_calls_inside_the_content_of_a_tensor_are_refused(tmp_path, edm):
    """A pickled tensor holds a file of its own."""
    for form in ("zip", "legacy"):
        inside = dump({"a": Reduced(eval, CANARY)}, form)
        content = snapshot(edm, song(), **SONG)
        content["extra"] = Reduced(torch.storage._load_from_bytes, inside)
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"wants builtins\.eval"):
            read(tmp_path / "a.pkl")


def test_source_code_in_a_file_is_not_executed(tmp_path, edm):
    """The canary would tell, and so would a new module."""
    before = set(sys.modules)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(snapshot(edm, song(), **SONG)))
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch_utils", "dnnlib")]:
        sys.modules[name] = None  # an import would now fail
    contents = open_checkpoint(tmp_path / "a.pkl")
    assert contents.layout == "EDM"
    assert set(sys.modules) == before


def test_a_program_instead_of_weights_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(UserError, match="TorchScript"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        # Change the function that the unpickler calls for tensors, then go on.
        (b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'__code__'\nI1\nstb.", "to change a function"),
        (b"ctorch._utils\n_rebuild_parameter\n(I1\nI2\nI3\ntR.", "without a tensor"),
        # A name with dots would be looked up step by step.
        (b"\x80\x04\x8c\x05torch\x8c\x0cos.system.im\x93.", r"torch\.os\.system"),
        (b"ctorch\nos\n.", r"torch\.os"),
        (b"ctorch.storage\n_load_from_bytes\n(S'text'\ntR.", "no bytes"),
        (b"cnumpy\ndtype\n(S'O'\ntR.", "NumPy number of type 'O'"),
        (b"ccollections\nOrderedDict\n(}S'x'\nI1\nstb.", "to change a function"),
        (b"cdnnlib.util\nEasyDict\n)\x81(S'a'\nI1\ndb.", "with attributes"),
        (b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ.", "outside the file"),
        (b"\x82\x01.", "not a checkpoint"),
    ],
)
def test_pickles_written_by_hand(tmp_path, pickled, message):
    (tmp_path / "a.pkl").write_bytes(pickled)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.pkl")


def archived(pickled: bytes, **storages: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for key, content in storages.items():
            archive.writestr(f"a/data/{key}", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, "(I9\nt", "(I1\nt"), (8, "(I1\nt", "(I1\nt"), (-1, "(t", "(t")],
)
def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path, offset, size, stride):
    pickled = (
        f"(S'torch_utils.persistence'\nctorch._utils\n_rebuild_tensor_v2\n"
        f"((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI8\ntQI{offset}\n{size}{stride}I00\n"
        f"NtRt."
    )
    (tmp_path / "a.pt").write_bytes(archived(pickled.encode(), **{"0": bytes(32)}))
    with pytest.raises(UserError, match=r"beyond its storage|without storage or shape"):
        read(tmp_path / "a.pt")
    fine = pickled.replace(f"QI{offset}\n{size}", "QI0\n(I8\nt").replace("t(tI00", "t(I1\ntI00")
    (tmp_path / "a.pt").write_bytes(archived(fine.encode(), **{"0": bytes(32)}))
    assert read(tmp_path / "a.pt")[1].shape == (8,)


def test_the_magic_of_legacy_files_is_torchs():
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    assert buffer.getvalue().startswith(LEGACY_MAGIC)


# --- as users have them ------------------------------------------------------------------------


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("form", "role"),
    [
        (lambda s, _: prefixed("module.", s), "weights"),
        (lambda s, _: prefixed("_orig_mod.", s), "weights"),
        (lambda s, _: prefixed("module._orig_mod.", s), "weights"),
        (lambda s, _: prefixed("_orig_mod.module.", s), "weights"),
        (lambda s, _: {"state_dict": prefixed("model.", s), "epoch": 3}, "state_dict"),
        (lambda s, _: {"model_state_dict": s}, "model_state_dict"),
        (lambda s, other: {"model": other, "ema": s, "step": 7}, "ema"),
        (lambda s, other: {"state_dict": other, "state_dict_ema": s}, "state_dict_ema"),
        (lambda s, _: {"model_ema": s}, "model_ema"),
        (lambda s, _: {**s, "step": torch.tensor(3), "updates": 3}, "weights"),
        (lambda s, _: {k: v.double() for k, v in s.items()}, "weights"),
        (lambda s, _: {k: nn.Parameter(v) for k, v in s.items()}, "weights"),
    ],
)
def test_prefixes_wrappers_and_counters(tmp_path, digits, form, role):
    network, other = uvit(), uvit()
    torch.save(form(network.state_dict(), other.state_dict()), tmp_path / "a.pth")
    import_checkpoint(tmp_path / "a.pth", tmp_path / "run", data=digits, options={"num_heads": 3})
    made, status = imported(tmp_path / "run")
    assert same_output(made, network)
    assert status["imported"]["weights"]["ema"] == role
    if role in ("ema", "state_dict_ema"):
        made.load_state_dict(load_file(tmp_path / "run" / "train" / "raw.safetensors"))
        assert same_output(made, other)


def test_safetensors(tmp_path, digits):
    network = uvit()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    options = {"num_heads": 3}
    import_checkpoint(tmp_path / "model.safetensors", tmp_path / "run", options=options)
    assert same_output(imported(tmp_path / "run")[0], network)


def test_without_checksums(tmp_path, monkeypatch):
    """torch can be told not to compute them, and then writes 0."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(9.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read(tmp_path / "a.pt")["a"], torch.arange(9.0))


def test_a_folder_names_what_is_in_it(tmp_path):
    (tmp_path / "1000.ckpt").mkdir()
    torch.save(uvit().state_dict(), tmp_path / "1000.ckpt" / "nnet_ema.pth")
    with pytest.raises(UserError, match=r"a folder; give the file .*\(nnet_ema\.pth\)"):
        read(tmp_path / "1000.ckpt")


# --- on the command line -----------------------------------------------------------------------


def commanded(folder, *arguments):
    command = [sys.executable, "-m", "study", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_name_in_a_file_forges_no_line_of_ours(tmp_path):
    forged = {**uvit().state_dict(), "x\nstudy: all is well\x1b[2J\u202e": torch.ones(3)}
    torch.save(forged, tmp_path / "a.pth")
    done = commanded(tmp_path, "import", "a.pth", "--out", "run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr[:-1].isprintable()
    assert r"x\nstudy: all is well\x1b[2J\u202e" in done.stderr


def test_files_of_no_use_are_one_line(tmp_path):
    (tmp_path / "spec.json").write_bytes(b'{"dataset": "\xe9"}')
    (tmp_path / "empty.npz").touch()
    (tmp_path / "deep.json").write_bytes(b"[" * 100_000)
    train = ("train", "--data", "d.zip", "--out", "o", "--state", "s", "--gpus", 0, "--spec")
    for arguments, words in (
        ((*train, "spec.json"), "not in UTF-8"),
        ((*train, "deep.json"), "nested too deeply"),
        ((*train, '{"dataset": 1, "dataset": 2}'), "given twice"),
        ((*train, "{}"), "section 'dataset' is missing"),
        (("import", "a.pth", "--out", "o", "--options", "[]"), "neither JSON nor the path"),
        (("import", tmp_path, "--out", "o"), "a folder; give the file"),
    ):
        done = commanded(tmp_path, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert words in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "study: interrupted"),
        (EOFError("No data left in file"), 1, "No data left in file"),
        (MemoryError(), 1, "study: not enough memory"),
    ],
)
def test_every_exit_says_why(tmp_path, error, status, words):
    program = (
        "import sys; from study import cli\n"
        f"def fail(*_): raise {error!r}\n"
        "cli.parse_json = fail\n"
        "sys.argv = ['study', 'notebook', '--notebook', 'a', '--out', 'b', '--html', 'c', "
        "'--parameters', '{}']\n"
        "cli.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == status
    assert words in done.stderr
