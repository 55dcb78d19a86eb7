# What the rules share: the study, its runs, paths, parameters, and this machine.
import os
import re
import shutil
from functools import partial
from pathlib import Path

from snakemake.utils import update_config
from snakemake_interface_executor_plugins.settings import DeploymentMethod

from study import arms
from study.combinations import section
from study.ledger import checks, contents, digest
from study.files import canonical_json
from study.protocols import KEEPING
from study.spec.measuring import MEASUREMENT_PATTERN
from study.spec.run import RUN_PATTERN
from study.spec.base import digest as run_digest


def archive_of(name):
    return f"results/datasets/{name}.zip"


try:
    # --config key=value: inside of a value Snakemake reads numbers as text.
    for text in workflow.config_settings.config_args or ():
        update_config(config, declarations.override(text))
    STUDY = declarations.load(config)
    # The whole study, and the part of it that this command works on.
    RUNS = arms.runs(STUDY)
    CHOSEN = arms.selected(STUDY, RUNS)
    # By name: what runs are trained on, and other images that their samples are measured against.
    DATA = {one.name: one for dataset in STUDY.data.values() for one in (dataset.measured, dataset)}
    WHERE = {
        one.name: where
        for name, dataset in STUDY.data.items()
        for one, where in (
            (dataset.measured, f"{section(STUDY, name)}.reference"),
            (dataset, section(STUDY, name)),
        )
    }
    NOTEBOOKS = os.path.relpath(Path(workflow.basedir, "notebooks"))
    # What lies where the study says: looked at by the Snakemake that decides what has to run, not
    # by those that executors start for single jobs.
    SOURCES, HASHES = {}, contents.Hashes(f"results/{STUDY.study}/.contents.json")
    if workflow.is_main_process:
        for name, dataset in DATA.items():
            contents.check_archive(archive_of(name))
            SOURCES[archive_of(name)] = contents.source(dataset.path, archive_of(name))
        for line in checks.check(STUDY, RUNS, notebooks=NOTEBOOKS, sources=SOURCES):
            print(f"study: {line}", file=sys.stderr)
except UserError as error:
    stop_with(error)

