# Several Snakemakes in one folder: who lives, whose the locks are, and what is said of them.
import atexit
import fcntl
from contextlib import ExitStack, contextmanager, suppress

from snakemake.exceptions import LockException

from study.ledger import owner
from study.files import read_json, write_json, write_text


class Running:
    """The Snakemakes that work in this folder: a file for each, as long as it lives.

    Snakemake's own locks do not say whose they are, and when one ends it removes those of all. So
    each notes here who it is and which locks it has.
    """

    folder = Path(".snakemake/running")

    def __init__(self):
        self.record = owner.me() | {"study": STUDY.study, "locks": []}
        self.path = self.folder / f"{self.record['host']}-{self.record['pid']}.json"

    def others(self):
        """Those that live or may live, by their files; what the dead left is removed."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                record = read_json(path)
            except UserError:  # it has just ended
                continue
            if path == self.path:
                continue
            if owner.lives(record) is not False:
                found[path] = record
                continue
            for lock in record["locks"]:
                Path(lock).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        return found

    def begin(self):
        """Note this one. Another one of the same study is a mistake."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.mutex():
            for record in self.others().values():
                if record["study"] == STUDY.study:
                    stop_with(
                        f"study {STUDY.study!r} is being run by another snakemake "
                        f"({owner.name(record)}); wait until it has ended{hint(record)}"
                    )
            self.note()
        atexit.register(self.path.unlink, missing_ok=True)

    def note(self, **more):
        self.record |= more
        write_json(self.path, self.record)

    @contextmanager
    def mutex(self):
        """One Snakemake at a time looks at the locks and adds its own."""
        with (self.folder / "mutex").open("a") as file:
            with suppress(OSError):  # a file system without flock
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def release(self, others, persistence):
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

    def guard(self, persistence):
        """Let Snakemake's locks have an owner."""
        lock = persistence.lock

        @contextmanager
        def owned():
            held = lock()
            with self.mutex():
                others = self.others()
                self.release(others.values(), persistence)
                try:
                    held.__enter__()
                except LockException:
                    stop_with(refusal(others.values()))
                self.note(locks=[str(path) for path in persistence._lockfile.values()])
            with ExitStack() as stack:
                stack.push(held)
                yield

        def delete_own():
            for path in persistence._lockfile.values():
                Path(path).unlink(missing_ok=True)
            persistence._lockfile.clear()

        persistence.lock, persistence._delete_locks = owned, delete_own


def hint(record):
    """What to do about a Snakemake of which this machine cannot tell whether it lives."""
    told = owner.lives(record) is not None
    return "" if told else "; if it was killed there, `snakemake --unlock` frees the folder"


def refusal(others):
    """Why Snakemake's lock cannot be had."""
    for record in others:
        return (
            f"study {record['study']!r} makes or reads files of results/datasets that this command "
            f"makes too (snakemake, {owner.name(record)}); wait until it has made them, or has "
            f"ended{hint(record)}"
        )
    return (
        "the folder is locked, and nobody known works in it; if no snakemake does, "
        "`snakemake --unlock` frees it"
    )
