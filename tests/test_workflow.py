"""The workflow, run for real once: what it makes, what edits make it do again, how it goes on."""

import ast
import csv
import fcntl
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import typer
import yaml
from conftest import PARTS, ROOT, SMOKE, Project, copy_project
from packaging.specifiers import SpecifierSet

from study import cli

AFTERWARDS = {"aggregate": 1, "figures": 1, "notebook": 1, "report": 1}
"""Jobs that follow whenever the study as a whole has changed."""

ONE_RUN = {"train": 1, "generate": 1, "evaluate_digits": 1, "probe_robustness": 1}
"""Jobs of one run."""


def smoke(change) -> dict:
    """An edit of the smoke study: ``change`` works on its mapping."""

    def edit(text: str) -> str:
        study = yaml.safe_load(text)
        change(study)
        return yaml.safe_dump(study, sort_keys=False)

    return {"path": SMOKE, "change": edit}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def number_of_runs(project: Project) -> int:
    return len(list((project.results / "runs").iterdir()))


def number_of_measurements(project: Project) -> int:
    listed = project.study("runs", "--config", SMOKE, "--measurements").stdout.splitlines()
    return sum(line.startswith("  ") for line in listed)


# --- what it makes ---------------------------------------------------------------------------


def test_study_is_whole_and_nothing_is_left_to_do(finished):
    assert (finished.reports / "index.html").stat().st_size > 10_000
    manifest = json.loads((finished.results / "study.json").read_text())
    assert {row["run"] for row in manifest["runs"]} == {
        folder.name for folder in (finished.results / "runs").iterdir()
    }
    assert finished.todo() == {}


def test_diverged_arm_is_a_result_like_any_other(finished):
    runs = {row["run"]: row for row in rows(finished.results / "tables" / "runs.csv")}
    diverged = [row for row in runs.values() if row["status"] == "diverged"]
    assert len(runs) == number_of_runs(finished)
    assert [row["display"] for row in diverged] == ["too large a step"]
    measured = rows(finished.results / "tables" / "metrics.csv")
    by_run = {name: [row for row in measured if row["run"] == name] for name in runs}
    assert all(by_run.values()), "a run has no rows among the metrics"
    for name, own in by_run.items():
        empty = [row["value"] in ("", "nan") for row in own]
        assert all(empty) if name == diverged[0]["run"] else not any(empty)
    page = (finished.reports / "index.html").read_text()
    assert "too large a step" in page
    assert "diverged" in page


def test_every_result_says_where_it_came_from(finished):
    for folder in (finished.results / "runs").iterdir():
        status = json.loads((folder / "train" / "status.json").read_text())
        assert status["run"] == folder.name
        assert status["code"]
        measured = [
            path
            for made in (folder / "measurements").iterdir()
            for path in (made / "generate.json", made / "digits.json")
        ]
        assert measured
        for path in (folder / "train/status.json", *measured):
            origin = json.loads(path.read_text())["provenance"]
            assert {"git", "python", "packages", "device"} <= set(origin), path


def test_progress_says_counts_times_and_the_report(finished):
    said = (finished.folder / "said").read_text()
    lines = re.findall(r"^study: (data .*)$", said, re.MULTILINE)
    assert len(lines) >= 2
    assert re.search(r"train \d+/\d+ \(\d+:\d\d left\) .* \| \d+ % \| .* elapsed, about ", lines[0])
    total = number_of_runs(finished)
    each = number_of_measurements(finished)
    assert f"train {total}/{total} · generate {each}/{each} · evaluate {each}/{each}" in lines[-1]
    assert "100 %" in lines[-1]
    assert re.search(r"^Report: reports/smoke/index\.html$", said, re.MULTILINE)


def test_quality_over_training_is_a_table_and_a_figure(finished):
    curve = [
        row for row in rows(finished.results / "tables/curves.csv") if row["protocol"] == "curve"
    ]
    assert {(row["backbone"], row["step"]) for row in curve} == {("ncsnpp", "6"), ("ncsnpp", "12")}
    assert all(float(row["mean"]) > 0 for row in curve)
    assert (finished.results / "figures/quality_over_training.svg").is_file()
    assert "quality_over_training" in (finished.reports / "index.html").read_text(encoding="utf-8")


