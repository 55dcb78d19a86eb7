# What the rules share: the study, its runs, paths, parameters; and what happens at start and end.
import fcntl
import os
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(workflow.basedir))

from snakemake.settings.types import RerunTrigger
from snakemake_interface_executor_plugins.settings import DeploymentMethod

from study import arms, digest, plan, progress
from study import config as declarations
from study.files import UserError, canonical_json


def stop_with(message):
    """End at once, one line per mistake; of an exception Snakemake would print the stack too."""
    for line in str(message).splitlines():
        print(f"study: {line}", file=sys.stderr)
    sys.exit(2)


try:
    # Snakemake has read these files already, but passes over keys that are given twice.
    for path in map(Path, workflow.configfiles if workflow.is_main_process else ()):
        inside = path.is_relative_to(Path.cwd())
        declarations.read(path.relative_to(Path.cwd()) if inside else path)
    STUDY = declarations.load(config)
    RUNS = arms.runs(STUDY)
    REMARKS = plan.check(STUDY, RUNS)
    MISSING = plan.missing_files(STUDY, RUNS)
except UserError as error:
    stop_with(error)

if workflow.is_main_process:
    for line in (*REMARKS, *MISSING):
        print(f"study: {line}", file=sys.stderr)
    if STUDY.evaluation.weights and any("evaluation.weights" in line for line in MISSING):
        sys.exit(2)  # an input of rules, of which Snakemake would say less

# --- paths ---------------------------------------------------------------------------------------

RESULTS = f"results/{STUDY.study}"
RUN = f"{RESULTS}/runs/{{run}}"
MANIFEST = f"{RESULTS}/study.json"
REPORT = f"reports/{STUDY.study}/index.html"
ARCHIVE = f"results/datasets/{STUDY.dataset.name}.zip"
CLASSIFIER = f"results/datasets/{STUDY.dataset.name}.classifier.safetensors"
# Samples are measured against the data set itself, or against other images.
MEASURED = STUDY.evaluation.reference or STUDY.dataset
MEASURED_ARCHIVE = f"results/datasets/{MEASURED.name}.zip"
REFERENCE = f"results/datasets/{MEASURED.name}.{STUDY.evaluation.extractor}"
TABLES = f"{RESULTS}/tables"
FIGURES = f"{RESULTS}/figures"
STOP_FILE = "results/.stop"

# Features come from the classifier that the study trains, from a given file, or from the
# extractor's own download.
if STUDY.evaluation.extractor == "digits":
    EXTRACTOR_WEIGHTS = [CLASSIFIER]
else:
    EXTRACTOR_WEIGHTS = [STUDY.evaluation.weights] if STUDY.evaluation.weights else []


wildcard_constraints:
    run=arms.RUN_PATTERN,
    notebook=r"[A-Za-z0-9_.-]+",


# --- parameters: what a job's result depends on, and nothing else ----------------------------------


def as_parameter(section, exclude):
    """A section of the study without defaults, so that a new option of the code reruns nothing."""
    return canonical_json(section.model_dump(mode="json", exclude=exclude, exclude_defaults=True))


DATASET = as_parameter(STUDY.dataset, exclude=arms.NOT_SETTINGS)
GENERATION = canonical_json(STUDY.generation.protocol())
EVALUATION = canonical_json(STUDY.evaluation.protocol())
NOTEBOOK = canonical_json({"tables": TABLES, "results": RESULTS, "figures": FIGURES})
# Of the study as a whole only the tables and the report depend: names, order, notes.
SHOWN = arms.digest(
    [STUDY.model_dump(mode="json", exclude={"machine"}), [run.row() for run in RUNS.values()]]
)


# The networks of all arms, in a fixed order: what a probe of the study depends on.
NETWORKS = arms.networks(RUNS)


def training_spec(wildcards):
    return canonical_json(arms.canonical(RUNS[wildcards.run].spec))


def training_code(wildcards):
    return digest.training(RUNS[wildcards.run].spec)


def checkpoint_path(wildcards):
    """Where the weights of a run lie that are imported: a resource, for a moved file changes nothing."""
    return RUNS[wildcards.run].checkpoint or ""


def generation_code(wildcards):
    return digest.generation(RUNS[wildcards.run].spec, STUDY.generation.sampler.kind)


def probe_code(kind, wildcards):
    return digest.probe(kind, [RUNS[wildcards.run].spec])


def notebook_code(wildcards):
    return digest.notebook(f"notebooks/{wildcards.notebook}.ipynb")


