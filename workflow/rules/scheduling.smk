# What the scheduler has to know of jobs: where they keep their work, whose it is, which wait. It holds
# on one machine and on any cluster, for it looks at nothing but files.
from study.ledger import devices


def say(text):
    print(f"study: {text}", file=sys.stderr)


def stop_asked():
    return Path(STOP_FILE).exists()


def members(job):
    """A job itself, or the jobs of a group."""
    return job.jobs if job.is_group() else [job]


def work(job):
    """The folder in which a training or a generation keeps what it has done; else none."""
    if not job.rule.name.startswith(("train", "generate")):
        return None
    state = Path(RESULTS, "runs", job.wildcards.run, "state")
    return state if job.rule.name == "train" else state / "measurements" / job.wildcards.measurement


def run_of(folder):
    """The run in whose folder something lies."""
    return folder.relative_to(Path(RESULTS, "runs")).parts[0]


def resumable(job):
    """The folders in which work is kept when the job is stopped."""
    return sorted(filter(None, map(work, members(job))))


def lock_of(job):
    """What keeps two jobs from the same work: the folder, and the name there."""
    folder = work(job)
    if job.rule.name == "train":
        return folder, "lock"
    if folder is not None:
        return folder.parent, f"{folder.name}.lock"
    written = Path(str(job.output[0]))
    return written.parent, f".{written.name}.lock"


def occupied(job):
    """What of a job's work another process has, such as a job of a killed workflow."""
    locked = ("train", "generate", "evaluate_", "points", "probe_")
    taken = (
        one
        for one in members(job)
        if one.rule.name.startswith(locked) and devices.occupied(*lock_of(one))
    )
    return [one.wildcards_dict.get("run") or str(one.output[0]) for one in taken]


# By run: the shorter trainings of the same lineage, which a longer one goes on from.
SHORTER = arms.shorter(RUNS)


def shorter_of(job):
    """The runs that a training, or a group of them, goes on from, beside its own."""
    own = trainings([job])
    return {other for run in own for other in SHORTER.get(run, ())} - own


def trainings(jobs):
    """The runs that these jobs train."""
    return {one.wildcards.run for job in jobs for one in members(job) if one.rule.name == "train"}