def test_a_preview_shows_what_is_there_and_names_what_is_not(finished, tmp_path):
    part = Project(shutil.copytree(finished.folder, tmp_path / "a project"))
    gone = next((part.results / "runs").glob("ncsnpp-none*/measurements/step6-*"))
    shutil.rmtree(gone)
    tables = (part.results / "tables/curves.csv").read_bytes()
    done = part.study("preview", "--config", SMOKE)
    assert done.returncode == 0, done.stderr
    assert "preview/index.html: " in done.stdout
    page = (part.results / "preview/index.html").read_text(encoding="utf-8")
    assert "missing" in page
    (lack,) = (
        row
        for row in rows(part.results / "preview/tables/measurements.csv")
        if row["status"] == "missing"
    )
    assert (lack["measurement"], lack["value"]) == (gone.name, "")
    assert (part.results / "tables/curves.csv").read_bytes() == tables


def test_snakemakes_own_report_has_captions(finished):
    made = finished.snakemake("--report", "report.zip")
    assert made.returncode == 0, made.stderr
    assert (finished.folder / "report.zip").stat().st_size < 20e6


# --- what an edit makes it do again ------------------------------------------------------------


def test_added_arm_runs_alone(finished):
    arm = {"name": "new", "backbone": "uvit", "skip_scaling": "cs(0.6)"}
    with finished.edited(**smoke(lambda study: study["arms"].append(arm))):
        assert finished.todo() == {**ONE_RUN, **AFTERWARDS}


def test_added_seed_keeps_the_first(finished):
    with finished.edited(**smoke(lambda study: study.update(seed=[0, 1]))):
        total = number_of_runs(finished)
        assert finished.todo()["train"] == total


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda study: study["arms"].reverse(), id="reordered"),
        pytest.param(lambda study: study["arms"][1].update(name="another name"), id="renamed"),
        pytest.param(lambda study: study["arms"].pop(), id="removed"),
        pytest.param(lambda study: study.update(title="Another title"), id="title"),
    ],
)
def test_what_only_the_tables_show_trains_nothing(finished, change):
    with finished.edited(**smoke(change)):
        assert finished.todo() == AFTERWARDS


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda study: study.update(machine={"save_every": 5.0}), id="speed"),
        pytest.param(lambda study: study.update(machine={"sampling_batch": 64}), id="batch"),
        pytest.param(lambda study: study["training"].update(weight_decay=0), id="default"),
    ],
)
def test_what_changes_no_result_makes_nothing_again(finished, change):
    with finished.edited(**smoke(change)):
        again = finished.todo()
    assert not {"convert", "reference", "train", "generate", "evaluate_digits"} & set(again)


def test_changed_setting_of_an_arm_runs_that_arm(finished):
    def change(study):
        study["arms"][1].setdefault("training", {})["lr"] = 1.5e-3

    with finished.edited(**smoke(change)):
        assert finished.todo() == {**ONE_RUN, **AFTERWARDS}


def test_added_probe_is_all_that_runs(finished):
    with finished.edited(**smoke(lambda study: study["probes"].append("dynamics"))):
        assert finished.todo() == {"probe_dynamics": number_of_runs(finished), **AFTERWARDS}


def test_changed_option_of_a_probe_makes_that_probe_again(finished):
    with finished.edited(**smoke(lambda study: study["probes"][1].update(samples=65))):
        assert finished.todo() == {"probe_optimal_denoiser": 1, **AFTERWARDS}


def test_fewer_probed_seeds_make_no_probe_again(finished):
    with finished.edited(**smoke(lambda study: study["probes"][0].update(seeds=[0]))):
        assert finished.todo() == AFTERWARDS


def test_code_of_a_probe_makes_that_probe_again(finished):
    with finished.edited("study/probes/robustness.py", CODE):
        again = finished.todo()
    assert again == {"probe_robustness": number_of_runs(finished), **AFTERWARDS}


def test_changed_protocol_generates_again_and_trains_nothing(finished):
    with finished.edited(**smoke(lambda study: study["protocols"]["final"].update(seeds=7))):
        total = number_of_measurements(finished)
        assert finished.todo() == {"generate": total, "evaluate_digits": total, **AFTERWARDS}