def labels(wildcards):
    """Where a run stands on the axes of the study, for Snakemake's report."""
    axes = RUNS[wildcards.run].axes
    return {name.replace("_", " "): text for name, text in axes.items() if text}


# --- this machine ----------------------------------------------------------------------------------

GPUS = STUDY.machine.gpus
# Keys that change the speed of a job and not its result. They are no parameters but resources: a
# new value of a resource reruns nothing.
SPEED = canonical_json(
    STUDY.machine.model_dump(
        mode="json", exclude={"gpus", "jobs_per_gpu", "threads"}, exclude_defaults=True
    )
)

# Jobs use this environment's Python, whether or not it was activated.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
    LONGSKIP_JOBS_PER_GPU=str(STUDY.machine.jobs_per_gpu),
)

# Here, no more GPU jobs at a time than there are slots. (workflow.nodes is None exactly where jobs
# run on this machine; --resources gpu=N has the last word.)
if GPUS and workflow.nodes is None and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", GPUS * STUDY.machine.jobs_per_gpu)

if (
    workflow.deployment_settings is not None
    and DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    and shutil.which("conda") is None
):
    stop_with(
        "--use-conda needs a conda executable and none is on PATH; "
        "install Miniforge, or leave the flag out to use this environment"
    )

# --- the same command goes on after any kind of end ------------------------------------------------


class StudyWorkflow(type(workflow)):
    """The workflow with this study's rules for what has to run.

    Snakemake hands over the settings of the DAG when it has read this file, and it loads no
    profile from workflow/profiles by itself; so they are put right as they come in.
    """

    @property
    def dag_settings(self):
        return vars(self).get("dag_settings")

    @dag_settings.setter
    def dag_settings(self, settings):
        if settings is not None:
            # What a killed job left half-done is made again (training: from its last checkpoint).
            settings.force_incomplete = True
            # Code is told apart by digests in the parameters, so that a new layout of a rule or of
            # an environment file trains nothing again. An explicit --rerun-triggers is respected.
            if settings.rerun_triggers == RerunTrigger.all():
                settings.rerun_triggers = frozenset(
                    {RerunTrigger.MTIME, RerunTrigger.PARAMS, RerunTrigger.INPUT}
                )
        vars(self)["dag_settings"] = settings


workflow.__class__ = StudyWorkflow


def remove_stale_locks():
    """Remove the locks of a Snakemake that was killed, if none is alive in this folder.

    Every living one holds this file shared, for as long as it lives; the kernel sees to that.
    """
    folder = Path(".snakemake")
    folder.mkdir(exist_ok=True)
    alive = (folder / "alive").open("a")
    try:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            for lock in folder.glob("locks/*.lock"):
                lock.unlink(missing_ok=True)
        fcntl.flock(alive, fcntl.LOCK_SH)
    except OSError:  # a file system without flock: Snakemake asks for --unlock as usual
        pass
    return alive


if workflow.is_main_process:
    ALIVE = remove_stale_locks()

# --- start and end -----------------------------------------------------------------------------------


def expected(job):
    """A job that is to run, as the progress line wants it."""
    run = RUNS.get(job.wildcards_dict.get("run"))
    return progress.Job(
        job.rule.name,
        run and run.name,
        str(job.output[0]),
        str(job.log[0]),
        run.axes["backbone"] if run else "",
        plan.guess(job.rule.name, STUDY, run),
    )


def slots():
    """How many jobs run at a time."""
    if workflow.nodes is not None:
        return workflow.nodes
    if GPUS:
        return workflow.global_resources["gpu"].value
    return max(1, workflow.cores // (STUDY.machine.threads * STUDY.machine.processes))


onstart:
    for problem in filter(None, (arms.unsupported(run.spec) for run in RUNS.values())):
        stop_with(problem)
    if MISSING:
        stop_with("nothing was started: files are missing, see above")
    progress.remember(MANIFEST, arms.manifest(STUDY, RUNS))
    progress.start(
        RESULTS,
        [expected(job) for job in workflow.dag.needrun_jobs() if job.output],
        Counter(job.rule.name for job in workflow.dag.jobs if job.output),
        slots(),
        STOP_FILE,
    )


onsuccess:
    progress.stop()
    if any(job.rule.name == "report" for job in workflow.dag.jobs):
        print(f"Report: {REPORT}", file=sys.stderr)


onerror:
    progress.stop()
    failed = sorted(getattr(workflow.scheduler, "failed", ()), key=str)
    progress.explain_failure(RESULTS, STOP_FILE, [str(job.log[0]) for job in failed if job.log])
