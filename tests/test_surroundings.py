"""A user's own settings change nothing: matplotlib's, and the locale's."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import synthetic
from conftest import ROOT
from PIL import Image

# --- matplotlib ----------------------------------------------------------------------------------

FOREIGN = """
backend: TkAgg
text.usetex: True
font.family: serif
figure.dpi: 33
savefig.transparent: True
axes.prop_cycle: cycler('color', ['r', 'g'])
axes.labelpad: 30
"""

DRAW = """
import sys
from study.analysis.figures import draw_all
draw_all(sys.argv[1] + "/tables", sys.argv[1], sys.argv[2], ["quality_heatmap", "loss_by_noise"])
from study.analysis.notebook import run_notebook
out = [sys.argv[2] + "/n.ipynb", sys.argv[2] + "/n.html"]
run_notebook(sys.argv[3], *out, {"tables": sys.argv[1]})
"""

CELL = """
from study.analysis import figures
from study.analysis.display import show
from study.analysis.tables.read import Tables
show(figures.quality_heatmap(Tables.read(tables + "/tables")))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A small study with awkward texts; returns its results folder."""
    root = tmp_path_factory.mktemp("a tree")
    made = synthetic.build(
        root,
        backbones=("uvit", "ncsnpp"),
        scalings=("none", "ls"),
        targets=("dsm",),
        diverged=(),
        missing=(),
        logged=20,
    )
    content = json.loads(made.read_text(encoding="utf-8"))
    content["config"]["title"] = "<b>Tést</b> & κ 猫"
    content["config"]["dataset"]["note"] = r"$5 < 6 vs $10 & $\kapa$ \oops{"
    content["config"]["arms"] = [{"name": r"try $\kapa$ <script>alert(1)</script>"}]
    for entry in content["runs"][:2]:
        entry["display"] = content["config"]["arms"][0]["name"]
    made.write_text(json.dumps(content), encoding="utf-8")
    from study.analysis.tables.aggregate import aggregate

    aggregate(made, made.parent, made.parent / "tables")
    return made.parent


def test_figures_and_notebooks_do_not_depend_on_the_users_matplotlib(tree, tmp_path):
    import nbformat

    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell('tables = ""', metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(CELL),
        ]
    )
    for cell, name in zip(notebook.cells, "ab", strict=True):
        cell["id"] = name
    nbformat.write(notebook, tmp_path / "n.ipynb")
    settings = tmp_path / "set" / "matplotlibrc"
    settings.parent.mkdir()
    settings.write_text(FOREIGN, encoding="utf-8")
    (tmp_path / "here").mkdir()
    shutil.copy(settings, tmp_path / "here")  # matplotlib looks into the current folder first
    blocked = tmp_path / "a file"
    blocked.touch()
    apart = ("MATPLOTLIBRC", "MPLBACKEND", "MPLCONFIGDIR")
    plain = {key: value for key, value in os.environ.items() if key not in apart}
    foreign = plain | {
        "MATPLOTLIBRC": str(settings),
        "MPLBACKEND": "TkAgg",
        "MPLCONFIGDIR": str(blocked / "no folder"),
        "HOME": str(blocked),
    }
    made = {}
    for name, where, environment in (
        ("plain", tmp_path, plain),
        ("foreign", tmp_path / "here", foreign),
    ):
        out = tmp_path / name
        command = [sys.executable, "-W", "error::UserWarning", "-c", DRAW]
        done = subprocess.run(
            [*command, str(tree), str(out), str(tmp_path / "n.ipynb")],
            cwd=where,
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "atplotlib" not in done.stderr
        made[name] = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    assert len(made["plain"]) == 2 * 3 + 2
    for name, content in made["plain"].items():
        assert made["foreign"][name] == content, name


def test_awkward_texts_are_printed_as_they_are(tree, tmp_path):
    from matplotlib.text import Text

    from study.analysis import figures
    from study.analysis.report.page import report
    from study.analysis.tables.read import Tables

    tables = Tables.read(tree / "tables", tree)
    figure = figures.quality_heatmap(tables)
    figure.savefig(tmp_path / "a.svg")
    words = " ".join(artist.get_text() for artist in figure.findobj(Text)).replace("\n", " ")
    assert r"$5 < 6 vs $10 & $\kapa$ \oops{" in words
    page = report(tree / "study.json", tree, tmp_path / "out").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert r"try $\kapa$ &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<title>&lt;b&gt;Tést&lt;/b&gt; &amp; κ 猫</title>" in page


def test_powers_of_ten_are_words():
    from matplotlib.text import Text

    from study.analysis import style

    with style.look():
        fig = style.figure()
        axes = fig.add_subplot()
        axes.set(xscale="log", yscale="log", xlim=(1e-3, 1e3), ylim=(2, 8))
        style.finish(fig)
        fig.draw_without_rendering()
        words = {text.get_text() for text in axes.findobj(Text)}
    assert {"10⁻²", "10⁰", "10²", "3×10⁰"} <= words
    assert not any("$" in word for word in words)


# --- the locale ----------------------------------------------------------------------------------

CONFIG = """
study: t
title: "Über Skips · κ=0.7 ✓ 猫"
dataset: {name: u, source: folder, path: "%s", note: "ein Vermerk: ✓ 猫", resolution: 8}
grid: {backbone: [uvit], skip_scaling: [none], target: [dsm]}
arms: [{name: "κ ✓ 猫", backbone: uvit, skip_scaling: ls}]
backbones: {uvit: {preset: tiny}}
training: {steps: 10, batch: 8, lr: 1.0e-3}
protocols:
  final: {sampler: {kind: edm_heun, steps: 3}, images: 16, extractors: pixels, metrics: [fd]}