def append(text: str):
    return lambda before: before + text


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("study/training/loop.py", append("\n\n# A remark about the loop.\n")),
        ("study/training/loop.py", lambda text: text.replace('"""', '"""Again: ', 1)),
        ("study/skips.py", lambda text: "# A remark.\n" + text),
        ("workflow/report/figure.rst", append("\nMore words.\n")),
        ("envs/compute.yaml", append("# a remark\n")),
        ("workflow/rules/train.smk", lambda text: text.replace(" --out ", "  --out ")),
        ("study/cli.py", append("\n\nUNUSED = 1\n")),
    ],
)
def test_remarks_captions_and_layout_make_nothing_again(finished, path, change):
    with finished.edited(path, change):
        assert finished.todo() == {}


CODE = append("\n\nADDED = 1\n")


def test_plot_function_draws_again(finished):
    with finished.edited("study/analysis/figures/quality.py", CODE):
        again = finished.todo()
    assert set(again) <= set(AFTERWARDS) - {"aggregate"}
    assert {"figures", "report"} <= set(again)


def test_evaluation_code_measures_again(finished):
    with finished.edited("study/fidelity/evaluate.py", CODE):
        again = finished.todo()
    assert again["evaluate_digits"] == number_of_measurements(finished)
    assert not {"convert", "train", "generate"} & set(again)


def test_trainer_code_trains_again(finished):
    with finished.edited("study/training/loop.py", CODE):
        again = finished.todo()
    assert again["train"] == number_of_runs(finished)
    assert "convert" not in again


def test_backbone_code_trains_its_own_runs_again(finished):
    with finished.edited("study/backbones/udit.py", CODE):
        assert finished.todo() == {**ONE_RUN, **AFTERWARDS}


def test_sampler_code_generates_again(finished):
    with finished.edited("study/diffusion/samplers/edm.py", CODE):
        again = finished.todo()
    assert again["generate"] == number_of_measurements(finished)
    assert "train" not in again


def test_edited_notebook_runs_again_alone(finished):
    def change(text):
        notebook = json.loads(text)
        notebook["cells"].append(
            {"cell_type": "markdown", "id": "remark", "metadata": {}, "source": ["A remark."]}
        )
        return json.dumps(notebook)

    with finished.edited("notebooks/overview.ipynb", change):
        assert set(finished.todo()) == {"notebook", "report"}


def test_large_files_may_go_but_a_missing_result_is_made_again(finished):
    folder = next(path for path in (finished.results / "runs").glob("uvit-none-*"))
    aside = finished.folder / "aside"
    aside.mkdir()
    weights = folder / "train/raw.safetensors"
    (metrics,) = folder.glob("measurements/*/digits.json")
    try:
        weights.rename(aside / weights.name)
        assert finished.todo() == {}
        metrics.rename(aside / metrics.name)
        assert finished.todo()["evaluate_digits"] == 1
    finally:
        for path in (weights, metrics):
            if (aside / path.name).exists():
                (aside / path.name).rename(path)


def test_a_report_in_the_repository_does_not_pass_for_a_result(project):
    page = project.reports / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("<html></html>")
    assert project.todo()["train"] > 1


# --- how it goes on --------------------------------------------------------------------------


def two_arms(project: Project, **training) -> None:
    """Cut the study down to two arms of the smoke study, with a checkpoint after every step."""
    path = project.folder / project.config
    study = yaml.safe_load(path.read_text())
    study["grid"] |= {"backbone": ["uvit"]}
    study["training"] |= training
    study |= {"arms": [], "machine": {"save_every": 1e-3}}
    path.write_text(yaml.safe_dump(study, sort_keys=False))


def start(project: Project, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        project.command("--cores", "2", "--quiet", "rules", *flags),
        cwd=project.folder,
        stdout=subprocess.DEVNULL,
        stderr=(project.folder / "stderr").open("w"),
        start_new_session=True,
    )


