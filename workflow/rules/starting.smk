# What happens when the study starts and when it ends.
import hashlib
import json
import os
from collections import Counter

from study import warm
from study.files import writable, write_text
from study.ledger import plan, progress

if workflow.is_main_process:
    try:
        writable(".snakemake")
    except UserError as error:
        stop_with(error)


def expected(job):
    """A job that is to run, as the progress line wants it."""
    wildcards = job.wildcards_dict
    run = RUNS.get(wildcards.get("run"))
    one = PLANNED.get((wildcards.get("run"), wildcards.get("measurement")))
    return progress.Job(
        job.rule.name,
        work(job),
        str(job.output[0]),
        str(job.log[0]),
        " ".join(filter(None, [run and run.axes["backbone"], one and f"{one.cell.images}"])),
        plan.guess(job.rule.name, STUDY, run, one),
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
    for job in workflow.dag.needrun_jobs():
        where = path = kept = ""
        if job.rule.name == "convert":
            name = job.wildcards.dataset
            where, path, kept = f"{WHERE[name]}.path", DATA[name].path, archive_of(name)
        if job.rule.name == "reference":
            kind = REFERENCES[job.wildcards.reference][1]
            where, path = f"extractor {kind}: weights", given_weights(kind)
        if job.rule.name.startswith("generate"):
            name = RUNS[job.wildcards.run].spec.dataset.name
            where, path = f"{WHERE[name]}.decoder.weights", decoder_path(job.wildcards)
        if job.rule.name == "train":
            run = RUNS[job.wildcards.run]
            where, path = f"checkpoint of {run.display}", run.checkpoint
        if path and contents.gone(path):
            yield f"{where}: {path}: no such file or folder" + (
                f"; {kept} stays as it is" if kept and Path(kept).exists() else ""
            )


onstart:
    for problem in filter(None, (run.spec.unsupported for run in CHOSEN.values())):
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
    elif os.environ.get(warm.WORKFLOW) != "":  # jobs of this machine share their imports
        os.environ[warm.WORKFLOW] = str(os.getpid())
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
