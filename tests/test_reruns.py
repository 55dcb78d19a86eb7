"""Content, not paths: what changed sources and files make again, and what touched ones do not.

The data set is converted for real. What trains, samples and measures is a stand-in that writes
files of the right names at once: these tests are about what Snakemake decides, file by file.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Project, copy_project, draw
from PIL import Image

STAND_IN = """
import hashlib, json, os, sys, time
from pathlib import Path

if os.environ.get("WAITS") == sys.argv[1]:
    Path("waiting").touch()
    while not Path("go").exists():
        time.sleep(0.05)
if sys.argv[1] not in ("train", "generate", "evaluate", "reference", "probe"):
    from study.cli import main

    sys.exit(main())
arguments, options = iter(sys.argv[2:]), {}
for name in arguments:
    if name.startswith("--"):
        name, equals, value = name.partition("=")
        options[name] = value if equals else next(arguments)
out = Path(options["--out"])
large = options.get("--run-dir", str(out)).encode() * 1000
sha256 = hashlib.sha256(large).hexdigest()
names = {
    "train": "weights.safetensors raw.safetensors dynamics.parquet timing.parquet status.json",
    "generate": "samples.npz grid.png generate.json",
    "reference": "features.safetensors reference.json",
    "evaluate": "",
    "probe": "",
}[sys.argv[1]].split()
paths = [out / name for name in names]
for path in paths or [out.with_suffix(".parquet"), out.with_suffix(".json")]:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = "weights_sha256", "raw_sha256", "samples_sha256", "features_sha256"
    record = json.dumps(dict.fromkeys(keys, sha256)).encode()
    path.write_bytes(record if path.suffix == ".json" else large)
"""

STUDY = {
    "study": "t",
    "dataset": {"name": "mine", "source": "folder", "path": "images"},
    "grid": {"backbone": ["uvit"]},
    "backbones": {"uvit": {"preset": "tiny"}},
    "training": {"steps": 2, "batch": 2, "lr": 1e-3},
    "protocols": {
        "final": {
            "sampler": {"kind": "edm_heun", "steps": 2},
            "images": 8,
            "extractors": "pixels",
            "metrics": ["fd"],
        }
    },
    "probes": ["robustness"],
    "notebooks": [],
}

EVERYTHING = dict.fromkeys(
    ("convert", "reference", "train", "generate", "evaluate_pixels", "probe_robustness"), 1
)

OF_RUN = {"generate", "evaluate_pixels", "probe_robustness"}

STRICT = ("--max-checksum-file-size", "4000")
"""As if the archive, weights, samples and features were too large for Snakemake to hash."""


class Small(Project):
    """A small study of images in the project's folder."""

    def write(self, change: Callable[[dict], None] = lambda study: None, name="t.yaml") -> None:
        study = json.loads(json.dumps(STUDY))
        change(study)
        (self.folder / name).write_text(yaml.safe_dump(study, sort_keys=False))

    def targets(self) -> list[str]:
        # Not `study runs`, which makes the checks whose words are to be seen from snakemake.
        names = (
            "from study.arms import runs; from study.spec.study import load; "
            "study = load({!r}); (run,) = runs(study).values(); (one,) = run.measurements; "
            "(kind,) = one.extractors; print(run.name, f'measurements/{{one.name}}/{{kind}}.json')"
        )
        listed = self.python("-c", names.format(self.config))
        assert listed.returncode == 0, listed.stderr
        run = f"results/{Path(self.config).stem}/runs/{listed.stdout.split()[0]}"
        return [f"{run}/{listed.stdout.split()[1]}", f"{run}/probes/robustness.json"]

    def make(self, *flags: str) -> subprocess.CompletedProcess:
        return self.snakemake(*self.targets(), "--cores", "2", *flags)

    def again(self, *flags: str) -> dict[str, int]:
        return self.todo(*self.targets(), *STRICT, *flags)

    def refusal(self, *flags: str) -> str:
        """The one line with which the command ends."""
        done = self.make(*flags)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("study: "))
        return line


def begin(folder: Path) -> Small:
    small = Small(copy_project(folder), "t.yaml")
    (small.folder / "study" / "__main__.py").write_text(STAND_IN)
    draw(small.folder / "images")
    small.write()
    return small


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory) -> Small:
    small = begin(tmp_path_factory.mktemp("reruns") / "a project")
    done = small.make()
    assert done.returncode == 0, done.stderr
    return small


@pytest.fixture
def small(finished_once, tmp_path) -> Small:
    """A finished small study of one's own: a copy with all its times."""
    return Small(shutil.copytree(finished_once.folder, tmp_path / "a project"), "t.yaml")