def wait_for(condition, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_killed_study_goes_on_to_the_same_bytes(project, finished):
    two_arms(project)
    moments = [
        ("results/datasets/*.zip", os.killpg),
        ("results/smoke/runs/*/state/checkpoint.pt", os.killpg),
        ("results/smoke/runs/*/logs/generate-*.log", os.kill),  # its jobs live on
    ]
    for pattern, kill in moments:
        process = start(project)
        wait_for(lambda pattern=pattern: list(project.folder.glob(pattern)))
        kill(process.pid, signal.SIGKILL)
        process.wait()
    # A job leaves at once while the same job of the killed workflow lives, instead of waiting on a
    # device; the same command then goes on.
    for _ in range(20):
        done = project.snakemake("--cores", "2", "--quiet", "rules")
        if done.returncode == 0:
            break
        assert "study: another job has" in done.stderr
    assert done.returncode == 0, done.stderr
    folders = sorted((project.results / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        other = finished.results / "runs" / folder.name
        for name in ("weights.safetensors", "raw.safetensors"):
            assert (folder / "train" / name).read_bytes() == (other / "train" / name).read_bytes()
        measured = [path.name for path in (folder / "measurements").iterdir()]
        assert measured
        for name in measured:
            samples = f"measurements/{name}/samples.npz"
            mine, theirs = (path / samples for path in (folder, other))
            assert mine.read_bytes() == theirs.read_bytes()
            mine, theirs = (
                json.loads((path / samples).with_name("digits.json").read_text())["metrics"]
                for path in (folder, other)
            )
            assert mine == theirs


def test_stop_leaves_a_checkpoint_and_one_clear_line(project):
    two_arms(project, steps=1_000_000)
    process = start(project)
    wait_for(lambda: list(project.folder.glob("results/smoke/runs/*/state/checkpoint.pt")))
    running = project.study("status", "--config", project.config).stdout
    assert "running" in running
    assert project.study("stop").returncode == 0
    assert process.wait(120) != 0
    said = (project.folder / "stderr").read_text()
    assert "study: stopped as asked; the same command goes on from there" in said
    # Nothing runs any more, and the next start withdraws the request.
    process = start(project)
    wait_for(lambda: not (project.folder / "results/.stop").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


STAND_IN = """
import sys, time
from pathlib import Path

arguments = iter(sys.argv[2:])
options = {}
for name in arguments:
    name, equals, value = name.partition("=")
    options[name] = value if equals else next(arguments)
out = Path(options["--out"])
"""
"""How a stand-in for the package reads its command line."""

STUB = (
    STAND_IN
    + """
if sys.argv[1] == "train":
    with open("log", "a") as file:
        file.write(f"+ {options['--gpus']}\\n")
    time.sleep(0.4)
    out.mkdir(parents=True, exist_ok=True)
    names = "weights.safetensors raw.safetensors dynamics.parquet timing.parquet status.json"
    for name in names.split():
        (out / name).write_text("x")
    with open("log", "a") as file:
        file.write("-\\n")
else:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("x")
    if sys.argv[1] == "convert":
        Path(f"{out}.json").write_text("{}")
"""
)


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ({"gpus": 1}, (), 1),
        ({"gpus": 1, "jobs_per_gpu": 2}, (), 2),
        ({"gpus": 1}, ("--resources", "gpu=3"), 3),
        ({"gpus": 0}, (), 4),
    ],
)
def test_no_more_gpu_jobs_at_a_time_than_slots(project, machine, flags, expected):
    """Pins what the Snakefile uses of Snakemake's inner workings, by real overlap."""
    (project.folder / "study" / "__main__.py").write_text(STUB)
    path = project.folder / project.config
    study = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(study | {"machine": machine}, sort_keys=False))
    done = project.snakemake("--cores", "4", "--until", "train", *flags)
    assert done.returncode == 0, done.stderr
    now = most = 0
    for line in (project.folder / "log").read_text().splitlines():
        now += 1 if line[0] == "+" else -1
        most = max(most, now)
    assert most == expected


ONE_FAILS_ANOTHER_IS_STOPPED = (
    STAND_IN
    + """
out.parent.mkdir(parents=True, exist_ok=True)
if sys.argv[1] == "train":
    state = Path(options["--state"])
    state.mkdir(exist_ok=True)
    with (state / "attempts").open("a") as file:
        file.write("x")
    attempts = len((state / "attempts").read_text())
    if "-none-" not in options["--out"] or attempts == 6:
        sys.exit("a mistake")
    (state / "checkpoint.pt").write_text(str(attempts))
    if attempts <= 5:
        sys.exit(75)
    out.mkdir(exist_ok=True)
    for name in "weights.safetensors raw.safetensors dynamics.parquet timing.parquet".split():
        (out / name).write_text("x")
    out = out / "status.json"
else:
    Path(f"{out}.json").write_text("{}")
out.write_text("x")
"""
)


def test_stop_is_no_failure_and_failures_are_counted(project):
    """One training is stopped five times and fails once; the other one fails at every attempt."""
    two_arms(project)
    (project.folder / "study" / "__main__.py").write_text(ONE_FAILS_ANOTHER_IS_STOPPED)
    done = project.snakemake("--cores", "2", "--keep-going", "--until", "train")
    assert done.returncode != 0
    attempts = {
        path.parents[1].name.split("-")[1]: len(path.read_text())
        for path in project.results.glob("runs/*/state/attempts")
    }
    assert attempts == {"none": 7, "ls": 3}
    assert len(list(project.results.glob("runs/uvit-none-*/train/status.json"))) == 1
    assert done.stderr.count("was stopped and will go on; not a failure") == 5
    (log,) = project.results.glob("runs/uvit-ls-*/logs/train.log")
    assert f"study: failed, see {log.relative_to(project.folder)}" in done.stderr
    assert "study:   a mistake" in done.stderr


def test_run_of_a_living_job_is_left_to_it(project):
    two_arms(project)
    (run,) = (
        name
        for name in project.study("runs", "--config", project.config).stdout.split()
        if name.startswith("uvit-none-")
    )
    folder = project.results / "runs" / run / "state"
    folder.mkdir(parents=True)
    with (folder / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = start(project, "--until", "train")
        said = project.folder / "stderr"
        wait_for(
            lambda: f"study: train waits: {run} still belongs to an earlier job" in said.read_text()
        )
        wait_for(lambda: list(project.results.glob("runs/uvit-ls-*/train/status.json")))
        assert process.poll() is None
        assert not (folder.parent / "logs/train.log").exists()
    assert process.wait(120) == 0
    assert (folder.parent / "train/status.json").exists()


# --- mistakes, and promises -------------------------------------------------------------------


def test_mistake_in_the_study_is_one_line(project):
    with project.edited(SMOKE, lambda text: text.replace("steps: 12", "stepz: 12")):
        done = project.snakemake("-n")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("study:")]
    assert "study: training.stepz: unknown key; did you mean 'steps'?" in lines
    assert "Traceback" not in done.stderr
    assert "smk" not in done.stderr


def test_conda_without_conda_is_one_line(project, tmp_path):
    done = project.snakemake("-n", "--use-conda", env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "conda" in line]
    assert lines == [
        "study: --use-conda needs a conda executable and none is on PATH; "
        "install Miniforge, or leave the flag out to use this environment"
    ]
    assert "Traceback" not in done.stderr


def test_missing_notebook_is_one_line(project):
    with project.edited(SMOKE, lambda text: text.replace("[overview]", "[overveiw]")):
        done = project.snakemake("-n")
    assert done.returncode != 0
    assert "study: notebooks: there is no notebooks/overveiw.ipynb; allowed:" in done.stderr


def test_two_meanings_of_one_data_set_are_one_line(finished):
    other = finished.folder / "workflow/studies/other.yaml"
    study = yaml.safe_load((finished.folder / SMOKE).read_text())
    study |= {"study": "other", "dataset": {**study["dataset"], "max_images": 1000}}
    other.write_text(yaml.safe_dump(study))
    try:
        done = Project(finished.folder, "workflow/studies/other.yaml").snakemake("-n")
    finally:
        other.unlink()
    assert done.returncode != 0
    assert re.search(r"^study: dataset\.name: 'digits' is .*max_images", done.stderr, re.MULTILINE)


def test_thousand_arms_stay_light(project):
    def change(study):
        backbones = ["uvit", "udit", "patch_unet", "ddpmpp", "ncsnpp"]
        kappas = [f"cs({0.5 + k / 1000:.3f})" for k in range(100)]
        study["grid"] |= {"backbone": backbones, "skip_scaling": kappas, "target": ["dsm", "stf"]}
        study["training"]["batch"] = 32

    with project.edited(**smoke(change)):
        begun = time.monotonic()
        assert project.todo()["train"] >= 1000
        assert time.monotonic() - begun < 60  # 6 s on a quiet machine
        begun = time.monotonic()
        planned = project.study("plan", "--config", SMOKE)
        assert time.monotonic() - begun < 30  # 2 s on a quiet machine
        assert planned.returncode == 0, planned.stderr
        assert re.search(r"smoke: 100\d runs", planned.stdout)


HEAVY = {"torch", "pandas", "matplotlib", "sklearn", "accelerate", "torchvision"}


def test_snakefile_and_plan_import_nothing_heavy(project):
    for command in (
        ["-m", "snakemake", "-n", "--configfile", SMOKE],
        ["-m", "study", "status", "--config", SMOKE],
        ["-m", "study", "runs", "--config", SMOKE],
    ):
        done = project.python("-X", "importtime", *command)
        assert done.returncode == 0, done.stderr[-2000:]
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "study.spec.study" in imported
        assert not HEAVY & imported


def test_nothing_in_the_package_knows_snakemake():
    for path in (ROOT / "study").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) snakemake", path.read_text(), re.MULTILINE), path


