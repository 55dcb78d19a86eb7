"""Digests of code: what changes them, and for whom."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from study import arms
from study.ledger import digest
from study.spec.study import load

ROOT = Path(__file__).resolve().parents[1]

BASE = {
    "__init__.py": "",
    "top.py": "from toy.room import work\n",
    "room/__init__.py": "from toy.room.work import run\n",
    "room/work.py": '"""Work."""\nimport os\n\n\ndef run(x):\n    """Run."""\n'
    "    from .. import lazy\n    return lazy.double(x)\n",
    "lazy.py": "def double(x):\n    return 2 * x  # twice\n",
    "typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy import lazy\n",
    "other.py": "VALUE = 1\n",
    "declared.py": "from toy import other\n",
}


@pytest.fixture
def toy(tmp_path):
    """A package, and the digest of one of its modules after some files were changed."""
    folders = iter(range(1000))

    def make(root: str = "toy.top", exclude: frozenset[str] = frozenset(), **changed: str) -> str:
        package = tmp_path / str(next(folders)) / "toy"
        for name, text in {**BASE, **changed}.items():
            path = package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return digest.stage_digest((root,), exclude, package)

    return make


def test_same_code_in_another_folder_is_the_same(toy):
    assert toy() == toy()


@pytest.mark.parametrize(
    "text",
    [
        "def double(x):\n    return 2 * x\n",
        '"""Now with a docstring."""\n\n\ndef double(x):\n    """Twice."""\n    return 2 * x\n',
        "def double(\n    x,\n):\n    # a comment\n    return (2 * x)\n",
    ],
)
def test_comments_docstrings_and_layout_keep_it(toy, text):
    assert toy(**{"lazy.py": text}) == toy()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("lazy.py", "def double(x):\n    return 3 * x\n"),
        ("lazy.py", "def double(x):\n    return 2.0 * x\n"),
        ("lazy.py", "def double(x=1):\n    return 2 * x\n"),
        ("lazy.py", "def double(x):\n    global y\n    return 2 * x\n"),
        ("room/work.py", "def run(x):\n    return x\n"),
        ("room/__init__.py", "from toy.room.work import run as walk\n"),
        ("__init__.py", "import warnings\n"),
    ],
)
def test_code_anywhere_in_the_imports_changes_it(toy, file, text):
    assert toy(**{file: text}) != toy()


def test_code_that_is_not_imported_does_not_count(toy):
    assert toy(**{"other.py": "VALUE = 2\n"}) == toy()
    assert toy("toy.other", **{"other.py": "VALUE = 2\n"}) != toy("toy.other")


def test_imports_for_type_checkers_do_not_count(toy):
    assert toy("toy.typed", **{"lazy.py": "x = 1\n"}) == toy("toy.typed")


def test_excluded_modules_are_neither_counted_nor_followed(toy):
    top = {"top.py": "from toy import declared\n"}
    changed = {"other.py": "VALUE = 2\n", "declared.py": "from toy import other, lazy\n"}
    exclude = frozenset({"toy.declared"})
    assert toy(exclude=exclude, **top) == toy(exclude=exclude, **top, **changed)
    assert toy(**top) != toy(**top, **changed)


def test_unknown_root_is_an_error(toy):
    with pytest.raises(LookupError):
        toy("toy.nothing")


def names(roots, exclude=digest.DECLARATIONS) -> set[str]:
    return set(digest.closure(tuple(roots), exclude))


def default_runs():
    return arms.runs(load(Path(digest.PACKAGE).parent / "config.yaml")).values()


def test_another_source_is_not_part_of_a_conversion(tmp_path):
    shutil.copytree(digest.PACKAGE, tmp_path / "study")
    program = (
        "from study.ledger import digest; "
        "print(*map(digest.conversion, ('digits', 'folder', 'zip')))"
    )

    def conversions() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    before = conversions()
    assert before[1] == before[2] != before[0]
    with (tmp_path / "study/data/sources/trees.py").open("a") as file:
        file.write("ADDED = 1\n")
    after = conversions()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_every_stage_has_code():
    stages = "extractor reference train generate evaluate points aggregate figures notebook report"
    for verb in stages.split():
        assert len(digest.stage(verb)) == 16
        assert digest._verbs()[verb], verb


def test_stages_depend_on_their_rooms_only():
    verbs = digest._verbs()
    train = names(verbs["train"])
    assert "study.training.loop" in train
    assert "study.skips" not in {m for m in train if m.startswith("study.analysis")}
    for foreign in ("study.analysis", "study.fidelity", "study.sampling.draw", "study.published"):
        assert not any(module.startswith(foreign) for module in train), foreign
    figures = names(verbs["figures"])
    assert "study.analysis.figures.quality" in figures
    assert not any(module.startswith(("study.training", "study.backbones")) for module in figures)
    tables = names(verbs["aggregate"])
    for foreign in ("figures", "style", "words", "tables.read", "report", "notebook"):
        assert not any(one.startswith(f"study.analysis.{foreign}") for one in tables), foreign
    assert not any(module.startswith("study.training") for module in names(verbs["evaluate"]))


def test_another_backbone_file_is_not_part_of_a_run():
    by_family = {run.spec.backbone.family: run for run in default_runs()}
    assert len(by_family) == 5
    for name, run in by_family.items():
        roots, exclude, _ = digest._network(run.spec)
        own = names((*digest._verbs()["train"], *roots), exclude)
        assert roots[0] in own
        for other in by_family.values():
            foreign = digest._network(other.spec)[0][0]
            if foreign != roots[0]:
                assert foreign not in own, f"{name} depends on {foreign}"


def test_stable_targets_are_part_of_stf_runs_only():
    by_target = {run.spec.target.kind: run for run in default_runs()}
    for kind, expected in (("stf", True), ("dsm", False)):
        roots, exclude, _ = digest._network(by_target[kind].spec)
        found = names((*digest._verbs()["train"], *roots), exclude)
        assert ("study.diffusion.stf" in found) is expected
    run = by_target["stf"]
    assert digest.training(run.spec) != digest.training(by_target["dsm"].spec)


EVERY_STAGE = """
from itertools import product
from study import arms
from study.ledger import digest
from study.spec.probes import PROBES
from study.spec.run import Identity
from study.spec.samplers import SAMPLERS
from study.spec.study import load

