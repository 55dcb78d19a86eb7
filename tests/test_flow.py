"""Many measurements per run: what a new protocol, cell, extractor or part makes, and what not.

What trains, samples and measures is the stand-in of `test_reruns`: these tests are about what
Snakemake decides, file by file.
"""

import shutil

import pytest
from conftest import draw
from test_reruns import Small, begin

TARGETS = """
from study.arms import runs, selected
from study.spec.study import load

study = load({!r})
for run in selected(study, runs(study)).values():
    print(f"runs/{{run.name}}/train/status.json")
    for one in run.measurements:
        for kind in one.extractors:
            print(f"runs/{{run.name}}/measurements/{{one.name}}/{{kind}}.json")
"""

CURVE = {"like": "final", "at": "snapshots"}


class Flow(Small):
    """The same with every measurement of every run as a target."""

    def targets(self) -> list[str]:
        listed = self.python("-c", TARGETS.format(self.config))
        assert listed.returncode == 0, listed.stderr
        return [f"results/t/{path}" for path in listed.stdout.splitlines()]

    def measured(self, name: str) -> set[str]:
        return {path.parent.name for path in (self.folder / "results/t/runs").glob(f"*/*/*/{name}")}


def three_steps(study: dict) -> None:
    study["training"] |= {"steps": 6, "snapshots": 2}


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory) -> Flow:
    flow = Flow(begin(tmp_path_factory.mktemp("flow") / "a project").folder, "t.yaml")
    flow.write(three_steps)
    done = flow.make()
    assert done.returncode == 0, done.stderr
    return flow


@pytest.fixture
def flow(finished_once, tmp_path) -> Flow:
    """A finished study of one run and one measurement, with three snapshots."""
    return Flow(shutil.copytree(finished_once.folder, tmp_path / "a project"), "t.yaml")


def curve(study: dict) -> None:
    study["protocols"]["curve"] = CURVE


def smaller_curve(study: dict) -> None:
    study["protocols"]["curve"] = CURVE | {"images": 4}


def another_seed(study: dict) -> None:
    study["protocols"]["final"]["seeds"] = [0, 8]


def another_sampler_length(study: dict) -> None:
    study["protocols"]["final"]["sampler"]["steps"] = [2, 3, 5]


def another_extractor(study: dict) -> None:
    study["protocols"]["final"]["extractors"] = ["pixels", "digits"]


def best(study: dict) -> None:
    curve(study)
    study["protocols"]["best"] = {"like": "final", "at": "best(curve)", "seeds": 100}


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (curve, {"generate": 2, "evaluate_pixels": 2}),  # the last snapshot is measured already
        (smaller_curve, {"generate": 3, "evaluate_pixels": 3}),
        (another_seed, {"generate": 1, "evaluate_pixels": 1}),
        (another_sampler_length, {"generate": 2, "evaluate_pixels": 2}),
        (another_extractor, {"extractor": 1, "reference": 1, "evaluate_digits": 1}),
        (best, {"generate": 3, "evaluate_pixels": 3}),
    ],
)
def test_what_is_added_to_a_finished_study_trains_nothing_and_repeats_nothing(flow, change, made):
    flow.write(lambda study: (three_steps(study), change(study)))
    assert flow.again() == made
    done = flow.make()
    assert done.returncode == 0, done.stderr
    assert flow.again() == {}


def test_the_best_snapshot_waits_for_the_curve_of_its_run(flow):
    flow.write(lambda study: (three_steps(study), best(study)))
    done = flow.make()
    assert done.returncode == 0, done.stderr
    (chosen,) = (path for path in flow.measured("pixels.json") if path.startswith("best-"))
    folder = next((flow.folder / "results/t/runs").iterdir()) / "measurements"
    curve = [folder / name / "pixels.json" for name in flow.measured("pixels.json") - {chosen}]
    waited = [path for path in curve if "seed" not in path.parent.name]
    assert len(waited) == 3
    begun = (folder.parent / f"logs/generate-{chosen}.log").stat().st_mtime
    assert all(path.stat().st_mtime <= begun for path in waited)


def test_protocols_of_other_names_in_another_order_make_nothing(flow):
    flow.write(lambda study: (three_steps(study), curve(study)))
    assert flow.make().returncode == 0

    def turned(study: dict) -> None:
        three_steps(study)
        whole = study["protocols"]["final"]
        study["protocols"] = {"along": {"like": "end", "at": "snapshots"}, "end": whole}

    flow.write(turned)
    assert flow.again() == {}


