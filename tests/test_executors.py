"""Jobs that another Snakemake runs, started by an executor, as on a cluster."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMOKE
from packaging.requirements import Requirement
from PIL import Image

from study.arms import manifest, runs
from study.files import atomic
from study.ledger import digest
from study.spec.study import load

SUBMIT = """\
#!/bin/sh
# Runs the job's script; what Snakemake started this with may be gone by then.
{before}
sh "$1" > /dev/null 2> "$1.stderr" < /dev/null || cat "$1.stderr" >&2
echo 1
"""


@pytest.fixture
def submitted(project, tmp_path):
    """Run Snakemake in the project, and every job by a Snakemake of its own."""

    def run(*flags: str, before: str = ":") -> None:
        submit = tmp_path / "submit.sh"
        submit.write_text(SUBMIT.format(before=before))
        submit.chmod(0o755)
        done = project.python(
            *("-m", "snakemake", "--executor", "cluster-generic", "--jobs", "1"),
            *("--cluster-generic-submit-cmd", shlex.quote(str(submit))),
            *("--seconds-between-status-checks", "1", *flags),
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]

    return run


TINY = {"backbone": ["uvit"], "skip_scaling": ["none"], "target": ["dsm"]}


def made_by(run_study, results: Path) -> dict[str, bytes]:
    """Run a study of one run, and the bytes of what is a function of its settings alone."""
    run_study()
    (run,) = (results / "runs").iterdir()
    files = [*run.glob("train/*.safetensors"), *run.glob("measurements/*/samples.npz")]
    return {path.name: path.read_bytes() for path in files}


def test_jobs_of_an_executor_make_what_local_ones_make(project, submitted):
    """A study that is not ``config.yaml``, and has other settings of the same names."""
    study = yaml.safe_load((project.folder / SMOKE).read_text())
    study |= {"study": "other", "grid": TINY, "arms": [], "probes": []}
    study["protocols"]["final"]["images"] = 16
    file, results = project.folder / "my study.yaml", project.folder / "results/other"
    flags = ("--until", "generate", "--configfile", file.name)
    file.write_text(text := yaml.safe_dump(study))
    # Jobs work at the study as it was when the command was given, whatever becomes of its file.
    remove = f"rm -f {shlex.quote(str(file))}"
    submitted_results = made_by(lambda: submitted(*flags, before=remove), results)
    file.write_text(text)
    results.rename(results.with_name("by the executor"))
    local_results = made_by(lambda: local(project, *flags), results)
    assert set(local_results) == {"weights.safetensors", "raw.safetensors", "samples.npz"}
    assert submitted_results == local_results


def local(project, *flags: str) -> None:
    done = project.python("-m", "snakemake", "--cores", "2", *flags)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def test_overridden_keys_reach_the_jobs_of_an_executor(project, submitted):
    """``config.yaml`` itself, with single keys of nested mappings given on the command line."""
    flags = (
        *("--until", "train", "--config"),
        f"grid={json.dumps(TINY)}",
        "backbones={uvit: {training: {steps: 3, warmup: 0}}}",
        "training={batch: 8, ema: {rate: 0.5}}",
        "seed=[0]",
        'title=it\'s $HOME \\t "quoted"',
    )
    results = project.folder / "results/digits"
    submitted_results = made_by(lambda: submitted(*flags), results)
    written = yaml.safe_load((project.folder / "config.yaml").read_text())
    resolved = json.loads((results / "study.json").read_text())["config"]
    assert resolved["title"] == 'it\'s $HOME \\t "quoted"'
    assert resolved["backbones"]["uvit"]["training"] == {
        "steps": 3,
        "lr": 5e-3,
        "warmup": 0,
        "snapshots": written["backbones"]["uvit"]["training"]["snapshots"],
    }
    assert resolved["training"]["batch"] == 8
    assert resolved["training"]["lr"] == written["training"]["lr"]
    results.rename(results.with_name("by the executor"))
    assert submitted_results == made_by(lambda: local(project, *flags), results) != {}


def test_paths_reach_the_jobs_of_an_executor(project, submitted):
    folder = project.folder / 'it\'s $HOME \\t "quoted"'
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    dataset = {"name": "mine", "source": "folder", "path": str(folder), "resolution": 8}
    override = f"dataset={json.dumps(dataset)}"
    submitted("results/datasets/mine.zip", "--configfile", SMOKE, "--config", override)
    assert (project.folder / "results/datasets/mine.zip").is_file()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("training={stepz: 24}", "training.stepz: unknown key; did you mean 'steps'?"),
        ("training={steps: 24", "--config training={steps: 24: not valid YAML ("),
        ("training={lr: 1e-4}", "training.lr: '1e-4' is text"),
        ("stdy=other", "stdy: unknown key; did you mean 'study'?"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(project, given, line):
    done = project.snakemake("-n", "--config", given)
    assert done.returncode != 0
    (said,) = [text for text in done.stderr.splitlines() if text.startswith("study:")]
    assert said.startswith(f"study: {line}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "path",
    [Path("config.yaml"), *sorted((ROOT / "workflow/studies").rglob("*.yaml"))],
    ids=lambda path: path.stem,
)
def test_the_study_that_a_page_shows_is_the_study(path):
    """To be saved and run again, as the page says: the same runs, from the same settings."""
    study = load(ROOT / path)
    shown = json.dumps(manifest(study, runs(study))["config"], sort_keys=True)
    again = load(json.loads(shown))
    assert again == study
    assert manifest(again, runs(again)) == manifest(study, runs(study))


# --- jobs that would not see the folder -------------------------------------------------------

APART = """
from dataclasses import replace
from snakemake_executor_plugin_cluster_generic import *
from snakemake_executor_plugin_cluster_generic import common_settings