def archived(small: Small) -> int:
    return json.loads((small.folder / "results/datasets/mine.zip.json").read_text())["images"]


# --- what changes nothing ------------------------------------------------------------------------


def test_nothing_is_left_to_do(small):
    assert small.again() == {}


def test_touched_and_copied_results_make_nothing_again(small, tmp_path):
    # The larger files last, so that they are younger than what says what they hold.
    files = [path for path in (small.folder / "results").rglob("*") if path.is_file()]
    for second, path in enumerate(sorted(files, key=lambda path: path.stat().st_size)):
        os.utime(path, (time.time() + 60 + second,) * 2)
    assert small.again() == {}
    copy = shutil.copytree(small.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert Small(copy, "t.yaml").again() == {}


def moved(small: Small) -> None:
    (small.folder / "images").rename(small.folder / "elsewhere")
    small.write(lambda study: study["dataset"].update(path="elsewhere"))


def copied(small: Small) -> None:
    images = small.folder / "images"
    shutil.copytree(images, small.folder / "copy", copy_function=shutil.copyfile)
    small.write(lambda study: study["dataset"].update(path="copy"))


def touched(small: Small) -> None:
    for path in (small.folder / "images").rglob("*.png"):
        os.utime(path)


def removed(small: Small) -> None:
    shutil.rmtree(small.folder / "images")


def removed_and_converted_by_other_code(small: Small) -> None:
    removed(small)
    with (small.folder / "study/data/convert.py").open("a") as file:
        file.write("\n\nADDED = 1\n")


@pytest.mark.parametrize(
    "change", [moved, copied, touched, removed, removed_and_converted_by_other_code]
)
def test_a_source_that_holds_the_same_or_is_gone_makes_nothing_again(small, change):
    change(small)
    assert small.again() == {}


# --- what changes something ----------------------------------------------------------------------


def grown(small: Small) -> None:
    draw(small.folder / "images", 16)


def edited(small: Small) -> None:
    path = small.folder / "images/a/0.png"
    size = path.stat().st_size
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, compress_level=0)
    assert path.stat().st_size == size


def another_path(small: Small) -> None:
    draw(small.folder / "others", 8, seed=1)
    small.write(lambda study: study["dataset"].update(path="others"))


@pytest.mark.parametrize("change", [grown, edited, another_path])
def test_a_source_that_changed_is_converted_anew_and_all_that_depends_on_it(small, change):
    before = (small.folder / "results/datasets/mine.zip").read_bytes()
    change(small)
    assert small.again() == EVERYTHING
    planned = small.study("plan", "--config", small.config)
    assert "was made from; it is converted anew" in planned.stdout
    done = small.make()
    assert done.returncode == 0, done.stderr
    assert (small.folder / "results/datasets/mine.zip").read_bytes() != before
    assert archived(small) == (32 if change is grown else 16)
    assert small.again() == {}


def test_a_conversion_by_itself_to_the_same_content_makes_nothing_else_again(small):
    (small.folder / "images" / "README").write_text("Images.\n")
    done = small.snakemake("results/datasets/mine.zip", "--cores", "1")
    assert done.returncode == 0, done.stderr
    assert "rule convert" in done.stdout + done.stderr
    assert small.again() == {}


def test_another_reference_under_a_known_name_is_made_again(tmp_path):
    small = begin(tmp_path / "a project")
    draw(small.folder / "judges", seed=2)
    reference = {**STUDY["dataset"], "name": "judges", "path": "judges"}
    small.write(lambda study: study["dataset"].update(reference=reference))
    assert small.make().returncode == 0
    assert small.again() == {}
    draw(small.folder / "judges", 9, seed=2)
    assert small.again() == {"convert": 1, "reference": 1, "evaluate_pixels": 1}


# --- files that jobs wrote -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "results/t/runs/*/train/weights.safetensors",
            {"generate", "evaluate_pixels", "probe_robustness"},
        ),
        ("results/t/runs/*/measurements/*/samples.npz", {"evaluate_pixels"}),
        ("results/datasets/mine.pixels/features.safetensors", {"evaluate_pixels"}),
    ],
)
def test_a_large_file_of_other_content_makes_again_what_reads_it(small, path, expected):
    (file,) = small.folder.glob(path)
    file.write_bytes(b"other" * 2000)
    os.utime(file, (time.time() + 60,) * 2)
    assert set(small.again()) == expected


