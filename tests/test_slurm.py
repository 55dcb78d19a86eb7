"""The workflow on a real Slurm, without accounting, by the profile that the README names."""

import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import slurm
import yaml
from conftest import Project, copy_project
from miniature import base

from study.arms import runs
from study.spec.study import load

PLUGIN = (
    "snakemake-executor-plugin-slurm==2.8.0",
    "snakemake-executor-plugin-slurm-jobstep==0.6.1",
)
PROFILE = (
    "--workflow-profile=workflow/profiles/slurm",
    "--slurm-init-seconds-before-status-checks=1",
    "--seconds-between-status-checks=2",
)
# A GPU would compute other bytes than the CPU of the run to compare with.
GPUS = 0 if shutil.which("nvidia-smi") else 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a Slurm that runs one job at a time, with Snakemake's plugin for it."""
    why = slurm.lacking()
    if why:
        pytest.skip(f"no Slurm can be started: {why}")
    folder = tmp_path_factory.mktemp("slurm")
    # Not in the environment of the tests: where it is, every start of Snakemake asks Slurm.
    if find_spec("snakemake_executor_plugin_slurm") is None:
        install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "plugin")]
        done = subprocess.run([sys.executable, *install, *PLUGIN], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {PLUGIN[0]}: {done.stderr.splitlines()[-1]}")
    with slurm.cluster(folder, cpus=1) as environment:
        yield {**environment, "PYTHONPATH": str(folder / "plugin")}


def wait_for(condition, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


class User:
    """Somebody with a study on a cluster, whose Snakemake does not outlive the test."""

    def __init__(self, project: Project, environment: dict[str, str]) -> None:
        self.project, self.environment, self.process = project, environment, None

    def __enter__(self) -> "User":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.project.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *targets: str) -> None:
        self.process = subprocess.Popen(
            [*self.project.command(*targets), *PROFILE],
            env=self.environment,
            cwd=self.project.folder,
            stdout=(self.project.folder / "said").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        return (self.project.folder / "said").read_text()

    def hears(self, text: str) -> None:
        wait_for(lambda: text in self.said or self.process.poll() is not None)
        assert text in self.said, self.said[-4000:]

    def ends(self) -> int:
        return self.process.wait(300)

    def queue(self, what: str = "%i") -> list[str]:
        """Of every job that Slurm still has."""
        return self.run("squeue", "-h", "-o", what).split()

    def pause(self, run: Path) -> str:
        """Halt the training of ``run`` after its next checkpoint; returns its job's number."""
        checkpoint = run / "state" / "checkpoint.pt"
        before = checkpoint.stat().st_mtime if checkpoint.exists() else 0.0
        wait_for(lambda: checkpoint.exists() and checkpoint.stat().st_mtime > before)
        (job,) = self.run("squeue", "-h", "-t", "R", "-o", "%i").split()
        self.run("scontrol", "suspend", job)
        return job


def test_stopped_cancelled_and_orphaned_training_ends_in_the_same_bytes(cluster, tmp_path):
    study = base() | {"machine": {"gpus": GPUS, "save_every": 1e-3}}
    study["training"] |= {"steps": 200}
    here, there = (
        Project(copy_project(tmp_path / name), "tiny.yaml") for name in ("here", "there")
    )
    for project, machine in ((here, {}), (there, study["machine"])):
        text = yaml.safe_dump(study | {"machine": machine})
        (project.folder / project.config).write_text(text)
    with User(there, cluster) as user:
        # A stop: the running training saves and leaves, the other one leaves the queue, nothing
        # else starts, and Snakemake ends.
        user.start("--until", "train")
        run = wait_for(lambda: list(there.results.glob("runs/*/state")))[0].parent
        job = user.pause(run)
        assert len(user.queue()) == 2
        if GPUS:
            assert user.run("scontrol", "show", "job").count("TresPerJob=gres:gpu:1\n") == 2
        user.hears("train 0/2 (1 running, 1 queued) |")
        there.study("stop")
        user.run("scontrol", "resume", job)
        assert user.ends() != 0
        assert "study: stopped as asked; the same command goes on from there" in user.said
        assert user.said.count("has been submitted") == 3, "a job was sent again"
        assert user.queue() == []
        assert not re.search(r"\d left", user.said), "guessed at the queue"

        # Cancelled (a time limit sends the same signal): it goes on, and that is no failure.
        planned = runs(load(there.folder / there.config))[run.name]
        samples = f"measurements/{planned.measurements[0].name}/samples.npz"
        target = str((run / samples).relative_to(there.folder))
        user.start(target)
        user.run("scancel", user.pause(run))
        user.hears(f"study: train of {run.name} was stopped and will go on; not a failure")

        # Orphaned: a job outlives its Snakemake; the next one leaves the run to it until it ends.
        job = user.pause(run)
        user.process.kill()
        user.ends()
        user.start(target)
        user.hears(f"study: train waits: {run.name} still belongs to an earlier job")
        assert user.queue() == [job]
        user.run("scontrol", "resume", job)
        assert user.ends() == 0, user.said[-4000:]
        done = here.snakemake(target, "--cores", "2", "--quiet", "rules")
        assert done.returncode == 0, done.stderr
        alike = here.results / "runs" / run.name
        for name in ("train/weights.safetensors", "train/raw.safetensors", samples):
            assert (run / name).read_bytes() == (alike / name).read_bytes()
