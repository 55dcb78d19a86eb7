# All that reaches into Snakemake itself: the classes of its workflow, its settings and its scheduler
# with this study's additions, and its locks. A test names what is leant on of the pinned version.
import asyncio
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

from snakemake.exceptions import LockException
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake.settings.types import RerunTrigger
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import SharedFSUsage

from study.files import write_text
from study.ledger import progress

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

# --- locks with an owner ---------------------------------------------------------------------------


def release(others, persistence):
    """Take the data that others have made by now, and only read from here on, off their locks."""
    wanted = set(map(str, persistence.all_outputfiles()))

    def made(name, since):
        marked = persistence._record_path(persistence._incomplete_path, name)
        there = Path(name).is_file() and not Path(marked).exists()
        return there and Path(name).stat().st_mtime > since

    for record in others:
        for lock in filter(Path.is_file, map(Path, record["locks"])):
            if not lock.name.endswith(".output.lock"):
                continue
            names = lock.read_text(encoding="utf-8").splitlines()
            kept = [
                name
                for name in names
                if not name.startswith("results/datasets/")
                or name in wanted
                or not made(name, record["since"])
            ]
            if kept != names:
                write_text(lock, "".join(f"{name}\n" for name in kept))


def guard(running, persistence):
    """Let Snakemake's locks have an owner."""
    lock = persistence.lock

    @contextmanager
    def owned():
        held = lock()
        with running.mutex():
            others = running.others()
            release(others.values(), persistence)
            try:
                held.__enter__()
            except LockException:
                stop_with(refusal(others.values()))
            running.note(locks=[str(path) for path in persistence._lockfile.values()])
        with ExitStack() as stack:
            stack.push(held)
            yield

    def delete_own():
        for path in persistence._lockfile.values():
            Path(path).unlink(missing_ok=True)
        persistence._lockfile.clear()

    persistence.lock, persistence._delete_locks = owned, delete_own


# --- what has to run -------------------------------------------------------------------------------


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
            for problem in checks.missing_files(STUDY, CHOSEN):
                stop_with(problem)

    def _prepare_dag(self, *arguments, **options):
        super()._prepare_dag(*arguments, **options)
        if "running" in vars(self) and hasattr(self.persistence, "_lockfile"):
            guard(self.running, self.persistence)

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

# --- what fails, what waits and how it ends --------------------------------------------------------


class StudyScheduler(JobScheduler):
    """Snakemake's scheduler, with these additions.

    - A job that was stopped has not failed: if its run has kept more of its work since the job was
      handed over (time limit, preemption, lost node, kill), it is tried again and not counted. What
      fails at one place again and again keeps nothing new there, and is counted.
    - A run that another process works on is left to it until that ends.
    - A training that goes on from a shorter one waits for that, where both are to run.
    - When a stop is asked for, nothing starts any more, and what a cluster has not begun leaves its
      queue.
    """

    def take_over(self, watched):
        """Add what is kept here; ``watched`` are the jobs of the progress line."""
        self.watched, self.kept, self.waiting, self.leaving = watched, {}, {}, None
        self.told, self.look_again = {}, None
        if not self.workflow.local_exec:
            self.report_job_error = self._executor.report_job_error
            self._executor.report_job_error = self.note_error
            self._executor.sleep = self.sleep

    def run(self, jobs, executor=None):
        for job in jobs:
            for one in self.watched.keys() & members(job):
                self.watched[one].submit(time.time())
            for run in resumable(job):
                self.kept[run] = progress.kept(run)
        super().run(jobs, executor)

    def _handle_error(self, job, *arguments, **options):
        for one in self.watched.keys() & members(job):
            self.watched[one].submitted = False
        further = [
            run_of(work) for work in resumable(job) if progress.kept(work) != self.kept[work]
        ]
        if stop_asked():
            job.attempt = job.restart_times + 1  # its last
        elif occupied(job):
            job.attempt -= 1
        elif further:
            say(f"{job.name} of {', '.join(further)} was stopped and will go on; not a failure")
            job.attempt -= 1
        super()._handle_error(job, *arguments, **options)

    def job_selector(self, jobs):
        if stop_asked():
            self.exit_gracefully()
            return set()
        waiting = {job: runs for job in jobs if (runs := occupied(job))}
        for job in waiting.keys() - self.waiting.keys():
            say(f"{job.name} waits: {', '.join(waiting[job])} still belongs to an earlier job")
        self.waiting = waiting
        coming = trainings([*jobs, *self.running])
        ready = jobs - waiting.keys()
        free = {job for job in ready if not shorter_of(job) & coming}
        if not free and not self.running:  # groups of trainings that wait for each other
            free = ready
        return super().job_selector(free) if free else set()

    def _schedule_reevalutation(self, delay):
        """Look again later, once: else every job that ends would add a look a second for good."""

        def look():
            self.look_again = None
            self._open_jobs.release()

        if self.look_again is None:
            self.look_again = threading.Timer(delay, look)
            self.look_again.daemon = True
            self.look_again.start()

    def tend(self):
        """What is looked after every second, in the thread of the progress line."""
        if stop_asked():
            self.leave()
        elif any(not occupied(job) for job in self.waiting):
            self._open_jobs.release()

    def leave(self):
        """Start nothing more, and take back what a cluster has not begun."""
        if self.leaving is None:
            self.leaving = set()
            say("asked to stop; trainings save and leave, other jobs that run end, nothing starts")
            self.exit_gracefully()
        active = getattr(self._executor, "active_jobs", ())
        queued = [
            info
            for info in active
            if info.job not in self.leaving
            and not any(self.watched[one].begun() for one in members(info.job))
        ]
        self.leaving.update(info.job for info in queued)
        if queued:
            with suppress(WorkflowError):  # it has begun or ended meanwhile
                self._executor.cancel_jobs(queued)

    def failures(self):
        """The jobs that failed, as people are told of them."""
        for job in sorted(self.failed, key=str):
            for one in self.watched.keys() & members(job):
                begun = self.watched[one].begun()
                yield progress.Failure(str(one.log[0]), begun, *self.told.get(job, ()))

    # What an executor for a cluster does here instead of there.

    def note_error(self, job_info, msg=None, **options):
        logs = [str(log) for log in options.get("aux_logs") or ()]
        self.told[job_info.job] = ((msg or "").partition("\n")[0].strip(), logs)
        self.report_job_error(job_info, msg=msg, **options)

    async def sleep(self):
        """Until the cluster is asked again: as planned, but not longer than the profile says.

        Slurm's plugin would wait for minutes at last, and Slurm forgets jobs that have ended.
        """
        remote, begun = self.workflow.remote_execution_settings, time.monotonic()
        planned = self._executor.next_seconds_between_status_checks
        while self._executor.wait:
            longest = 3 if stop_asked() else remote.seconds_between_status_checks
            if time.monotonic() - begun >= min(planned, longest):
                return
            await asyncio.sleep(1)


def take_over(scheduler, watched):
    """Add the study's rules to a scheduler that has not started yet."""
    scheduler.__class__ = StudyScheduler
    scheduler.take_over(watched)
    # A training that fails is tried twice more, unless --retries says otherwise. As a directive of
    # the rule this would count anew inside every job of a cluster, and take precedence.
    if not workflow.execution_settings.retries:
        workflow.get_rule("train").restart_times = 2