# Jobs are started with names of files in the locale's encoding; on disk these are UTF-8, mostly.
if sys.getfilesystemencoding() != "utf-8":
    for path in filter(
        None,
        [
            *(dataset.path for dataset in DATA.values()),
            *(dataset.decoder.weights for dataset in STUDY.data.values() if dataset.decoder),
            *(getattr(one, "weights", None) for one in STUDY.extractors.values()),
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
MEASUREMENT = f"{RUN}/measurements/{{measurement}}"
MANIFEST = f"{RESULTS}/study.json"
REPORT = f"reports/{STUDY.study}/index.html"
ARCHIVE = archive_of("{dataset}")
CLASSIFIER = "results/datasets/{dataset}.classifier.safetensors"
REFERENCE = "results/datasets/{reference}"
TABLES = f"{RESULTS}/tables"
FIGURES = f"{RESULTS}/figures"
STOP_FILE = "results/.stop"

FOLDERS = [RESULTS, f"{RESULTS}/runs", "results/datasets", os.path.dirname(REPORT)]

for path in sorted({path for name in FOLDERS for path in (Path(name), *Path(name).parents)}):
    if os.path.lexists(path) and not path.is_dir():
        stop_with(f"{path}: results go to a folder of this name, and this is none; move it away")


def reference_of(dataset, extractor):
    """The name of what samples of runs on a data set are measured against."""
    # A classifier of other images than those to measure against makes a reference of its own.
    of_others = extractor == "digits" and dataset.measured.name != dataset.name
    return f"{dataset.measured.name}." + (f"{dataset.name}-digits" if of_others else extractor)


# By name: the images, the extractor, and the data set whose classifier that is.
REFERENCES = {
    reference_of(dataset, kind): (dataset.measured.name, kind, name)
    for name, dataset in STUDY.data.items()
    for kind in STUDY.extractors
}


def of_reference(wildcards):
    """The images, the extractor, and the data set whose classifier that is."""
    return REFERENCES[wildcards.reference]


# By run and measurement.
PLANNED = {(run.name, one.name): one for run in RUNS.values() for one in run.measurements}


def points_asked(runs):
    """By what numbers stand beside these runs': reference, images; which metrics they are."""
    asked = {}
    for run in runs:
        dataset = STUDY.data[RUNS[run].spec.dataset.name]
        for one in RUNS[run].measurements:
            for kind, metrics in one.extractors.items():
                key = reference_of(dataset, kind), one.cell.images or "all"
                asked[key] = {**asked.get(key, {}), **dict.fromkeys(metrics)}
    return {
        f"{reference}-{images}": ",".join(asked[reference, images]) for reference, images in asked
    }


POINTED = points_asked(CHOSEN)


def extractor_weights(kind, dataset):
    """The classifier that a study trains on a data set, where that is the extractor."""
    return [CLASSIFIER.format(dataset=dataset)] if kind == "digits" else []


def given_weights(kind):
    """Where an extractor's weights lie, if they are not its own download."""
    return getattr(STUDY.extractors[kind], "weights", None) or ""


def maybe_temp(path, dropped):
    """An output that is deleted when nothing waits for it any more, if it is to be dropped."""
    return temp(str(path)) if dropped else path


def any_of(names):
    return "|".join(map(re.escape, sorted(names))) or "-"


wildcard_constraints:
    run=RUN_PATTERN,
    measurement=MEASUREMENT_PATTERN,
    dataset=any_of(DATA),
    reference=any_of(REFERENCES),
    images=r"all|\d+",
    notebook=r"[A-Za-z0-9_.-]+",


# --- parameters: what a job's result depends on, and nothing else ----------------------------------


def as_parameter(section, exclude):
    """A section of the study without defaults, so that a new option of the code reruns nothing."""
    return canonical_json(section.model_dump(mode="json", exclude=exclude, exclude_defaults=True))


NOTEBOOK = canonical_json({"tables": TABLES, "results": RESULTS, "figures": FIGURES})
PLACES = {
    "path": True,
    "on_error": True,
    "decoder": {"weights"},
    "reference": {"path", "on_error"},
}
# Of the study as a whole only the tables and the report depend: names, order, notes; not on where
# things lie and how fast they are made.
SHOWN = run_digest(
    [
        STUDY.model_dump(
            mode="json",
            exclude={
                "machine": True,
                "only": True,
                "protocols": {"__all__": {"keep"}},
                "dataset": PLACES,
                "datasets": {"__all__": PLACES},
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


def decoder_path(wildcards):
    """Where the weights lie that decode what a run's network makes."""
    decoder = STUDY.data[RUNS[wildcards.run].spec.dataset.name].decoder
    return decoder.weights if decoder else ""


DECODERS_HELD = {
    name: held(f"decoder of {name}", dataset.decoder and dataset.decoder.weights)
    for name, dataset in STUDY.data.items()
}
WEIGHTS_HELD = {kind: held(f"weights of {kind}", given_weights(kind)) for kind in STUDY.extractors}


def decoder_held(wildcards):
    return DECODERS_HELD[RUNS[wildcards.run].spec.dataset.name]


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
SAMPLES = large(f"{MEASUREMENT}/samples.npz", f"{MEASUREMENT}/generate.json", "samples_sha256")
FEATURES = large(
    f"{REFERENCE}/features.safetensors", f"{REFERENCE}/reference.json", "features_sha256"
)


def archive(wildcards):
    """The data set of a run. Its time says nothing; `described` is what jobs wait for."""
    return ancient(archive_of(RUNS[wildcards.run].spec.dataset.name))


def described(wildcards):
    return str(contents.described(archive_of(RUNS[wildcards.run].spec.dataset.name)))


def conversion_code(wildcards):
    """The converting code; of an archive whose source is gone, the code that made it."""
    dataset = DATA[wildcards.dataset]
    code = digest.conversion(dataset.source)
    return contents.code(dataset.path, archive_of(dataset.name), code)


def planned(wildcards):
    return PLANNED[wildcards.run, wildcards.measurement]


def generation_code(wildcards):
    return digest.generation(RUNS[wildcards.run].spec, planned(wildcards).cell.sampler)


def probe_code(kind, wildcards):
    return digest.probe(kind, [RUNS[wildcards.run].spec])


def notebook_code(wildcards):
    return digest.notebook(f"{NOTEBOOKS}/{wildcards.notebook}.ipynb")


def labels(wildcards):
    """Where a run stands on the axes of the study, for Snakemake's report."""
    axes = RUNS[wildcards.run].axes | {"measurement": wildcards.measurement}
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
