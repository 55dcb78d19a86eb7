# What the rules share: the study, its runs, paths, parameters; and what happens at start and end.
import hashlib
import json
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from snakemake.settings.types import RerunTrigger
from snakemake.utils import update_config
from snakemake_interface_executor_plugins.settings import DeploymentMethod, SharedFSUsage

from study import arms
from study.ledger import checks, contents, digest, plan, progress
from study.files import canonical_json, writable, write_text
from study.spec.run import RUN_PATTERN
from study.spec.run import digest as run_digest


def archive_of(dataset):
    return f"results/datasets/{dataset.name}.zip"


try:
    # --config key=value: inside of a value Snakemake reads numbers as text.
    for text in workflow.config_settings.config_args or ():
        update_config(config, declarations.override(text))
    STUDY = declarations.load(config)
    RUNS = arms.runs(STUDY)
    # Samples are measured against the data set itself, or against other images.
    MEASURED = STUDY.evaluation.reference or STUDY.dataset
    ARCHIVE, MEASURED_ARCHIVE = archive_of(STUDY.dataset), archive_of(MEASURED)
    NOTEBOOKS = os.path.relpath(Path(workflow.basedir, "notebooks"))
    # What lies where the study says: looked at by the Snakemake that decides what has to run, not
    # by those that executors start for single jobs.
    SOURCES, HASHES = {}, contents.Hashes(f"results/{STUDY.study}/.contents.json")
    if workflow.is_main_process:
        for dataset in {archive_of(one): one for one in (MEASURED, STUDY.dataset)}.values():
            contents.check_archive(archive_of(dataset))
            SOURCES[archive_of(dataset)] = contents.source(dataset.path, archive_of(dataset))
        for line in checks.check(STUDY, RUNS, notebooks=NOTEBOOKS, sources=SOURCES):
            print(f"study: {line}", file=sys.stderr)
except UserError as error:
    stop_with(error)

# Jobs are started with names of files in the locale's encoding; on disk these are UTF-8, mostly.
if sys.getfilesystemencoding() != "utf-8":
    decoder, measured = STUDY.generation.decoder, STUDY.evaluation.reference
    for path in filter(
        None,
        [
            STUDY.dataset.path,
            STUDY.evaluation.weights,
            measured and measured.path,
            decoder and decoder.weights,
            *(run.checkpoint for run in RUNS.values()),
        ],
    ):
        if not path.isascii():
            stop_with(
                f"{path}: cannot be named safely in this locale ({sys.getfilesystemencoding()}); "
                "set PYTHONUTF8=1 in the environment and start again"
            )

# --- paths ---------------------------------------------------------------------------------------

RESULTS = f"results/{STUDY.study}"
RUN = f"{RESULTS}/runs/{{run}}"
MANIFEST = f"{RESULTS}/study.json"
REPORT = f"reports/{STUDY.study}/index.html"
DESCRIBED, MEASURED_DESCRIBED = map(contents.described, (ARCHIVE, MEASURED_ARCHIVE))
CLASSIFIER = f"results/datasets/{STUDY.dataset.name}.classifier.safetensors"
# A classifier of other images than those to measure against makes a reference of its own.
OF_OTHERS = STUDY.evaluation.extractor == "digits" and MEASURED_ARCHIVE != ARCHIVE
REFERENCE = f"results/datasets/{MEASURED.name}." + (
    f"{STUDY.dataset.name}-digits" if OF_OTHERS else STUDY.evaluation.extractor
)
TABLES = f"{RESULTS}/tables"
FIGURES = f"{RESULTS}/figures"
STOP_FILE = "results/.stop"

FOLDERS = [RESULTS, f"{RESULTS}/runs", os.path.dirname(ARCHIVE), os.path.dirname(REPORT)]

for path in sorted({path for name in FOLDERS for path in (Path(name), *Path(name).parents)}):
    if os.path.lexists(path) and not path.is_dir():
        stop_with(f"{path}: results go to a folder of this name, and this is none; move it away")

# Features come from the classifier that the study trains, from a given file, or from the
# extractor's own download.
EXTRACTOR_WEIGHTS = [CLASSIFIER] if STUDY.evaluation.extractor == "digits" else []
GIVEN_WEIGHTS = "" if EXTRACTOR_WEIGHTS else STUDY.evaluation.weights or ""


wildcard_constraints:
    run=RUN_PATTERN,
    notebook=r"[A-Za-z0-9_.-]+",


# --- parameters: what a job's result depends on, and nothing else ----------------------------------


def as_parameter(section, exclude):
    """A section of the study without defaults, so that a new option of the code reruns nothing."""
    return canonical_json(section.model_dump(mode="json", exclude=exclude, exclude_defaults=True))