# --- what stays of the samples -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "stays"),
    [("samples", {"samples.npz", "grid.png"}), ("grid", {"grid.png"}), ("none", set())],
)
def test_samples_are_dropped_when_they_are_measured_and_nothing_reruns(flow, keep, stays):
    def change(study: dict) -> None:
        three_steps(study)
        study["protocols"]["curve"] = CURVE | {"images": 4, "keep": keep}

    flow.write(change)
    done = flow.make()
    assert done.returncode == 0, done.stderr
    for name in ("samples.npz", "grid.png"):
        # Those of the other protocol stay.
        assert len(flow.measured(name)) == 1 + 3 * (name in stays)
    assert flow.again() == {}


def test_keeping_less_or_deleting_by_hand_makes_nothing(flow):
    def less(study: dict) -> None:
        three_steps(study)
        study["protocols"]["final"]["keep"] = "none"

    flow.write(less)
    assert flow.again() == {}
    for path in (flow.folder / "results/t/runs").rglob("samples.npz"):
        path.unlink()
    assert flow.again() == {}
    flow.write(three_steps)
    assert flow.again() == {}


# --- a part of a study ---------------------------------------------------------------------------


def two_scalings(study: dict) -> None:
    three_steps(study)
    study["grid"]["skip_scaling"] = ["none", "ls"]


def test_only_a_part_is_made_and_the_rest_later(flow):
    flow.write(two_scalings)
    part = ("--config", "only={skip_scaling: ls}")
    targets = [path for path in flow.targets() if "uvit-ls" in path]
    made = flow.todo(*targets, *part)
    assert made == {"train": 1, "generate": 1, "evaluate_pixels": 1}
    everything = flow.todo(*part)
    assert everything["train"] == 1
    for verb in ("plan", "status", "runs"):
        told = flow.study(verb, "--config", flow.config, "--only", "{skip_scaling: ls}")
        assert told.returncode == 0, told.stderr
        assert "ls" in told.stdout
        assert "uvit · none" not in told.stdout


def test_a_part_that_is_none_is_one_line(flow):
    done = flow.snakemake("-n", "--cores", "1", "--config", "only={backbone: uvitt}")
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("study: "))
    assert line == "study: only.backbone: no arm has 'uvitt'; there are uvit"


# --- lineages and data sets ----------------------------------------------------------------------


def test_a_longer_training_waits_for_the_shorter_one_of_its_lineage(tmp_path):
    flow = Flow(begin(tmp_path / "a project").folder, "t.yaml")
    flow.write(lambda study: study["grid"].update(training=[{"steps": 9}, {"steps": 3}]))
    done = flow.make()
    assert done.returncode == 0, done.stderr
    trained = {}
    for run in (flow.folder / "results/t/runs").iterdir():
        begun = (run / "logs/train.log").stat().st_mtime
        trained[run.name] = begun, (run / "train/status.json").stat().st_mtime
    (_, first_ended), (second_begun, _) = sorted(trained.values())
    assert second_begun >= first_ended
    listed = flow.study("runs", "--config", flow.config).stdout.splitlines()
    shorter = next(line.split()[0] for line in listed if "steps=3" in line)
    assert trained[shorter][1] == first_ended


def test_every_data_set_has_its_archive_reference_and_runs(tmp_path):
    flow = Flow(begin(tmp_path / "a project").folder, "t.yaml")
    draw(flow.folder / "others", 8, seed=1)

    def several(study: dict) -> None:
        mine = study.pop("dataset")
        mine.pop("name")
        study["datasets"] = {"mine": mine, "others": mine | {"path": "others"}}
        study["grid"]["dataset"] = ["mine", "others"]

    flow.write(several)
    done = flow.make()
    assert done.returncode == 0, done.stderr
    assert flow.again() == {}
    for name in ("mine", "others"):
        assert (flow.folder / f"results/datasets/{name}.zip").is_file()
        assert (flow.folder / f"results/datasets/{name}.pixels/reference.json").is_file()
    draw(flow.folder / "others", 9, seed=1)
    changed = dict.fromkeys(("convert", "reference", "train", "generate", "evaluate_pixels"), 1)
    assert flow.again() == changed
