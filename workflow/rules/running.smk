# Several Snakemakes in one folder: who lives, whose the locks are, and what is said of them.
import atexit
import fcntl
from contextlib import contextmanager, suppress

from study.ledger import owner
from study.files import read_json, write_json


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