common_settings = replace(common_settings, implies_no_shared_fs=True)
"""
"""An executor that has no shared file system by itself, as Kubernetes has none."""


@pytest.mark.parametrize(
    "flags",
    [
        ("--executor", "apart", "--apart-submit-cmd", "true", "--jobs", "1"),
        ("--executor", "cluster-generic", "--jobs", "1", "--shared-fs-usage", "none"),
        ("--cores", "1", "--default-storage-provider", "fs", "--default-storage-prefix", "stored"),
    ],
)
def test_jobs_that_would_not_see_the_folder_are_refused_in_one_line(project, tmp_path, flags):
    plugin = tmp_path / "snakemake_executor_plugin_apart" / "__init__.py"
    plugin.parent.mkdir()
    plugin.write_text(APART)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = project.snakemake(*flags, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith(("study:", "Error"))]
    assert len(said) == 1
    assert said[0].startswith("study: every job must see this folder")
    assert "Traceback" not in done.stderr
    assert not (project.folder / "results").exists()


# --- places that cannot be written to ---------------------------------------------------------


@pytest.mark.parametrize("name", ["results", "reports", "reports/smoke", "results/datasets"])
def test_a_file_where_a_folder_should_be_is_one_line(project, name):
    path = project.folder / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    done = project.snakemake("--cores", "1", "--until", "convert")
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("study:")]
    assert said.startswith(f"study: {name}: ")
    assert "Traceback" not in done.stderr and ", line " not in done.stderr


@pytest.mark.parametrize(("locked", "named"), [(".", ".snakemake"), ("results", "results/smoke")])
def test_a_read_only_folder_is_one_line(project, locked, named):
    weak = []
    if os.geteuid() == 0:  # whom permissions do not stop
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv, or another user than root")
        weak = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    folder = project.folder / locked
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    try:
        command = [*weak, *project.command("--cores", "1", "--until", "convert")]
        done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True)
    finally:
        folder.chmod(0o755)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("study:")]
    assert said == [f"study: {named}: cannot be written (permission denied)"]
    assert "Traceback" not in done.stderr and ", line " not in done.stderr


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
{imports}
from study.files import UserError, atomic
try:
    with atomic("out") as temporary:
        {write}
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("imports", "write"),
    [
        ("", "temporary.write_bytes(bytes(200_000))"),
        ("import torch", "torch.save(torch.zeros(50_000), temporary)"),
        (
            "import torch; from safetensors.torch import save_file",
            "save_file({'x': torch.zeros(50_000)}, temporary)",
        ),
        (
            "import numpy; import pandas",
            "pandas.DataFrame({'x': numpy.random.rand(50_000)}).to_parquet(temporary)",
        ),
    ],
)
def test_no_room_is_one_line_whoever_writes(tmp_path, imports, write):
    code = LIMITED.format(imports=imports, write=write)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.stderr == "out: cannot be written (file too large)\n"
    assert list(tmp_path.iterdir()) == []


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="another"):
        with atomic(tmp_path / "out"):
            raise RuntimeError("another")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_without_room_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-m", "study", "convert", "--spec", '{"name":"d","source":"digits"}']
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command, "--out", tmp_path / "d.zip"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("study: ")
    assert said.endswith(f"{tmp_path / 'd.zip'}: cannot be written (file too large)")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_may_not_write_says_so_in_one_line(tmp_path):
    (tmp_path / "run").touch()
    folders = ["--run-dir", tmp_path / "run", "--out", tmp_path / "run/measurements/m"]
    measurement = '{"sampler": {"kind": "edm_heun"}}'
    command = [sys.executable, "-m", "study", "generate", "--measurement", measurement]
    command += ["--data", "none.zip"]
    done = subprocess.run(
        [*command, *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    where = "run/state/measurements" if "generate" in command else "run/state"
    assert done.stderr == f"study: {tmp_path / where}: not a directory\n"


# --- conda ------------------------------------------------------------------------------------

OPTIONAL = {"pynvml"}
"""What a stage does without where it is missing."""

REGISTERED = ("backbones", "data/sources", "diffusion", "probes")
"""Folders whose modules stages of the compute environment load by name."""

ONLY = """
import importlib, importlib.util, sys
site, modules, names = sys.argv[1], *(text.split(",") for text in sys.argv[2:])
sys.path.append(site)
print([name for name in names if importlib.util.find_spec(name) is None])
for module in modules:
    importlib.import_module(module)
