"""What all probes share: subjects, options, results, the command line, digests."""

import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
from miniature import base
from safetensors.torch import save_file

from study import arms
from study.data import Archive
from study.data.convert import convert
from study.files import UserError, read_json, sha256, write_json
from study.ledger import digest
from study.probes import base as probes
from study.spec.backbones import FAMILIES
from study.spec.probes import PROBES
from study.spec.run import Backbone
from study.spec.study import load


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 64}, path)
    return path


@pytest.fixture
def run():
    return next(iter(arms.runs(load(base())).values()))


def study(**changes):
    return load(base() | changes)


# --- declarations --------------------------------------------------------------------------------


def test_every_probe_has_options_and_a_module():
    for kind, model in PROBES.items():
        assert model().kind == kind
        assert digest.closure((model.implementation.partition(":")[0],)), kind
        assert model().subject in ("run", "arm", "dataset", "study")


@pytest.mark.parametrize(
    ("declared", "word"),
    [
        (["robustnes"], "robustness"),
        ([{"kind": "robustness", "sample": 3}], "sample"),
        ([{"kind": "robustness", "samples": "many"}], "many"),
        (["cost", "cost"], "twice"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(declared, word):
    with pytest.raises(UserError) as error:
        study(probes=declared)
    assert word in str(error.value)
    assert str(error.value).startswith("probes")
    assert "\n" not in str(error.value)


def test_a_probe_looks_at_the_seeds_it_names():
    declared = study(seed=[0, 1, 2], probes=[{"kind": "cost", "seeds": [0, 2]}, "robustness"])
    runs = arms.runs(declared)
    some, every = declared.probes
    assert {runs[name].axes["seed"] for name in arms.probed(runs, some)} == {"0", "2"}
    assert arms.probed(runs, every) == list(runs)
    data = study(probes=["target_variance"])
    assert arms.probed(arms.runs(data), data.probes[0]) == []


@pytest.mark.parametrize(
    ("declared", "settings", "speed"),
    [
        ({"kind": "robustness", "samples": 32, "seeds": [0], "batch": 7}, "samples", "batch"),
        ({"kind": "stability_frontier", "steps": 9, "micro_batch": 8}, "steps", "micro_batch"),
    ],
)
def test_settings_leave_out_defaults_seeds_and_speed(declared, settings, speed):
    (probe,) = study(probes=[declared]).probes
    assert probe.settings() == {settings: declared[settings]}
    assert probe.speed_settings() == {speed: declared[speed]}
    (cost,) = study(probes=[{"kind": "cost", "batch": 8}]).probes
    assert cost.settings() == {"batch": 8}  # here it changes what is timed
    (plain,) = study(probes=["robustness"]).probes
    assert plain.settings() == plain.speed_settings() == {}


def test_a_seed_that_no_run_has_is_named():
    with pytest.raises(UserError, match=r"probes\[1\].seeds: no run has seed 5; there are 0, 1"):
        arms.runs(study(seed=[0, 1], probes=["cost", {"kind": "robustness", "seeds": [0, 5]}]))


def test_networks_of_a_study_are_not_told_apart_by_training_or_scaling():
    few = arms.networks(arms.runs(study()))
    grid = base()["grid"] | {"target": ["dsm", "stf(16)"], "skip_scaling": ["cs(0.5)"]}
    training = base()["training"] | {"lr": 0.5, "steps": 99}
    more = arms.networks(arms.runs(study(seed=[0, 1], grid=grid, training=training)))
    assert len(few) == 1
    assert few == more


# --- code digests --------------------------------------------------------------------------------


def test_a_probe_depends_on_its_own_code_and_its_networks(run):
    tiny = Backbone(family="ddpmpp", options=FAMILIES["ddpmpp"].options())
    other = run.spec.model_copy(update={"backbone": tiny})
    assert digest.probe("robustness", [run.spec]) != digest.probe("dynamics", [run.spec])
    assert digest.probe("robustness", [run.spec]) != digest.probe("robustness", [other])
    roots = (*digest._verbs()["probe"], PROBES["robustness"].implementation.partition(":")[0])
    code = digest.closure(tuple(sorted(roots)))
    assert "study.probes.robustness" in code
    assert "study.probes.scaling_laws" not in code
    assert "study.backbones.udit" not in code


# --- measuring -----------------------------------------------------------------------------------


def measure(kind, archive, tmp_path, **more):
    out = tmp_path / f"{kind}.parquet"
    result = probes.probe(kind, archive, out, threads=1, **more)
    return result, pyarrow.parquet.read_table(out)


def test_a_probe_writes_a_table_and_says_where_it_came_from(archive, tmp_path):
    options = {"samples": 8}
    result, table = measure("optimal_denoiser", archive, tmp_path, options=options, code="abc")
    assert result["status"] == "done"
    assert result["rows"] == table.num_rows > 0
    written = read_json(tmp_path / "optimal_denoiser.json")
    assert written["options"]["samples"] == 8
    assert (written["code"], written["kind"]) == ("abc", "optimal_denoiser")
    assert {"git", "packages", "device"} <= set(written["provenance"])


def test_a_probe_of_a_diverged_run_has_no_rows_and_says_why(archive, run, tmp_path):
    status = {"status": "diverged", "step": 3, "reason": "loss spike", "spec": run.spec.content()}
    write_json(tmp_path / "train/status.json", status)
    result, table = measure("robustness", archive, tmp_path, run_dir=tmp_path)
    assert result["status"] == "skipped"
    assert "step 3: loss spike" in result["reason"]
    assert table.num_rows == 0


def test_weights_are_hashed_that_were_looked_at_and_missed_in_one_line(archive, run, tmp_path):
    status = {"status": "done", "step": 10, "steps": 10, "spec": run.spec.content()}
    write_json(tmp_path / "train/status.json", status)
    with pytest.raises(UserError, match=r"weights.safetensors: missing; train the run again"):
        measure("robustness", archive, tmp_path, run_dir=tmp_path)
    network = probes.ArmSubject(Archive(archive), torch.device("cpu"), run.spec).network()
    save_file(network.state_dict(), tmp_path / "train/raw.safetensors")
    options = {"weights": "raw", "samples": 4}
    result, _ = measure("robustness", archive, tmp_path, run_dir=tmp_path, options=options)
    assert result["weights_sha256"] == sha256(tmp_path / "train/raw.safetensors")


def test_a_spec_or_manifest_that_is_none_is_one_line(archive, tmp_path):
    with pytest.raises(UserError, match="section 'dataset' is missing"):
        measure("cost", archive, tmp_path, spec={"foo": 1})
    write_json(tmp_path / "other.json", {"a": 1})
    with pytest.raises(UserError, match="lists no runs"):
        measure("scaling_laws", archive, tmp_path, manifest=tmp_path / "other.json")


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("robustnes", "allowed: dynamics, robustness"),
        ("robustness", "--run-dir is missing"),
        ("cost", "looks at an arm; --run-dir or --spec is missing"),
        ("scaling_laws", "--manifest is missing"),
    ],
)
def test_what_is_missing_is_named(archive, tmp_path, kind, word):
    with pytest.raises(UserError, match=word):
        measure(kind, archive, tmp_path)


def test_subjects_show_the_same_images_and_noise_to_every_run(archive, run):
    subject = probes.ArmSubject(Archive(archive), torch.device("cpu"), run.spec)
    images, labels = subject.images(5)
    again, _ = subject.images(9)
    assert torch.equal(images, again[:5])
    assert labels is None  # this arm is not told the class
    noise = subject.noise((2, 3), "what for")
    assert torch.equal(noise, subject.noise((2, 3), "what for"))
    assert not torch.equal(noise, subject.noise((2, 3), "something else"))


def test_the_command_line_measures_by_hand(archive, tmp_path):
    out = tmp_path / "by hand.parquet"
    command = [sys.executable, "-m", "study", "probe", "optimal_denoiser", "--gpus", "0"]
    command += ["--data", str(archive), "--out", str(out), "--options", '{"samples": 8}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert pyarrow.parquet.read_table(out).num_rows > 0
    wrong = subprocess.run([*command[:4], "nothing", *command[5:]], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_a_probe_of_an_arm_takes_a_run_for_its_spec(archive, run, tmp_path):
    write_json(tmp_path / "train/status.json", {"status": "done", "spec": run.spec.content()})
    options = {"steps": 1, "evaluation_batch": 2, "batch": 2}
    result, _ = measure("cost", archive, tmp_path, run_dir=tmp_path, options=options)
    assert result["spec"] == run.spec.content()