LEANT_ON = {
    "snakemake.api:Workflow": "_prepare_dag execute unlock dag_settings",
    "snakemake.settings.types:DAGSettings": (
        "force_incomplete max_checksum_file_size rerun_triggers"
    ),
    "snakemake.settings.types:StorageSettings": "default_storage_provider shared_fs_usage",
    "snakemake.scheduling.job_scheduler:JobScheduler": (
        "_executor _handle_error _open_jobs _schedule_reevalutation run job_selector "
        "exit_gracefully running failed"
    ),
    "snakemake.persistence.file:FilePersistence": (
        "lock _delete_locks _lockfile _record_path _incomplete_path"
    ),
    "snakemake_interface_executor_plugins.executors.remote:RemoteExecutor": (
        "active_jobs cancel_jobs next_seconds_between_status_checks wait sleep report_job_error"
    ),
}
"""What the hooks take from Snakemake beyond what it offers, by class."""


@pytest.mark.parametrize("place", LEANT_ON)
def test_the_pinned_snakemake_has_what_the_hooks_lean_on(place):
    module, _, name = place.partition(":")
    found = getattr(importlib.import_module(module), name)
    written = "".join(
        inspect.getsource(one) for one in found.__mro__[:-1] if one.__module__ != "abc"
    )
    for attribute in LEANT_ON[place].split():
        assert hasattr(found, attribute) or re.search(rf"\b{attribute}\b", written), attribute