"""


def only(lines: list[str], site: Path) -> None:
    """Make a folder of the installed packages that the requirements name or need, and no other."""
    waiting, seen = [Requirement(line) for line in lines], set()
    while waiting:
        requirement = waiting.pop()
        extras = ("", *sorted(requirement.extras))
        if (requirement.name, extras) in seen:
            continue
        seen.add((requirement.name, extras))
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        for name in {path.parts[0] for path in found.files} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(found.locate_file(name))
        for inner in map(Requirement, found.requires or ()):
            marker, inner.marker = inner.marker, None
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)


def stages_of(environment: str) -> set[str]:
    """The verbs that the rules with a conda environment call."""
    verbs = set()
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"\n(?=\s*rule\b)", path.read_text()):
            if f"envs/{environment}.yaml" in rule:
                verbs |= set(re.findall(r"python -m study (\w+)", rule))
    return verbs


@pytest.mark.parametrize("environment", ["compute", "report"])
def test_every_stage_imports_with_what_its_environment_pins(environment, tmp_path):
    verbs = stages_of(environment)
    assert verbs, f"no rule uses {environment}"
    roots = set().union(*(digest._verbs()[verb] for verb in verbs))
    if environment == "compute":
        for folder in REGISTERED:
            for path in (ROOT / "study" / folder).rglob("[a-z]*.py"):
                roots.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    # The command line knows every room: of its imports, those of these verbs are roots.
    modules = set(digest.closure(tuple(sorted(roots)), frozenset({"study.cli"}))) | {"study.cli"}
    names = set()  # those that are imported inside of functions as well
    for module in modules:
        tree = ast.parse(digest._path(module, digest.PACKAGE).read_bytes())
        names |= {name.split(".")[0] for name in digest._imports(tree, module, False)}
    *_, pip = yaml.safe_load((ROOT / f"envs/{environment}.yaml").read_text())["dependencies"]
    only(pip["pip"], tmp_path)
    done = subprocess.run(
        [sys.executable, "-B", "-E", "-S", "-c", ONLY, tmp_path, *map(",".join, (modules, names))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(ast.literal_eval(done.stdout)) <= OPTIONAL


@pytest.mark.parametrize("other", ["mamba", "micromamba"])
def test_mamba_without_conda_is_one_line(project, tmp_path, other):
    (tmp_path / other).touch(mode=0o755)
    done = project.snakemake("-n", "--use-conda", env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if "conda" in line]
    assert said.startswith(f"study: --use-conda needs a conda executable and PATH has only {other}")
    assert "Traceback" not in done.stderr