def test_another_archive_in_the_place_of_the_data_sets_is_one_line(small):
    archive = small.folder / "results/datasets/mine.zip"
    kept = archive.read_bytes()
    shutil.make_archive(str(archive.with_suffix("")), "zip", small.folder / "images")
    assert small.refusal().startswith(
        "study: results/datasets/mine.zip: holds other images than its conversion put there"
    )
    archive.unlink()  # as the line says
    assert small.again() == {}
    archive.write_bytes(kept)
    assert small.again() == {}


def test_an_archive_whose_source_is_gone_is_not_deleted_for_a_conversion_that_must_fail(small):
    removed(small)
    archive = small.folder / "results/datasets/mine.zip"
    kept = archive.read_bytes()
    small.write(lambda study: study["dataset"].update(color="grey"))
    line = small.refusal()
    assert line == (
        "study: dataset.path: images: no such file or folder; results/datasets/mine.zip stays as "
        "it is"
    )
    assert archive.read_bytes() == kept


# --- files that users give -----------------------------------------------------------------------


def of_latents(study: dict) -> None:
    study["dataset"] |= {"source": "latents", "path": "latents", "labels": False}
    study["dataset"]["decoder"] = {"weights": "given", "scale": 1.0}
    study["dataset"]["reference"] = {**STUDY["dataset"], "name": "images"}


def with_inception(study: dict) -> None:
    study["protocols"]["final"]["extractors"] = {"kind": "inception", "weights": "given"}


EXTRACTOR_WEIGHTS = ("protocols", "final", "extractors", "weights")


def imported(study: dict) -> None:
    del study["grid"]
    study["arms"] = [{"backbone": "uvit", "checkpoint": {"path": "given", "name": "published"}}]


@pytest.mark.parametrize(
    ("study", "keys", "expected"),
    [
        (of_latents, ("dataset", "decoder", "weights"), {"generate", "evaluate_pixels"}),
        (with_inception, EXTRACTOR_WEIGHTS, {"reference", "evaluate_inception"}),
        (imported, ("arms", 0, "checkpoint", "path"), {"train", *OF_RUN}),
    ],
)
def test_a_given_file_counts_by_what_it_holds(tmp_path, study, keys, expected):
    small = begin(tmp_path / "a project")
    (small.folder / "latents").mkdir()
    for number in range(3):
        np.save(small.folder / "latents" / f"{number}.npy", np.ones((4, 8, 8), np.float32))
    given = small.folder / "given"
    given.write_bytes(b"one")
    small.write(study)
    done = small.make()
    assert done.returncode == 0, done.stderr
    assert small.again() == {}

    def lies_at(path: str) -> None:
        def change(content: dict) -> None:
            study(content)
            section = content
            for key in keys[:-1]:
                section = section[key]
            section[keys[-1]] = path

        small.write(change)

    given.rename(small.folder / "moved")
    lies_at("moved")
    os.utime(small.folder / "moved")
    assert small.again() == {}
    (small.folder / "moved").write_bytes(b"two")
    assert set(small.again()) == expected
    (small.folder / "moved").write_bytes(b"one")
    assert small.again() == {}
    (small.folder / "moved").unlink()
    assert small.again() == {}
    (small.folder / "other").write_bytes(b"other")
    lies_at("other")
    assert set(small.again()) == expected


# --- studies that share a data set ---------------------------------------------------------------


def other_study(small: Small, **dataset) -> Small:
    def change(study):
        study["study"] = "u"
        study["dataset"].update(dataset)

    small.write(change, "u.yaml")
    return Small(small.folder, "u.yaml")


def test_two_studies_of_one_content_share_its_archive(small):
    shutil.copytree(small.folder / "images", small.folder / "copy")
    again = other_study(small, path="copy").again()
    assert "convert" not in again and "reference" not in again


def test_a_second_study_of_other_files_under_the_same_name_is_one_line(small):
    manifest = small.folder / "results/t/study.json"
    assert json.loads(manifest.read_text())["config"]["dataset"]["path"] == "images"
    draw(small.folder / "others", 9)
    line = other_study(small, path="others").refusal()
    assert line == (
        "study: dataset.path: others does not hold what images holds, which is the data set 'mine' "
        "of results/t; choose another name, or delete that folder"
    )
    shutil.rmtree(small.folder / "results/t")  # as the line says
    assert other_study(small, path="others").again() == EVERYTHING


