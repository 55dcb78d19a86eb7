"""Plan, status and progress: what they tell from a study and from files alone."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from miniature import base, measured

from study import arms
from study.files import UserError, write_json
from study.ledger import checks, digest, plan, progress, status
from study.spec.probes import Cost, Robustness, ScalingLaws, StabilityFrontier
from study.spec.run import Spec
from study.spec.study import load

NOW = 1_000_000.0


@pytest.fixture
def study():
    return load(base())


@pytest.fixture
def run(study):
    return next(iter(arms.runs(study).values()))


def finish(folder: Path, run: arms.Run, **changes) -> None:
    """What a finished run leaves, as far as plan and status read it."""
    content = {
        "status": "done",
        "step": 10,
        "steps": 10,
        "spec": run.spec.content(),
        "code": digest.training(run.spec),
        "images_seen": 80,
        "train_seconds": 40.0,
        "provenance": {"device": "cpu"},
    }
    write_json(folder / "train/status.json", content | changes)
    (one,) = run.measurements
    made = folder / "measurements" / one.name
    write_json(made / "generate.json", {"images_per_second": 2.0, "nfe": 5})
    write_json(made / "digits.json", {})


def write_progress(folder: Path, **changes) -> None:
    content = {"stage": "train", "step": 4, "steps": 10, "seconds": 8.0, "time": NOW}
    write_json(folder / "state/progress.json", content | changes)


# --- status ----------------------------------------------------------------------------------


def test_nothing_there_is_missing(run, tmp_path):
    assert status.state_of(run, tmp_path).state == "missing"


def test_finished_run_is_done(run, tmp_path):
    finish(tmp_path, run)
    write_progress(tmp_path, step=10)
    assert status.state_of(run, tmp_path, NOW).state == "done"


def test_diverged_run_says_where_and_why(run, tmp_path):
    finish(tmp_path, run, status="diverged", step=3, reason="non-finite loss")
    found = status.state_of(run, tmp_path)
    assert (found.state, found.note) == ("diverged", "non-finite loss at step 3")


def test_fresh_progress_is_running_and_old_progress_is_stopped(run, tmp_path):
    write_progress(tmp_path)
    assert status.state_of(run, tmp_path, NOW + 5).state == "stopped"  # nobody has the run
    (tmp_path / "state" / "lock").touch()
    found = status.state_of(run, tmp_path, NOW + 5)
    assert (found.state, found.stage, found.step, found.left) == ("running", "train", 4, 12.0)
    assert status.state_of(run, tmp_path, NOW + 3600).state == "stopped"


def test_what_was_measured_of_other_weights_is_stale(run, tmp_path):
    finish(tmp_path, run, weights_sha256="a1")
    made = tmp_path / "measurements" / run.measurements[0].name
    write_json(made / "digits.json", {"weights_sha256": "a1"})
    assert status.state_of(run, tmp_path).state == "done"
    finish(tmp_path, run, weights_sha256="b2")
    write_json(made / "digits.json", {"weights_sha256": "a1"})
    found = status.state_of(run, tmp_path)
    assert (found.state, found.stage) == ("stale", "generate")
    assert found.note == "generate: the run was trained again"
    assert found.measured.to_sample == run.measurements


def test_trained_run_waits_for_its_samples(run, tmp_path):
    finish(tmp_path, run)
    made = tmp_path / "measurements" / run.measurements[0].name
    (made / "digits.json").unlink()
    (made / "samples.npz").touch()
    assert status.state_of(run, tmp_path).stage == "evaluate"
    (made / "samples.npz").unlink()  # dropped
    assert status.state_of(run, tmp_path).stage == "generate"
    (made / "generate.json").unlink()
    found = status.state_of(run, tmp_path)
    assert (found.state, found.stage) == ("waiting", "generate")


def test_other_settings_or_code_are_stale(run, tmp_path):
    finish(tmp_path, run, code="0" * 16)
    assert status.state_of(run, tmp_path).note == "the training code has changed"
    other = run.spec.changed(training={"lr": 0.5}).content()
    finish(tmp_path, run, spec=other)
    assert status.state_of(run, tmp_path).note == "made with other settings"


def test_a_run_that_has_just_diverged_is_not_running(run, tmp_path):
    finish(tmp_path, run, status="diverged", step=3, reason="loss spike")
    write_progress(tmp_path, step=3)
    assert status.state_of(run, tmp_path, NOW + 1).state == "diverged"


def test_samples_of_other_code_and_metrics_of_another_protocol_are_stale(run, study, tmp_path):
    finish(tmp_path, run)
    (one,) = run.measurements
    path = tmp_path / "measurements" / one.name / "digits.json"

    def note(**facts) -> str:
        write_json(path, {"status": "done", **facts})
        return status.state_of(run, tmp_path, study=study).note

    code = digest.generation(run.spec, one.cell.sampler)
    assert note(generation_code=code) == ""
    assert note(generation_code="0" * 16) == "generate: its code has changed"
    assert note(generation_code=code, code="0" * 16) == "evaluate: its code has changed"
    asked = {"extractor": "digits", "metrics": ["fd", "kid", "is", "prc"]}
    assert note(generation_code=code, protocol=asked) == ""
    fewer = {**asked, "metrics": ["fd"]}
    assert note(generation_code=code, protocol=fewer) == "evaluate: other metrics are wanted"


def test_a_run_waits_for_its_probes(run, study, tmp_path):
    finish(tmp_path, run)
    probing = study.model_copy(update={"probes": (Robustness(),)})
    found = status.state_of(run, tmp_path, study=probing)
    assert (found.state, found.stage, found.note) == ("waiting", "probe", "robustness")
    path = tmp_path / "probes/robustness.json"
    options = probing.probes[0].model_dump(mode="json") | {"seeds": [0], "batch": 3}
    write_json(path, {"options": options, "code": digest.probe("robustness", [run.spec])})
    assert status.state_of(run, tmp_path, study=probing).state == "done"
    write_json(path, {"options": options | {"samples": 3}})
    found = status.state_of(run, tmp_path, study=probing)
    assert (found.state, found.note) == ("stale", "robustness: made with other options")
    write_json(path, {"options": options, "code": "0" * 16})
    assert status.state_of(run, tmp_path, study=probing).note == "robustness: its code has changed"
    elsewhere = Cost(seeds=(7,))
    probing = study.model_copy(update={"probes": (elsewhere,)})
    assert status.state_of(run, tmp_path, study=probing).state == "done"


def test_run_from_before_an_option_existed_is_not_stale(run, tmp_path):
    training = {k: v for k, v in run.spec.content()["training"].items() if k != "attention"}
    finish(tmp_path, run, spec={**run.spec.content(), "training": training})
    assert status.state_of(run, tmp_path).state == "done"


def test_broken_file_is_not_a_result(run, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/status.json").write_text('{"status": "do')
    assert status.state_of(run, tmp_path).state == "missing"


def test_defaults_left_out_of_a_spec_come_back(run):
    assert Spec.read(run.spec.chosen) == run.spec
    assert Spec.read(run.spec.content()) == run.spec


# --- plan ------------------------------------------------------------------------------------


def test_plan_counts_what_training_builds(study, tmp_path):
    from study.backbones import build

    rows = plan.plan(study, tmp_path)
    assert len(rows) == 2
    for row in rows:
        spec = row.run.spec
        network = build(spec.backbone, spec.skip_scaling, resolution=8, channels=1)
        assert row.network.parameters == sum(p.numel() for p in network.parameters())
        assert row.images_seen == 80
        assert row.why == "missing"
        assert row.left > 0
        # EMA and raw weights, checkpoint with two moments, and the samples.
        assert row.disk == 24 * row.network.parameters + 1797 * 64
    assert rows[0].network.parameters < rows[1].network.parameters  # the learned gates


def test_probes_cost_time_until_they_are_made(study, tmp_path):
    probing = study.model_copy(update={"probes": (Robustness(),)})
    before = plan.plan(probing, tmp_path, counting=False)[0]
    assert before.seconds["probe"] == plan.STARTING + plan.PROBE
    folder = tmp_path / study.study / "runs"
    options = probing.probes[0].model_dump(mode="json") | {"batch": 3}  # speed alone
    path = folder / before.run.name / "probes/robustness.json"
    write_json(path, {"seconds": 2.0, "options": options})
    first, other = plan.plan(probing, tmp_path, counting=False)
    assert "probe" not in first.seconds
    assert other.seconds["probe"] == plan.STARTING + 2.0
    # A probe with other options is no measurement of this one.
    write_json(path, {"seconds": 2.0, "options": options | {"samples": 3}})
    _, other = plan.plan(probing, tmp_path, counting=False)
    assert other.seconds["probe"] == plan.STARTING + plan.PROBE


def test_short_trainings_cost_their_steps(study, tmp_path):
    frontier = StabilityFrontier(lr=(0.1, 1.0), steps=50)
    law = ScalingLaws()
    probing = study.model_copy(update={"probes": (frontier, law)})
    rows = plan.plan(probing, tmp_path, counting=True)
    for row in rows:
        seconds = (row.seconds["train"] - plan.STARTING) * 100 / row.steps
        assert row.seconds["probe"] == pytest.approx(plan.STARTING + seconds)
    text = " ".join(plan.summary(probing, rows))
    assert "of it probes of runs" in text
    assert text.count("not counted: scaling_laws") == 1


def test_shipped_counts_are_of_todays_networks(monkeypatch, tmp_path):
    """Fails after a change of a backbone or a shipped study: ``make networks``."""
    monkeypatch.setattr(plan, "count", lambda *arguments: pytest.fail("make networks"))
    root = digest.PACKAGE.parent
    for path in (root / "config.yaml", root / "workflow/studies/smoke.yaml"):
        networks = plan.Networks(tmp_path, True)
        for run in arms.runs(load(path)).values():
            assert networks(run.spec) is not None


def test_counts_are_kept_and_need_no_torch_again(tmp_path):
    config = tmp_path / "config.yaml"
    own = base()
    own["backbones"]["uvit"]["options"] = {"embed_dim": 24}  # not among the shipped counts
    config.write_text(yaml.safe_dump(own))
    program = (
        "import sys; from study.ledger.plan import show; show(sys.argv[1], results=sys.argv[2]);"
        "print('torch' in sys.modules)"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program, str(config), str(tmp_path / "results")],
            capture_output=True,
            text=True,
            check=True,
            cwd=digest.PACKAGE.parent,
        ).stdout
        for _ in range(2)
    ]
    assert said[0].splitlines()[-1] == "True"
    assert said[1].splitlines()[-1] == "False"
    assert said[0].splitlines()[:-1] == said[1].splitlines()[:-1]
    assert "tiny: 2 runs of 2 arms, 2 of them to do, with 2 measurements" in said[0]
    assert "20 steps" in said[0]


def test_times_come_from_finished_runs_of_the_same_backbone(study, tmp_path):
    first = next(iter(arms.runs(study).values()))
    finish(tmp_path / "tiny/runs" / first.name, first)
    rows = plan.plan(study, tmp_path)
    assert (rows[0].why, rows[0].left) == ("", 0.0)
    assert rows[1].source == "measured here"
    assert rows[1].seconds["train"] == pytest.approx(40.0 + plan.STARTING)
    assert rows[1].seconds["generate"] == pytest.approx(1797 * 5 / 10 + plan.STARTING)


def test_half_trained_run_costs_its_rest(study, tmp_path):
    for run in arms.runs(study).values():
        finish(tmp_path / "other/runs" / run.name, run)
    first = next(iter(arms.runs(study).values()))
    write_progress(tmp_path / "tiny/runs" / first.name, step=4, steps=10)
    row = plan.plan(study, tmp_path)[0]
    assert row.state.state == "stopped"
    assert row.seconds["train"] == pytest.approx(40.0 * 0.6 + plan.STARTING)


def test_large_studies_are_not_counted_unasked(study, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "COUNTED", tmp_path / "none.json")
    monkeypatch.setattr(plan, "COUNT_UP_TO", 1)
    monkeypatch.setattr(plan, "count", lambda *arguments: pytest.fail("counted"))
    rows = plan.plan(study, tmp_path)
    assert all(row.network is None and row.left is None for row in rows)
    assert any("not counted" in line for line in plan.summary(study, rows, 2))


def test_jobs_are_packed_longest_first():
    assert plan.packed([4, 3, 3, 2], 2) == 6
    assert plan.packed([5], 3) == 5
    assert plan.packed([], 2) == 0


def test_one_name_for_two_data_sets_is_one_line(study, tmp_path):
    checks.check_shared(study, tmp_path)
    other = base() | {"study": "other"}
    progress.remember(tmp_path / "other/study.json", arms.manifest(load(other), {}))
    checks.check_shared(study, tmp_path)
    other["dataset"] = {**other["dataset"], "max_images": 10}
    progress.remember(tmp_path / "other/study.json", arms.manifest(load(other), {}))
    with pytest.raises(UserError, match=r"dataset\.name: 'digits' .* max_images: 10 instead of"):
        checks.check_shared(study, tmp_path)


def test_an_average_that_has_not_begun_is_told(tmp_path, capsys):
    content = base()
    content["training"] |= {"steps": 400, "ema": {"rate": 0.9999}}
    told = "the average still holds 96 % of the initial weights"
    config = tmp_path / "config.yaml"

    def say() -> list[str]:
        config.write_text(yaml.safe_dump(content))
        plan.show(config, results=tmp_path)
        status.show(config, results=tmp_path)
        return [line for line in capsys.readouterr().out.splitlines() if told in line]

    planned, *states = say()
    assert planned.startswith(f"uvit · none · dsm and 1 more arms: {told}")
    assert len(states) == 2
    content |= measured(weights="raw")
    assert say() == []
    content |= measured(weights="ema")
    del content["training"]["ema"]
    assert say() == []


# --- progress --------------------------------------------------------------------------------


def job(folder: Path, rule: str, number: int, **options) -> progress.Job:
    log, output = folder / f"{rule}{number}.log", folder / f"{rule}{number}.out"
    options = {"kind": "uvit", "seconds": 10.0} | options
    work = folder / f"runs/run{number}/state"
    return progress.Job(rule, work, str(output), str(log), **options)


def touch(path: str, when: float) -> None:
    Path(path).write_text("x")
    os.utime(path, (when, when))


def test_progress_counts_fresh_outputs_only(tmp_path):
    jobs = [job(tmp_path, "train", number) for number in range(3)]
    touch(jobs[0].output, NOW - 100)  # from before: this job runs again
    watched = progress.Progress(tmp_path, jobs, {"train": 5}, 1, NOW)
    watched.look(NOW + 1)
    assert "train 2/5 (" in watched.line(NOW + 1)
    touch(jobs[0].log, NOW + 1)
    touch(jobs[0].output, NOW + 9)
    watched.look(NOW + 10)
    assert "train 3/5 (" in watched.line(NOW + 10)
    for one in jobs[1:]:
        touch(one.output, NOW + 20)
    watched.look(NOW + 20)
    assert watched.line(NOW + 20) == "train 5/5 | 100 % | 0:20 elapsed"


def test_progress_learns_from_finished_jobs_of_the_same_kind(tmp_path):
    jobs = [job(tmp_path, "train", number) for number in range(4)]
    jobs += [job(tmp_path, "train", 9, kind="udit", seconds=20.0)]
    watched = progress.Progress(tmp_path, jobs, {"train": 5}, 2, NOW)
    assert watched.left(NOW)[1] == pytest.approx((4 * 10 + 20) / 2)
    touch(jobs[0].log, NOW)
    watched.look(NOW)
    touch(jobs[0].output, NOW + 99)
    watched.look(NOW + 99)
    # 100 s with the overhead instead of 10: the three others too, and udit's double that.
    groups, whole, share = watched.left(NOW + 99)
    assert groups["train"] == whole == pytest.approx((3 * 100 + 200) / 2)
    assert share == pytest.approx(100 / 600)


def test_one_stage_teaches_others_the_speed_of_the_machine_only(tmp_path):
    jobs = [job(tmp_path, "train", 0, seconds=0.1), job(tmp_path, "evaluate", 0, seconds=6.0)]
    watched = progress.Progress(tmp_path, jobs, {"train": 1, "evaluate": 1}, 1, NOW)
    touch(jobs[0].log, NOW)
    watched.look(NOW)
    touch(jobs[0].output, NOW + 99)
    watched.look(NOW + 99)
    assert watched.left(NOW + 99)[1] == pytest.approx(12.0)


def test_progress_follows_a_running_training(tmp_path):
    one = job(tmp_path, "train", 1)
    watched = progress.Progress(tmp_path, [one], {"train": 1}, 1, NOW)
    touch(one.log, NOW)
    watched.look(NOW)
    write_progress(tmp_path / "runs/run1", step=4, steps=10, seconds=40.0, time=NOW + 40)
    assert watched.left(NOW + 40)[1] == pytest.approx(60.0)
    assert watched.left(NOW + 50)[1] == pytest.approx(50.0)
    assert watched.line(NOW + 40).endswith("| 0:40 elapsed, about 1:00 left")


def test_progress_line_is_one_write(tmp_path):
    class Stream(io.StringIO):
        writes = 0

        def write(self, text):
            self.writes += 1
            return super().write(text)

    stream = Stream()
    jobs = [job(tmp_path, "train", 0), job(tmp_path, "generate", 0)]
    watched = progress.Progress(tmp_path, jobs, {"train": 1, "generate": 1}, 1, NOW)
    progress._Watcher(watched, stream).say(NOW + 65)
    assert stream.writes == 1
    line = stream.getvalue()
    pattern = r"study: train 0/1 \(0:10 left\) · generate 0/1 \(0:10 left\) \| 0 % \| 1:05 elapsed"
    assert re.fullmatch(pattern + r", about 0:20 left\n", line)


def test_thread_ends_with_the_study(tmp_path, capsys):
    stop_file = tmp_path / ".stop"
    progress.request_stop(stop_file)
    one = job(tmp_path, "train", 0)
    progress.start(tmp_path, [one], {"train": 1}, 1, stop_file)
    assert not stop_file.exists()
    touch(one.output, 4e9)
    progress.stop()
    assert "train 1/1 | 100 %" in capsys.readouterr().err
    assert not progress._watchers


def test_line_of_a_cluster_says_what_is_known_and_guesses_nothing(tmp_path):
    jobs = [job(tmp_path, "train", number) for number in range(4)]
    watched = progress.Progress(tmp_path, jobs, {"train": 5, "evaluate": 5}, None, NOW)
    assert watched.line(NOW) == "train 1/5 · evaluate 5/5 | 0:00 elapsed"
    for one in jobs[:3]:
        one.submit(NOW)
    touch(jobs[0].log, NOW + 5)
    touch(jobs[1].log, NOW + 5)
    touch(jobs[1].output, NOW + 9)
    watched.look(NOW + 10)
    assert watched.line(NOW + 10) == "train 2/5 (1 running, 1 queued) · evaluate 5/5 | 0:10 elapsed"
    # A job that is handed over again waits again: its log is that of the attempt before.
    jobs[0].submit(NOW + 20)
    watched.look(NOW + 21)
    assert "(2 queued)" in watched.line(NOW + 21)
    touch(jobs[0].log, NOW + 30)
    watched.look(NOW + 31)
    assert "(1 running, 1 queued)" in watched.line(NOW + 31)


def test_a_job_that_an_orphan_ends_first_is_made_again(tmp_path):
    """A job of a killed workflow writes its outputs before the new one hands the job over."""
    one = job(tmp_path, "train", 0)
    watched = progress.Progress(tmp_path, [one], {"train": 1}, 1, NOW)
    touch(one.output, NOW + 1)
    watched.look(NOW + 2)
    assert "train 1/1" in watched.line(NOW + 2)
    one.submit(NOW + 3)
    watched.look(NOW + 4)
    assert "train 0/1" in watched.line(NOW + 4)
    touch(one.output, NOW + 9)
    watched.look(NOW + 10)
    assert "train 1/1" in watched.line(NOW + 10)


def test_work_that_a_run_has_kept(tmp_path):
    work = tmp_path / "state"
    assert progress.kept(work) == 0
    work.mkdir()
    touch(str(work / "checkpoint.pt"), NOW)
    first = progress.kept(work)
    assert first > 0
    write_progress(tmp_path)  # a step that no checkpoint holds
    touch(str(work / "lock"), NOW + 1)
    assert progress.kept(work) == first
    touch(str(work / "00000000.npz"), NOW + 2)
    assert progress.kept(work) > first


def test_manifest_is_written_only_when_it_changes(tmp_path):
    path = tmp_path / "study.json"
    progress.remember(path, {"a": [1]})
    os.utime(path, (NOW, NOW))
    progress.remember(path, {"a": [1]})
    assert path.stat().st_mtime == NOW
    progress.remember(path, {"a": [2]})
    assert path.stat().st_mtime != NOW


def test_failure_names_the_log_and_its_last_lines(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text("a\nb\nc\n\nstudy: no space left\n")
    progress.explain_failure(tmp_path, tmp_path / ".stop", [str(log)])
    said = capsys.readouterr().err
    assert f"study: failed, see {log}" in said
    assert "study:   study: no space left" in said
    assert "goes on" in said


def test_failure_without_a_word_shows_what_the_cluster_says(tmp_path, capsys):
    log, cluster = tmp_path / "train.log", tmp_path / "7.log"
    cluster.write_text("slurmstepd: error: Detected 1 oom_kill event\n")
    told = ("job 7 failed, status OUT_OF_MEMORY", [str(cluster)])
    for begun, text in ((False, ""), (False, "of an earlier attempt"), (True, "")):
        log.write_text(text)
        failure = progress.Failure(str(log), begun, *told)
        progress.explain_failure(tmp_path, tmp_path / ".stop", [failure])
        said = capsys.readouterr().err
        assert (f"failed; {log} is empty" if begun else f"failed before it began {log}") in said
        assert "earlier" not in said
        assert "study:   job 7 failed, status OUT_OF_MEMORY" in said
        assert f"see {cluster}" in said
        assert "study:   slurmstepd: error: Detected 1 oom_kill event" in said
    log.write_text("study: no space left\n")
    progress.explain_failure(
        tmp_path, tmp_path / ".stop", [progress.Failure(str(log), True, *told)]
    )
    said = capsys.readouterr().err
    assert f"see {log}" in said
    assert "study:   study: no space left" in said
    assert f"see also {cluster}" in said
    assert "oom_kill" not in said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (65.4, "1:05"), (3599.9, "1:00:00"), (7384, "2:03:04"), (187200, "2 d 4 h")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_status_and_plan_say_what_checkpoints_take(study, tmp_path):
    assert status.checkpoints(study, tmp_path) == ""
    for name in ("checkpoint.pt", "checkpoint.1.pt"):
        path = tmp_path / study.study / "runs/a/state" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1_500_000))
    said = status.checkpoints(study, tmp_path)
    assert said.startswith(
        f"2 checkpoints take 3.0 MB under {tmp_path}/{study.study}/runs/*/state;"
    )
    rows = plan.plan(study, tmp_path, counting=True)
    parameters = sum(row.network.parameters for row in rows)
    said = plan.summary(study, rows)
    assert any(f", checkpoints {16 * parameters / 1e6:.3g} MB of it" in line for line in said)
