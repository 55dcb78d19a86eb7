"""A real Slurm of one node in a folder of its own, from Debian's packages, while it is used.

Nothing outside the folder is touched: the configuration, the keys, the states and the logs lie
there, and the daemons stay in the foreground as children of the process that started them.
"""

import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

GPUS = 2

CONF = """\
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={worker}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
GresTypes=gpu
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""

SRUN = """\
#!/bin/sh
# The plugin starts srun without any SLURM_ variable but the job's number.
SLURM_CONF={folder}/slurm.conf exec {srun} "$@"
"""


def lacking() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "setpriv")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; install the Debian packages slurm-wlm and munge"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _make_device(Path(folder) / "gpu")
        except OSError as error:
            return f"no device files can be made ({error.strerror})"
    return ""


def _make_device(path: Path) -> None:
    """A copy of /dev/null, which stands in for a GPU."""
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


def _ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _configure(folder: Path, cpus: int) -> None:
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for number in range(GPUS):
        _make_device(folder / f"gpu{number}")
    node = socket.gethostname().partition(".")[0]
    controller, worker = _ports(2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    conf = CONF.format(
        folder=folder,
        node=node,
        controller=controller,
        worker=worker,
        cpus=cpus,
        memory=memory,
        gpus=GPUS,
    )
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(f"NodeName={node} Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    srun = folder / "bin" / "srun"
    srun.write_text(SRUN.format(folder=folder, srun=shutil.which("srun")))
    srun.chmod(0o755)


def _wait_for(command: list[str], environment: dict[str, str], answer: str = "") -> None:
    end = time.monotonic() + 30
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == 0 and answer in done.stdout:
            return
        if time.monotonic() > end:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        time.sleep(0.1)


@contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """Start a Slurm of this machine in an empty ``folder``; yields the environment of its users.

    ``cpus`` are those that it believes to have. At the end all its jobs are cancelled and its
    daemons stopped.
    """
    folder = folder.resolve()
    _configure(folder, cpus)
    environment = {name: text for name, text in os.environ.items() if "SLURM" not in name}
    environment["SLURM_CONF"] = f"{folder}/slurm.conf"
    environment["PATH"] = f"{folder}/bin:{environment['PATH']}"
    with ExitStack() as daemons:

        def start(*command: str) -> None:
            with (folder / f"{command[0]}.out").open("w") as out:
                daemon = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", *command],  # should this process be killed
                    env=environment,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            daemons.callback(_end, daemon)

        sock = f"{folder}/munge.socket"
        files = (
            "key-file=munge.key",
            "pid-file=munged.pid",
            "log-file=munged.log",
            "seed-file=seed",
        )
        options = [f"--{name}={folder}/{file}" for name, file in (one.split("=") for one in files)]
        start("munged", "--foreground", "--force", f"--socket={sock}", *options)
        _wait_for(["munge", "-n", f"--socket={sock}"], environment)
        start("slurmctld", "-D")
        _wait_for(["scontrol", "ping"], environment, "UP")
        start("slurmd", "-D")
        _wait_for(["sinfo", "-h", "-o", "%T"], environment, "idle")
        daemons.callback(_cancel, environment)
        yield environment


def _cancel(environment: dict[str, str]) -> None:
    """Let no job outlive its Slurm."""
    subprocess.run(["scancel", "--signal=KILL", "--full", "-u", "root"], env=environment)
    subprocess.run(["scancel", "-u", "root"], env=environment)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        left = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True)
        if not left.stdout.strip():
            return
        time.sleep(0.2)


def _end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