def test_only_the_hooks_reach_into_snakemake():
    private = r"\._[a-z]\w*|\.__class__ ="
    reached = {
        path.name: set(re.findall(private, path.read_text()))
        for path in [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]
    }
    hooks = reached.pop("hooks.smk") - {".__class__ ="}
    assert {f".{name}" for names in LEANT_ON.values() for name in names.split()} >= hooks
    assert set().union(*reached.values()) == set()


def test_lint_finds_nothing(project):
    done = project.snakemake("--lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_formatted():
    pytest.importorskip("snakefmt")
    done = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "workflow"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_environments_pin_what_the_lock_pins():
    lock = dict(
        line.split("==")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    )
    for path in (ROOT / "envs").glob("*.yaml"):
        *_, pip = yaml.safe_load(path.read_text())["dependencies"]
        for line in pip["pip"]:
            name, version = line.partition(";")[0].split("==")
            assert lock[name] == version, f"{path.name}: {line}"


def test_every_pin_installs_on_the_oldest_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"].startswith(">=3.11,")
    checked = 0
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, _, version = line.partition("==")
        if line.startswith("#"):
            continue
        found = metadata.distribution(name)
        if found.version.partition("+")[0] == version:  # an environment of one's own may differ
            pythons = found.metadata.get("Requires-Python") or ""
            assert "3.11.0" in SpecifierSet(pythons), f"{line} needs Python {pythons}"
            checked += 1
    assert checked > 100


def test_profiles_are_profiles():
    allowed = set(
        subprocess.run(
            [sys.executable, "-m", "snakemake", "--help"], capture_output=True, text=True
        )
        .stdout.replace("--", " ")
        .replace(",", " ")
        .split()
    )
    for path in (ROOT / "workflow/profiles").glob("*/profile.yaml"):
        for key in yaml.safe_load(path.read_text()):
            assert key in allowed or key.startswith("slurm"), f"{path}: {key}"


def test_copy_of_the_project_lacks_nothing(tmp_path):
    copy_project(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(PARTS)


def test_the_scheduler_knows_of_every_lock_that_a_stage_takes():
    """Else the job that a killed workflow left behind would count as a failure of the next."""
    verbs = {
        name
        for name, verb in typer.main.get_command(cli.app).commands.items()
        if "_alone" in inspect.getsource(verb.callback)
    }
    rules = (ROOT / "workflow/rules/scheduling.smk").read_text(encoding="utf-8")
    known = ast.literal_eval(re.search(r"locked = (\(.*\))", rules)[1])
    assert verbs == {name.rstrip("_") for name in known}
