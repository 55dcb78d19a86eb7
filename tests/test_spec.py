"""Settings: names that stay, defaults that never change, what a change makes again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Project
from miniature import base

from study.arms import runs
from study.files import UserError
from study.ledger import digest
from study.spec import defaults
from study.spec.run import Spec
from study.spec.study import load

PINNED = {
    "ddpmpp-none-dsm-s0-1884f37f",
    "ddpmpp-none-dsm-s0-1e24bff2",
    "ddpmpp-none-dsm-s0-dbcb6978",
    "ddpmpp-none-dsm-s0-ffeac744",
    "ddpmpp-none-stf-s1-bb319f4b",
    "ddpmpp-none-stf-s2-cdef94a2",
    "ncsnpp-none-stf-s1-0d26a19c",
    "ncsnpp-none-stf-s2-fbf16bed",
    "patch-unet-none-stf-s1-dc2cb63a",
    "patch-unet-none-stf-s2-a467851f",
    "udit-none-stf-s1-e2ebe7a9",
    "udit-none-stf-s2-2d4362ff",
    "uvit-cs-0.5-dsm-s0-e5e31910",
    "uvit-ls-dsm-s0-0e33a9fd",
    "uvit-none-dsm-s0-d26ce210",
}
"""Names of runs as they were given: they name the folders of finished trainings."""


def pinned() -> list[Spec]:
    content = base()
    content["grid"] = [
        {"backbone": ["uvit"], "skip_scaling": ["none", "cs(0.5)", "ls"], "target": ["dsm"]},
        {
            "backbone": ["udit", "patch_unet", "ddpmpp", "ncsnpp"],
            "target": ["stf(64)"],
            "seed": [1, {"init": 2}],
        },
        {
            "backbone": ["ddpmpp"],
            "formulation": ["vp", "ve", "iddpm", {"kind": "ddpm", "splits": [0.25]}],
            "training": [{"ema": {"halflife": 1000.0}, "augment": 0.1}],
        },
    ]
    names = ("uvit", "udit", "patch_unet", "ddpmpp", "ncsnpp")
    content["backbones"] = {name: {"preset": "tiny"} for name in names}
    return [run.spec for run in runs(load(content)).values()]


def test_names_stay():
    assert {spec.name for spec in pinned()} == PINNED


def test_a_name_is_that_of_the_settings_however_they_are_written():
    for spec in pinned():
        for content in (spec.chosen, json.loads(spec.key), spec.content()):
            again = Spec.read(content)
            assert (again, again.name, again.key) == (spec, spec.name, spec.key)


def trained(**training) -> Spec:
    content = base() | {"grid": {"backbone": ["uvit"]}}
    content["training"] = content["training"] | training
    return next(iter(runs(load(content)).values())).spec


DEFAULT = {"rate": 0.9999, "rampup": 0.05}
SLOW = {"halflife": 1000.0}


@pytest.mark.parametrize(
    ("settings", "same", "kept", "averages"),
    [
        ({"snapshots": 4}, {"snapshots": {"every": 4, "raw": False}}, (4, 8, 10), ("ema",)),
        ({"snapshots": [8, 0]}, {"snapshots": {"at": [0, 8]}}, (0, 8, 10), ("ema",)),
        ({"snapshots": [4, 10]}, {"snapshots": [4]}, (4, 10), ("ema",)),  # the last has one anyway
        ({"snapshots": {"at": [10], "raw": True}}, {}, (10,), ("ema",)),
        ({"snapshots": 10}, {}, (10,), ("ema",)),
        ({"ema": [DEFAULT]}, {}, (10,), ("ema",)),
        ({"ema": [SLOW]}, {"ema": SLOW}, (10,), ("ema",)),
        ({"ema": [SLOW, DEFAULT]}, {"ema": [SLOW, DEFAULT]}, (10,), ("ema", "ema2")),
    ],
)
def test_equal_settings_have_one_name_however_they_are_written(settings, same, kept, averages):
    spec = trained(**settings)
    assert spec.name == trained(**same).name
    assert Spec.read(spec.content()) == Spec.read(spec.chosen) == spec
    assert (spec.snapshots, spec.averages) == (kept, averages)


def test_other_snapshots_and_averages_have_other_names():
    given = [{}, {"snapshots": 4}, {"snapshots": {"every": 4, "raw": True}}, {"snapshots": [4]}]
    given += [{"ema": SLOW}, {"ema": [SLOW, DEFAULT]}, {"ema": [DEFAULT, SLOW]}]
    assert len({trained(**one).name for one in given}) == len(given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshots": [4, 2, 4]}, r"training\.snapshots: step 4 is there twice"),
        ({"snapshots": {"raw": True}}, r"training\.snapshots: give either every or at"),
        ({"snapshots": {"every": 2, "at": [3]}}, r"training\.snapshots: give either every or at"),
        (
            {"snapshots": {"evry": 2}},
            r"training\.snapshots\.evry: unknown key; did you mean 'every'",
        ),
        ({"snapshots": "4"}, r"training\.snapshots: '4' is text"),
        (
            {"snapshots": [4, 11]},
            r"training\.snapshots: step 11 is beyond the end of .* of 10 steps",
        ),
        ({"ema": [SLOW, DEFAULT, SLOW]}, r"training\.ema: entries 0 and 2 are the same average"),
        ({"ema": []}, r"training\.ema: .* at least 1 item"),
        ({"ema": [SLOW, {"rte": 1}]}, r"training\.ema\[1\]\.rte: unknown key; did you mean 'rate'"),
    ],
)
def test_mistakes_about_snapshots_and_averages_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as told:
        trained(**settings)
    assert len(str(told.value).splitlines()) == 1


def test_a_longer_training_is_of_the_same_lineage_and_no_other_change_is():
    spec = pinned()[0]
    longer = spec.changed(training={"steps": 20})
    assert longer.name != spec.name
    assert longer.lineage == spec.lineage
    assert longer.changed(training={"snapshots": {"every": 5}}).lineage == spec.lineage
    for section, change in (
        ("training", {"lr": 2e-3}),
        ("training", {"ema": [DEFAULT, SLOW]}),
        ("seeds", {"noise": 1}),
        ("skip_scaling", {"method": "ls"}),
    ):
        assert spec.changed(**{section: change}).lineage != spec.lineage


def test_networks_trained_one_after_another_know_the_end():
    content = base() | {"formulation": {"kind": "ddpm", "splits": [0.25]}}
    spec = next(iter(runs(load(content)).values())).spec
    assert spec.changed(training={"steps": 20}).lineage != spec.lineage
    assert spec.changed(training={"snapshots": {"at": [3]}}).lineage == spec.lineage


def test_a_copy_with_other_settings_has_another_name():
    spec = pinned()[0]
    assert spec.name
    other = spec.model_copy(update={"skip_scaling": pinned()[1].skip_scaling})
    assert other.name == pinned()[1].name != spec.name


# --- a user's own backbone -----------------------------------------------------------------------


def blocks_of_readme() -> tuple[str, dict]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Your own backbone")[2]
    python, content = re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL)[:2]
    return python, yaml.safe_load(content)


def test_a_backbone_of_a_users_own_is_trained_as_the_readme_says(project):
    python, content = blocks_of_readme()
    file = project.folder / "my_unet.py"
    file.write_text(python, encoding="utf-8")
    study = {**base(), **content, "study": "own"}
    (project.folder / "own.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    own = Project(project.folder, "own.yaml")
    done = own.snakemake("--cores", "2", "--until", "generate")
    assert done.returncode == 0, done.stderr
    folders = sorted(path.name[:24] for path in own.folder.glob("results/own/runs/*"))
    assert folders == ["my-unet-myunet-ls-dsm-s0", "my-unet-myunet-none-dsm-"]
    study_command = Path(sys.executable).with_name("study")  # whose folder is not the project's
    told = subprocess.run(
        [study_command, "plan", "--config", "own.yaml"],
        cwd=own.folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert "mine" in told.stdout
    # A remark in the file trains nothing again; a statement does.
    file.write_text("# A remark.\n" + python, encoding="utf-8")
    assert not {"train", "generate"} & set(own.todo())
    file.write_text(python.replace("relu", "tanh"), encoding="utf-8")
    assert own.todo()["train"] == 2


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "nowhere.at_all:Net",
            r"there is no module nowhere\.at_all; put nowhere/at_all\.py beside",
        ),
        ("unet", r"'unet' is unknown; allowed: uvit, .*, or package\.module:Class"),
    ],
)
def test_a_family_that_is_not_there_is_one_line(family, message):
    content = base() | {"backbones": {"uvit": {"family": family}}}
    with pytest.raises(UserError, match=r"^backbones\.uvit\.family: " + message):
        runs(load(content))


# --- defaults ------------------------------------------------------------------------------------


def test_an_existing_default_never_changes_and_a_new_one_is_noted():
    known, today = json.loads(defaults.KNOWN.read_text(encoding="utf-8")), defaults.now()
    assert today == known, (
        "a default that stood in a release gives finished runs another meaning: take it back; "
        "those of new settings are added by: python -m study.spec.defaults"
    )


def test_new_defaults_join_the_known_at_any_depth():
    known, today = {"a": {"x": 3}, "b": 1}, {"a": {"x": 1, "y": 2}, "b": 2, "c": 4}
    assert defaults._merged(today, known) == {"a": {"x": 3, "y": 2}, "b": 1, "c": 4}


PROGRAM = """
import json
from study.arms import runs
from study.files import UserError
from study.ledger import digest
from study.spec.samplers import SAMPLERS
from study.spec.study import load
specs = [run.spec for run in runs(load(json.load(open("study.json", encoding="utf-8")))).values()]
walk = SAMPLERS["edm_heun"]()
made = {
    "edm trained": digest.training(specs[0]),
    "vp trained": digest.training(specs[1]),
    "edm sampled": digest.generation(specs[0], walk),
    "vp sampled": digest.generation(specs[1], walk),
    "measured": digest.stage("evaluate"),
    "converted": digest.conversion("digits"),
    "tables": digest.stage("aggregate"),
    "report": digest.stage("report"),
    "figures": digest.stage("figures"),
}
print(json.dumps(made))
"""
EVERYTHING = {"edm trained", "vp trained", "edm sampled", "vp sampled"}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(digest.PACKAGE, folder / "study")
    content = base() | {"grid": {"backbone": ["ddpmpp"], "formulation": ["edm", "vp"]}}
    content["backbones"] = {"ddpmpp": {"preset": "tiny"}}
    (folder / "study.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        # A default, of one formulation, of all trainings, of what samples.
        ("spec/formulations.py", "P_mean: float = Field(-1.2", "P_mean: float = Field(-1.1", "edm"),
        (
            "spec/training.py",
            'Field(1e-8, gt=0, description="Adam',
            'Field(1e-7, gt=0, description="Adam',
            "both",
        ),
        (
            "spec/samplers.py",
            'default=0.002,\n        description="Last noise level above zero; the',
            'default=0.003,\n        description="Last noise level above zero; the',
            "sampled",
        ),
        (
            "spec/measuring.py",
            "tuple(METRICS), min_length",
            "tuple(METRICS)[:3], min_length",
            "measured",
        ),
        # What options do, and what they say; arithmetic that samplers and formulations share.
        ("spec/steps.py", "match[1] or 0.02", "match[1] or 0.03", "sampled"),
        (
            "spec/formulations.py",
            "draw noise levels that single",
            "draw levels that single",
            "nothing",
        ),
        ("spec/guidance.py", "self.scale + 1 if", "self.scale + 2 if", "sampled"),
        ("spec/training.py", "Optimiser steps.", "Steps of the optimiser.", "nothing"),
        (
            "diffusion/augmentation.py",
            "scale_std: float = Field(0.2",
            "scale_std: float = Field(0.3",
            "both trained",
        ),
        # What pages are made of.
        ("published.csv", "\n", "\n# a remark\n", "report"),
        ("analysis/templates/report.html.j2", "<", " <", "report"),
        ("analysis/templates/page.css", "{", "{ ", "report"),
        ("analysis/figures/quality.py", '    """', '    """A caption. ', "figures"),
        ("spec/scalings.py", '"1/√2"', '"1/sqrt 2"', "shown"),
        # Remarks, layout, and code of other rooms.
        ("training/trainer.py", "class Trainer:", "# A remark.\nclass  Trainer:", "nothing"),
        ("parity/case.py", "import ", "import json as unused\nimport ", "nothing"),
        ("ledger/plan.py", "import ", "import json as unused\nimport ", "nothing"),
    ],
)
def test_what_a_change_makes_again(package, file, old, new, changed):
    expected = {
        "edm": {"edm trained", "edm sampled"},
        "both": EVERYTHING,
        "sampled": {"edm sampled", "vp sampled"},
        "both trained": {"edm trained", "vp trained"},
        "measured": {"measured"},
        "report": {"report"},
        "shown": {"report", "figures"},
        "figures": {"report", "figures"},
        "nothing": set(),
    }[changed]
    before, path = digests(package), package / "study" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    after = digests(package)
    path.write_text(text, encoding="utf-8")
    assert {name for name in before if before[name] != after[name]} == expected