def test_a_second_seed_of_the_classifier_that_studies_share_is_one_line(tmp_path):
    small = begin(tmp_path / "a project")
    small.write(lambda study: study["protocols"]["final"].update(extractors="digits"))
    manifest = small.folder / "results/t/study.json"
    manifest.parent.mkdir(parents=True)
    listed = small.python(
        "-c",
        "import json; from study.arms import manifest, runs; from study.spec.study import load; "
        "study = load('t.yaml'); print(json.dumps(manifest(study, runs(study))))",
    )
    manifest.write_text(listed.stdout)

    def change(study):
        study["study"] = "u"
        study["protocols"]["final"]["extractors"] = {"kind": "digits", "seed": 1}

    small.write(change, "u.yaml")
    assert Small(small.folder, "u.yaml").refusal().startswith("study: extractor digits: results/t ")


# --- several Snakemakes --------------------------------------------------------------------------


def hold(small: Small, verb: str) -> subprocess.Popen:
    """A Snakemake whose job ``verb`` waits for the file "go"."""
    command = [sys.executable, "-m", "snakemake", *small.targets(), "--cores", "1"]
    process = subprocess.Popen(
        [*command, "--configfile", small.config],
        cwd=small.folder,
        env={**os.environ, "WAITS": verb},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not (small.folder / "waiting").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return process


def test_a_second_snakemake_of_a_study_is_one_line_and_a_killed_one_is_no_hindrance(tmp_path):
    small = begin(tmp_path / "a project")
    process = hold(small, "train")
    try:
        line = small.refusal()
        assert line.startswith("study: study 't' is being run by another snakemake (process ")
        assert str(process.pid) in line
        assert "unlock" not in line
        assert small.again()  # looking is allowed
        refused = small.snakemake("--unlock")
        assert refused.returncode != 0
        assert "study: not unlocked: study 't' is being run here" in refused.stderr
        assert list((small.folder / ".snakemake/locks").iterdir())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (small.folder / "go").touch()
    done = small.make()
    assert done.returncode == 0, done.stderr
    assert small.again() == {}
    assert not list((small.folder / ".snakemake/running").glob("*.json"))


def test_of_a_snakemake_on_another_machine_it_says_how_to_go_on(tmp_path):
    small = begin(tmp_path / "a project")
    process = hold(small, "train")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (small.folder / "go").touch()
    (path,) = (small.folder / ".snakemake/running").glob("*.json")
    record = json.loads(path.read_text()) | {"host": "node7"}
    path.write_text(json.dumps(record))
    line = small.refusal()
    assert "on node7, since " in line
    assert line.endswith("if it was killed there, `snakemake --unlock` frees the folder")
    assert small.snakemake("--unlock").returncode == 0
    done = small.make()
    assert done.returncode == 0, done.stderr


def test_two_studies_that_want_the_same_new_data_set_never_make_it_both(tmp_path):
    small = begin(tmp_path / "a project")
    second = other_study(small)
    process = hold(small, "convert")
    try:
        line = second.refusal()
        assert line.startswith("study: study 't' makes or reads files of results/datasets that ")
        assert "wait until it has made them" in line
        (small.folder / "go").touch()
        assert process.wait(120) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    done = second.make()
    assert done.returncode == 0, done.stderr
    assert "convert" not in done.stderr


def test_a_study_starts_beside_another_one_that_has_made_their_data_set(tmp_path):
    small = begin(tmp_path / "a project")
    second = other_study(small)
    process = hold(small, "evaluate")
    try:
        done = second.make()
        assert done.returncode == 0, done.stderr
        assert process.poll() is None
    finally:
        (small.folder / "go").touch()
        assert process.wait(120) == 0
    assert small.again() == {} == second.again()


# --- another folder ------------------------------------------------------------------------------


def test_jobs_use_the_package_beside_the_snakefile_wherever_they_run(tmp_path):
    small = begin(tmp_path / "a project")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "study").mkdir(parents=True)
    (elsewhere / "study" / "__init__.py").write_text("raise SystemExit('another installation')\n")
    draw(elsewhere / "images")
    shutil.copy(small.folder / "t.yaml", elsewhere)
    command = [sys.executable, "-P", "-m", "snakemake", *small.targets(), "--cores", "1"]
    done = subprocess.run(
        [*command, "--snakefile", str(small.folder / "Snakefile"), "--configfile", "t.yaml"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "results/datasets/mine.zip").exists()
    assert not (small.folder / "results").exists()


@pytest.mark.parametrize("verb", ["plan", "status", "stop"])
def test_a_verb_about_studies_in_a_folder_without_any_is_one_line(project, tmp_path, verb):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "study", verb],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(project.folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"study: {empty}: neither a Snakefile nor results/ is here")
    assert not list(empty.iterdir())