"""


@pytest.fixture(scope="module")
def locales(tmp_path_factory) -> Path:
    """A folder of locales that are not UTF-8; skips where none can be made."""
    made = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    for name, charmap in (("en_US", "ISO-8859-1"), ("zh_CN", "GBK"), ("ja_JP", "EUC-JP")):
        command = ["localedef", "-f", charmap, "-i", name, str(made / f"{name}.{charmap}")]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if not (made / f"{name}.{charmap}").exists():
            pytest.skip(f"localedef cannot make {name}.{charmap}: {done.stderr.strip()[:200]}")
    return made


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """What the verbs say of a study with foreign texts, in a locale of choice."""
    root = tmp_path_factory.mktemp("ünicode")
    for number, name in enumerate(("café/1.png", "猫/1.png", "a b/1.png")):
        path = root / "in 猫" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(path)
    (root / "results").mkdir()
    (root / "u.yaml").write_text(CONFIG % (root / "in 猫"), encoding="utf-8")

    @cache
    def say(locale: str, **more: str) -> dict:
        environment = os.environ | {"LC_ALL": locale, "PYTHONPATH": str(ROOT), **more}
        environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        archive = root / f"{locale}.zip"
        spec = '{"name": "u", "source": "folder"}'
        answer = {}
        for name, *arguments in (
            ("runs", "--config", "u.yaml"),
            ("status", "--config", "u.yaml"),
            ("convert", "--spec", spec, "--source-path", "in 猫", "--out", str(archive)),
            ("convert", "--spec", spec, "--source-path", "no 猫", "--out", "n.zip"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "study", name, *arguments],
                cwd=root,
                env=environment,
                capture_output=True,
            )
            error = done.stderr.decode()  # files and pipes are UTF-8
            assert "Traceback" not in error, error[-2000:]
            fails = arguments[-1] == "n.zip"
            assert done.returncode == (2 if fails else 0), error[-2000:]
            answer[name + fails * " nothing"] = error if fails else done.stdout.decode()
        answer["archive"] = archive.read_bytes()
        del answer["convert"]  # holds seconds
        return answer

    return say


def test_verbs_say_and_write_the_same_in_c(spoken):
    usual, plain = spoken("C.UTF-8"), spoken("C")
    assert "κ ✓ 猫" in usual["runs"]
    assert usual["convert nothing"] == "study: dataset u: no 猫: no such file or folder\n"
    assert plain == usual


@pytest.mark.parametrize("name", ["en_US.ISO-8859-1", "zh_CN.GBK", "ja_JP.EUC-JP"])
def test_verbs_say_and_write_the_same_in_other_locales(spoken, locales, name):
    assert spoken(name, LOCPATH=str(locales)) == spoken("C.UTF-8")


def test_a_terminal_is_spoken_to_in_its_own_encoding(locales, tmp_path):
    pty = pytest.importorskip("pty")
    config = tmp_path / "u.yaml"
    config.write_text(CONFIG % tmp_path, encoding="utf-8")
    environment = os.environ | {"LC_ALL": "zh_CN.GBK", "LOCPATH": str(locales), "PYTHONUTF8": "0"}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "study", "runs", "--config", str(config)]
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert done.returncode == 0
    assert r"κ \u2713 猫" in said.decode("gbk")  # GBK has no such tick