specs = [run.spec for run in arms.runs(load("config.yaml")).values()]
print([digest.stage(verb) for verb in digest._verbs() if verb != "parity"])
print([digest.training(spec) for spec in specs])
named = {"checkpoint": Identity(name="x")}
print([digest.training(spec.model_copy(update=named)) for spec in specs])
walks = [options() for options in SAMPLERS.values()]
print([digest.generation(spec, sampler) for spec, sampler in product(specs, walks)])
print([digest.probe(kind, specs) for kind in PROBES])
"""


def test_the_wing_of_parity_is_part_of_no_stage(tmp_path):
    root = Path(digest.PACKAGE)
    wing = "study.parity"
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        if module != "study.cli" and not module.startswith(wing):
            imported = digest._module(module, path)[1]
            assert not [name for name in imported if name.startswith(wing)], module
    foreign = {module for module in names(digest._verbs()["parity"]) if module.startswith(wing)}
    assert foreign >= {"study.parity.networks", "study.parity.kinds"}

    shutil.copytree(root, tmp_path / "study")
    shutil.copy(root.parent / "config.yaml", tmp_path)

    def digests() -> str:
        command = [sys.executable, "-c", EVERY_STAGE]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    before = digests()
    for path in (tmp_path / "study/parity").glob("*.py"):
        with path.open("a", encoding="utf-8") as file:
            file.write("ADDED = 1\n")
    assert digests() == before
    with (tmp_path / "study/skips.py").open("a", encoding="utf-8") as file:
        file.write("ADDED = 1\n")
    assert digests() != before


def test_a_notebook_depends_on_what_its_cells_import(tmp_path):
    def notebook(name: str, code: str) -> str:
        path = tmp_path / name
        cell = {"cell_type": "code", "source": [code]}
        path.write_text(json.dumps({"cells": [cell]}))
        return digest.notebook(str(path))

    plain = notebook("a.ipynb", "%matplotlib inline\n1 + 1")
    assert notebook("b.ipynb", "2 + 2") == plain
    assert notebook("c.ipynb", "from study import skips") != plain


def test_what_python_leaves_beside_the_code_changes_nothing(tmp_path):
    bare = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "study", tmp_path / "study", ignore=bare)
    said = []
    for bytecode in ("1", ""):  # without, then with what an import writes; then beside it
        done = subprocess.run(
            [sys.executable, "-c", ALL_STAGES],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": bytecode},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout)
    for path in [*(tmp_path / "study").rglob("*.py")]:
        beside = path.parent / "__pycache__"
        beside.mkdir(exist_ok=True)
        (beside / f"{path.stem}.cpython-311.pyc").write_bytes(b"other bytes")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-X", "pycache_prefix=elsewhere", "-c", ALL_STAGES]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert {*said, done.stdout} == {said[0]}


ALL_STAGES = """
from study.ledger import digest
print([digest.stage(verb) for verb in digest._verbs() if digest._verbs()[verb]])
print([digest.conversion(source) for source in ("digits", "folder", "lsun", "latents")])
"""