DATASET = as_parameter(STUDY.dataset, exclude=arms.NOT_SETTINGS)
GENERATION = canonical_json(STUDY.generation.protocol())
EVALUATION = canonical_json(STUDY.evaluation.protocol())
NOTEBOOK = canonical_json({"tables": TABLES, "results": RESULTS, "figures": FIGURES})
# Of the study as a whole only the tables and the report depend: names, order, notes; not on where
# things lie and how fast they are made.
SHOWN = run_digest(
    [
        STUDY.model_dump(
            mode="json",
            exclude={
                "machine": True,
                "dataset": {"path", "on_error"},
                "generation": {"batch": True, "decoder": {"weights"}},
                "evaluation": {"weights": True, "reference": {"path", "on_error"}},
                "arms": {"__all__": {"checkpoint": {"path"}}},
            },
        ),
        [run.row() for run in RUNS.values()],
    ]
)


# The networks of all arms, in a fixed order: what a probe of the study depends on.
NETWORKS = arms.networks(RUNS)
SPECS = [run.spec for run in RUNS.values()]


def training_spec(wildcards):
    return RUNS[wildcards.run].spec.key


def training_code(wildcards):
    return digest.training(RUNS[wildcards.run].spec)


def checkpoint_path(wildcards):
    """Where the weights of a run lie that are imported: a resource, for a moved file changes nothing."""
    return RUNS[wildcards.run].checkpoint or ""


# Where a user's file lies is a resource; what it holds is a parameter.


def held(role, path):
    """What a user's file holds; nothing where there is none."""
    return HASHES(role, path) if path and workflow.is_main_process else ""


def checkpoint_held(wildcards):
    """What is imported, unless the settings tell it."""
    run = RUNS[wildcards.run]
    told = run.spec.checkpoint is not None and run.spec.checkpoint.sha256
    return "" if told else held(f"checkpoint of {run.name}", run.checkpoint)


DECODER = STUDY.generation.decoder.weights if STUDY.generation.decoder else ""
DECODER_HELD = held("generation.decoder.weights", DECODER)
WEIGHTS_HELD = held("evaluation.weights", GIVEN_WEIGHTS)


# Times of large files say nothing: copied or touched they are the same. Jobs wait for the small file
# beside each, which says what is in it, and for the large one only where it says something else.


def large(path, record, key):
    """A large input, which Snakemake looks at only if it is not what its `record` says."""

    def look(wildcards):
        place, written = (str(name).format(**dict(wildcards)) for name in (path, record))
        if workflow.is_main_process and not contents.settled(place, written, key, HASHES):
            return place
        return ancient(place)

    return look


AVERAGED = large(f"{RUN}/train/weights.safetensors", f"{RUN}/train/status.json", "weights_sha256")
RAW = large(f"{RUN}/train/raw.safetensors", f"{RUN}/train/status.json", "raw_sha256")
SAMPLES = large(f"{RUN}/generate/samples.npz", f"{RUN}/generate/generate.json", "samples_sha256")
FEATURES = large(
    f"{REFERENCE}/features.safetensors", f"{REFERENCE}/reference.json", "features_sha256"
)


def conversion_code(dataset):
    """The converting code; of an archive whose source is gone, the code that made it."""
    return contents.code(dataset.path, archive_of(dataset), digest.conversion(dataset.source))


def generation_code(wildcards):
    return digest.generation(RUNS[wildcards.run].spec, STUDY.generation.sampler)


def probe_code(kind, wildcards):
    return digest.probe(kind, [RUNS[wildcards.run].spec])


