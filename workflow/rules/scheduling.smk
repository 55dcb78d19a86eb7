# What fails, what waits and how it ends: the study's additions to Snakemake's scheduler. They hold on
# one machine and on any cluster, for they look at nothing but files.
import asyncio
import time
from contextlib import suppress

from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_interface_common.exceptions import WorkflowError

from study.ledger import devices


def say(text):
    print(f"study: {text}", file=sys.stderr)


def stop_asked():
    return Path(STOP_FILE).exists()


def members(job):
    """A job itself, or the jobs of a group."""
    return job.jobs if job.is_group() else [job]


def resumable(job):
    """The folders of the runs whose work is kept when the job is stopped."""
    runs = {one.wildcards.run for one in members(job) if one.rule.name in ("train", "generate")}
    return [Path(RESULTS) / "runs" / run for run in sorted(runs)]


def occupied(job):
    """What of a job's work another process has, such as a job of a killed workflow."""
    runs = [run.name for run in resumable(job) if devices.occupied(run / "state")]
    files = [
        Path(str(path))
        for one in members(job)
        if one.rule.name == "evaluate" or one.rule.name.startswith("probe_")
        for path in one.output
    ]
    return runs + [
        str(path) for path in files if devices.occupied(path.parent, f".{path.name}.lock")
    ]


class StudyScheduler(JobScheduler):
    """Snakemake's scheduler, with three additions.

    - A job that was stopped has not failed: if its run has kept more of its work since the job was
      handed over (time limit, preemption, lost node, kill), it is tried again and not counted. What
      fails at one place again and again keeps nothing new there, and is counted.
    - A run that another process works on is left to it until that ends.
    - When a stop is asked for, nothing starts any more, and what a cluster has not begun leaves its
      queue.
    """

    def take_over(self, watched):
        """Add what is kept here; ``watched`` are the jobs of the progress line."""
        self.watched, self.kept, self.waiting, self.leaving = watched, {}, {}, None
        self.told = {}
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
        further = [run.name for run in resumable(job) if progress.kept(run) != self.kept[run]]
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
        free = jobs - waiting.keys()
        return super().job_selector(free) if free else set()

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