def notebook_code(wildcards):
    return digest.notebook(f"{NOTEBOOKS}/{wildcards.notebook}.ipynb")


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
USES_CONDA = (
    workflow.deployment_settings is not None
    and DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
)
# And they use the package beside this Snakefile, also where they run in another folder.
if not os.path.samefile(workflow.basedir, Path.cwd()):
    if USES_CONDA:
        stop_with(
            f"--use-conda: jobs find the package in the folder that they run in; run snakemake in "
            f"{workflow.basedir}, without --directory"
        )
    os.environ.update(
        PYTHONPATH=os.pathsep.join(
            [str(workflow.basedir), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        PYTHONSAFEPATH="1",
    )

# Here, no more GPU jobs at a time than there are slots. (workflow.nodes is None exactly where jobs
# run on this machine; --resources gpu=N has the last word.)
if GPUS and workflow.nodes is None and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", GPUS * STUDY.machine.jobs_per_gpu)

if USES_CONDA and shutil.which("conda") is None:
    others = [name for name in ("mamba", "micromamba") if shutil.which(name)]
    stop_with(
        "--use-conda needs a conda executable and "
        + (
            f"PATH has only {others[0]}, which Snakemake does not call; "
            if others
            else "none is on PATH; "
        )
        + "install Miniforge, or leave the flag out to use this environment"
    )

# --- jobs that run elsewhere -----------------------------------------------------------------------


class SharedFolder(type(workflow.storage_settings)):
    """Storage settings that refuse jobs which would not see this folder.

    What such an executor implies, Snakemake sets when it has read this file.
    """

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self.refuse_others()

    def refuse_others(self):
        needed = {SharedFSUsage.INPUT_OUTPUT, SharedFSUsage.PERSISTENCE, SharedFSUsage.SOURCES}
        apart = workflow.nodes is not None and not needed <= set(self.shared_fs_usage)
        if apart or self.default_storage_provider is not None:
            stop_with(
                "every job must see this folder, where code, checkpoints and results are kept: use "
                "an executor with a shared file system (such as slurm), and neither "
                "--shared-fs-usage nor --default-storage-provider"
            )


if workflow.is_main_process:
    workflow.storage_settings.__class__ = SharedFolder
    workflow.storage_settings.refuse_others()

# --- the same command goes on after any kind of end ------------------------------------------------


include: "running.smk"


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
            # Up to this size Snakemake sees by itself that a file which was touched is the same.
            if settings.max_checksum_file_size == type(settings).max_checksum_file_size:
                settings.max_checksum_file_size = 64 * 2**20
            # Code is told apart by digests in the parameters, so that a new layout of a rule or of
            # an environment file trains nothing again. An explicit --rerun-triggers is respected.
            if settings.rerun_triggers == RerunTrigger.all():
                settings.rerun_triggers = frozenset(
                    {RerunTrigger.MTIME, RerunTrigger.PARAMS, RerunTrigger.INPUT}
                )
        vars(self)["dag_settings"] = settings

    def execute(self, *arguments, **options):
        dry = options["executor_plugin"].common_settings.dryrun_exec
        if self.is_main_process and self.execution_settings.lock and not dry:
            self.running = Running()
            self.running.begin()
        super().execute(*arguments, **options)
        if dry and self.is_main_process:
            for problem in checks.missing_files(STUDY, RUNS):
                stop_with(problem)

    def _prepare_dag(self, *arguments, **options):
        super()._prepare_dag(*arguments, **options)
        if "running" in vars(self) and hasattr(self.persistence, "_lockfile"):
            self.running.guard(self.persistence)

    def unlock(self):
        for path, record in Running().others().items():
            if owner.lives(record):
                stop_with(
                    f"not unlocked: study {record['study']!r} is being run here (snakemake, "
                    f"{owner.name(record)}); wait until it has ended"
                )
            path.unlink(missing_ok=True)
        super().unlock()


workflow.__class__ = StudyWorkflow


if workflow.is_main_process:
    try:
        writable(".snakemake")
    except UserError as error:
        stop_with(error)

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
    """How many jobs run at a time; None where a cluster's queue decides."""
    if workflow.nodes is not None:
        return None
    if GPUS:
        return workflow.global_resources["gpu"].value
    return max(1, workflow.cores // (STUDY.machine.threads * STUDY.machine.processes))


def hand_to_jobs():
    """Let the Snakemake that an executor starts for a job read the study as it was read here.

    Its file may change while jobs wait, and words of a command line would pass another shell.
    """
    text = json.dumps(config, default=str)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = Path(f".snakemake/studies/{name}.json").absolute()
    write_text(path, text)
    workflow.config_settings.configfiles = [path]
    workflow.config_settings.config_args = []


def missing():
    """What a user's paths should lead to, if a job that is to run needs it and it is not there."""
    needed = {
        "convert": ("dataset.path", STUDY.dataset.path, ARCHIVE),
        "convert_reference": ("evaluation.reference.path", MEASURED.path, MEASURED_ARCHIVE),
        "reference": ("evaluation.weights", GIVEN_WEIGHTS, ""),
        "evaluate": ("evaluation.weights", GIVEN_WEIGHTS, ""),
        "generate": ("generation.decoder.weights", DECODER, ""),
    }
    for job in workflow.dag.needrun_jobs():
        where, path, kept = needed.get(job.rule.name, ("", "", ""))
        if job.rule.name == "train":
            run = RUNS[job.wildcards.run]
            where, path = f"checkpoint of {run.display}", run.checkpoint
        if path and contents.gone(path):
            yield f"{where}: {path}: no such file or folder" + (
                f"; {kept} stays as it is" if kept and Path(kept).exists() else ""
            )


onstart:
    for problem in filter(None, (run.spec.unsupported for run in RUNS.values())):
        stop_with(problem)
    for problem in dict.fromkeys(missing()):
        stop_with(problem)
    try:
        for folder in FOLDERS:
            writable(folder)
    except UserError as error:
        stop_with(error)
    if workflow.nodes is not None:
        hand_to_jobs()
    progress.remember(MANIFEST, arms.manifest(STUDY, RUNS))
    jobs = {job: expected(job) for job in workflow.dag.needrun_jobs() if job.output}
    take_over(workflow.scheduler, jobs)
    progress.start(
        RESULTS,
        jobs.values(),
        Counter(job.rule.name for job in workflow.dag.jobs if job.output),
        slots(),
        STOP_FILE,
        workflow.scheduler.tend,
    )


onsuccess:
    progress.stop()
    if any(job.rule.name == "report" for job in workflow.dag.jobs):
        print(f"Report: {REPORT}", file=sys.stderr)


onerror:
    progress.stop()
    progress.explain_failure(RESULTS, STOP_FILE, workflow.scheduler.failures())
