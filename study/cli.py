"""``study <verb>``: one verb per stage. Every stage of the workflow can be run by hand.

Each verb imports its room when it is called; from these imports ``study.digest`` knows which code
a stage depends on.
"""

import errno
import json
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from study.files import UserError
from study.probes import PROBES

app = typer.Typer(
    name="study",
    help="What do long skip connections, and how they are scaled, do to diffusion backbones?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

STAGES, STUDIES, CHECKS = "Stages", "The study as a whole", "Checks"

Spec = Annotated[
    str,
    typer.Option(help="Spec, as JSON or the path of a JSON file; defaults may be left out."),
]
Data = Annotated[Path, typer.Option(help="Data set archive (results/datasets/<name>.zip).")]
Out = Annotated[Path, typer.Option(help="What to write.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Gpus = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs to take from this machine's free ones; 0 = CPU.  [default: 1]"),
]
Weights = Annotated[
    str | None, typer.Option(help="The extractor's weights; empty = its own download.")
]
Config = Annotated[Path, typer.Option("--config", "--configfile", help="The study.")]


def _json(text: str, option: str) -> dict[str, Any]:
    """Read an option that is JSON or the path of a JSON file."""
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            raise UserError(f"{option}: neither JSON nor the path of a JSON file: {text!r}")
        text = path.read_text()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{option}: expected a JSON object; got {type(value).__name__}")
    return value


def _device(gpus: int | None) -> Any:
    """Hold free GPUs of this machine while a stage runs, and hide all others from it."""
    from study.devices import acquire

    return acquire(gpus)


def _alone(folder: Path) -> Any:
    """Keep the same job of a killed workflow, which may live on, out of a run's folder."""
    if "LOCAL_RANK" in os.environ:  # a process of several, whose parent holds the folder
        return nullcontext()
    from study.devices import alone

    return alone(folder)


def _set_threads(threads: int | None) -> None:
    """Threads of the numerical libraries; to be called before they are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        if threads:
            os.environ[name] = str(threads)


@app.command(rich_help_panel=STAGES)
def convert(
    spec: Spec,
    out: Out,
    source_path: Annotated[str, typer.Option(help="Where the source lies.")] = "",
    on_error: Annotated[str, typer.Option(help="Broken images: fail or skip.")] = "fail",
) -> None:
    """Convert a source of images to a data set archive."""
    from study.data.convert import convert as run

    settings = _json(spec, "--spec")
    summary = run(settings, out, source_path=source_path or None, on_error=on_error)
    print(json.dumps(summary, indent=1, default=str))


@app.command(rich_help_panel=STAGES)
def extractor(
    data: Data,
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of the classifier.")] = 0,
    threads: Threads = None,
) -> None:
    """Train the small classifier whose features judge samples."""
    _set_threads(threads)
    from study.fidelity.classifier import train_classifier

    train_classifier(data, out, seed=seed)


@app.command(rich_help_panel=STAGES)
def reference(
    data: Data,
    extractor: Annotated[str, typer.Option(help="Name of the feature extractor.")],
    out: Out,
    weights: Weights = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Compute features and statistics of a data set, once per extractor."""
    _set_threads(threads)
    from study.fidelity.reference import make_reference

    with _device(gpus):
        make_reference(data, extractor, weights or None, out)


@app.command(rich_help_panel=STAGES)
def train(
    spec: Spec,
    data: Data,
    out: Out,
    state: Annotated[Path, typer.Option(help="Folder of the checkpoint; kept for resuming.")],
    stop_file: Annotated[
        Path | None, typer.Option(help="Leave with a checkpoint when this file appears.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="Where the checkpoint lies that the spec names, if it names one.")
    ] = "",
    machine: Annotated[str, typer.Option(help="Speed-only settings as JSON.")] = "{}",
    code: Annotated[str | None, typer.Option(help="Digest of the training code.")] = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Train one run; the same command resumes an interrupted one.

    The weights of a run whose spec names an official checkpoint are imported instead.
    """
    if stop_file is not None and stop_file.exists():
        raise UserError(f"{stop_file} asks trainings to stop; delete it to go on")
    described, settings = _json(spec, "--spec"), _json(machine, "--machine")
    if "checkpoint" in described:
        with _alone(state):
            _take_weights(described, checkpoint, data, out, code)
        return
    processes = settings.get("processes", 1)
    _set_threads(max(1, threads // processes) if threads else None)
    with _alone(state), _device(gpus):
        if processes > 1 and "LOCAL_RANK" not in os.environ:
            _launch(processes, gpus or 0)
        from study.arms import complete
        from study.training import train as run

        run(
            complete(described),
            data,
            out,
            state,
            machine=settings,
            threads=max(1, threads // processes) if threads else None,
            stop_file=stop_file,
            code=code,
        )


def _take_weights(
    spec: dict[str, Any], checkpoint: str, data: Path, out: Path, code: str | None
) -> None:
    """Import the weights of a run instead of training it.

    A function of its own, so that the importing code is no part of the training code.
    """
    from study.arms import complete
    from study.importing import import_run

    if not checkpoint:
        raise UserError(f"--checkpoint: missing; the spec names {spec['checkpoint']}")
    import_run(complete(spec), checkpoint, data, out, code=code)


def _launch(processes: int, gpus: int) -> None:
    """Run this very command in several processes, and end with their exit status.

    torch's own launcher, which is what ``accelerate launch`` calls for several GPUs; accelerate's
    refuses several processes without a GPU unless MPI is there.
    """
    import signal
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "study", *sys.argv[1:]]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "false" if gpus else "true"}
    # The launcher inherits the locks of the run and of its GPUs: they must outlive this process
    # if it is killed while the trainers live on.
    child = subprocess.Popen(command, env=environment, close_fds=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    raise SystemExit(child.wait())


@app.command(rich_help_panel=STAGES)
def generate(
    run_dir: Annotated[Path, typer.Option(help="Folder of a run, which holds train/.")],
    protocol: Annotated[str, typer.Option(help="The study's `generation` section, as JSON.")],
    data: Data,
    out: Out,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    decoder: Annotated[
        str, typer.Option(help="The weights of the decoder of latents, if not in the protocol.")
    ] = "",
    code: Annotated[str | None, typer.Option(help="Digest of the generating code.")] = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Generate the samples of a trained run."""
    _set_threads(threads)
    with _alone(run_dir / "state"), _device(gpus):
        from study.arms import with_defaults
        from study.config import Generation
        from study.generation import generate as run

        settings = with_defaults(Generation, _json(protocol, "--protocol"))
        if settings["decoder"] is not None:
            settings["decoder"] = {"weights": decoder, **settings["decoder"]}
        run(run_dir, settings, data, out, batch=batch, threads=threads, code=code)


@app.command(rich_help_panel=STAGES)
def evaluate(
    samples: Annotated[Path, typer.Option(help="samples.npz of a run.")],
    reference: Annotated[Path, typer.Option(help="Folder that `study reference` made.")],
    protocol: Annotated[str, typer.Option(help="The study's `evaluation` section, as JSON.")],
    out: Out,
    weights: Weights = None,
    code: Annotated[str | None, typer.Option(help="Digest of the evaluating code.")] = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Measure samples against the data set's reference."""
    _set_threads(threads)
    from study.fidelity.evaluate import evaluate as run

    with _device(gpus):
        settings = _json(protocol, "--protocol")
        run(samples, reference, settings, out, weights=weights or None, code=code)


@app.command(rich_help_panel=STAGES)
def probe(
    kind: Annotated[str, typer.Argument(help=f"Which probe: {', '.join(PROBES)}.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Table to write (.parquet), with a .json beside it.")],
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of a trained or imported run, which holds train/.")
    ] = None,
    spec: Annotated[
        str,
        typer.Option(
            help="For probes of an arm, instead of --run-dir: its spec, as JSON or the path of a "
            "JSON file; defaults may be left out."
        ),
    ] = "{}",
    manifest: Annotated[
        Path | None, typer.Option(help="For probes of a study: results/<study>/study.json.")
    ] = None,
    options: Annotated[
        str,
        typer.Option(help="Options of the probe, as JSON; `study schema --probe KIND` lists them."),
    ] = "{}",
    machine: Annotated[str, typer.Option(help="Options that only concern speed.")] = "{}",
    code: Annotated[str | None, typer.Option(help="Digest of the probing code.")] = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Measure a network or targets: norms, robustness, variance, similarity, cost."""
    _set_threads(threads)
    with _device(gpus):
        from study.probes.base import probe as run

        run(
            kind,
            data,
            out,
            _json(options, "--options") | _json(machine, "--machine"),
            run_dir=run_dir,
            spec=_json(spec, "--spec") or None,
            manifest=manifest,
            threads=threads,
            code=code,
        )


@app.command(rich_help_panel=STAGES)
def aggregate(
    manifest: Annotated[Path, typer.Option(help="results/<study>/study.json.")],
    results: Annotated[Path, typer.Option(help="results/<study>.")],
    out: Out,
) -> None:
    """Gather the files of all runs into tables."""
    from study.analysis.tables import aggregate as run

    run(manifest, results, out)


@app.command(rich_help_panel=STAGES)
def figures(
    tables: Annotated[Path, typer.Option(help="Folder of the tables.")],
    results: Annotated[Path, typer.Option(help="results/<study>.")],
    out: Out,
) -> None:
    """Draw all figures from finished tables."""
    from study.analysis.figures import draw_all as run

    run(tables, results, out)


@app.command(rich_help_panel=STAGES)
def notebook(
    notebook: Annotated[Path, typer.Option(help="Notebook to run.")],
    out: Out,
    html: Annotated[Path, typer.Option(help="Rendered copy.")],
    parameters: Annotated[str, typer.Option(help="Its parameters, as JSON.")] = "{}",
) -> None:
    """Run a notebook and render it."""
    from study.analysis.notebook import run_notebook

    run_notebook(notebook, out, html, _json(parameters, "--parameters"))


@app.command(rich_help_panel=STAGES)
def report(
    manifest: Annotated[Path, typer.Option(help="results/<study>/study.json.")],
    results: Annotated[Path, typer.Option(help="results/<study>.")],
    out: Out,
) -> None:
    """Render the page that people read first."""
    from study.analysis.report import report as run

    run(manifest, results, out)


@app.command(rich_help_panel=STUDIES)
def runs(config: Config = Path("config.yaml")) -> None:
    """List the runs of a study: folder, arm, seed."""
    from study.arms import runs as resolve
    from study.config import load
    from study.plan import check, missing_files

    study = load(config)
    found = resolve(study)
    told = [*check(study, found), *missing_files(study, found)]
    for run in found.values():
        print(f"{run.name}\t{run.display}\tseed {run.axes['seed']}")
    for line in told:
        print(f"study: {line}", file=sys.stderr)


@app.command(rich_help_panel=STUDIES)
def provenance(
    study: Annotated[str, typer.Argument(help="File or name of a study.")] = "config.yaml",
) -> None:
    """Say where every setting of a study comes from, and which sources disagree."""
    from study.sources import show

    show(study)


@app.command(rich_help_panel=STUDIES)
def plan(
    config: Config = Path("config.yaml"),
    arms: Annotated[bool, typer.Option(help="A row for each arm.")] = True,
    count: Annotated[
        bool | None,
        typer.Option(help="Count parameters and operations.  [default: up to 200 runs]"),
    ] = None,
) -> None:
    """Say what a study will cost before it starts."""
    from study.plan import show

    show(config, arms=arms, counting=count)


@app.command(rich_help_panel=STUDIES)
def status(
    config: Config = Path("config.yaml"),
    watch: Annotated[bool, typer.Option("--watch", help="Keep watching.")] = False,
) -> None:
    """Say how far every run is: done, running, diverged, missing, stale."""
    from study.status import show

    show(config, watch=watch)


@app.command(rich_help_panel=STUDIES)
def stop() -> None:
    """Ask all running trainings of this folder to save a checkpoint and leave."""
    from study.progress import request_stop

    request_stop()


@app.command("import", rich_help_panel=STAGES)
def import_(
    file: Annotated[
        Path, typer.Argument(help="U-ViT .pth, U-DiT .pt, EDM .pkl or .pt, Patch Diffusion .pt.")
    ],
    run_dir: Annotated[Path, typer.Option("--out", "--run-dir", help="Folder of the run to make.")],
    data: Annotated[
        Path | None, typer.Option(help="Data set archive that the network is for.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published size, for what the file does not tell.")
    ] = None,
    options: Annotated[
        str, typer.Option(help="The same as JSON: our options, or the official constructor's.")
    ] = "{}",
    skip_scaling: Annotated[
        str | None, typer.Option(help="Constant scalings leave no trace in a file: cs(0.5), ...")
    ] = None,
    formulation: Annotated[
        str | None, typer.Option(help="Kind, or JSON with options.  [default: the published one]")
    ] = None,
) -> None:
    """Turn an official checkpoint into a run, without executing anything in it."""
    from study.importing import import_checkpoint

    chosen: Any = formulation
    if formulation is not None and formulation.lstrip().startswith("{"):
        chosen = _json(formulation, "--formulation")
    import_checkpoint(
        file,
        run_dir,
        data=data,
        preset=preset,
        options=_json(options, "--options"),
        scaling=skip_scaling,
        process=chosen,
    )


@app.command(rich_help_panel=CHECKS)
def parity(
    folder: Annotated[Path | None, typer.Argument(help="Folder of golden cases.")] = None,
    kinds: Annotated[bool, typer.Option("--list", help="Name the kinds of cases.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Write what the cases cover, as a table.")
    ] = None,
) -> None:
    """Compare this package with recorded outputs of the official implementations."""
    from study.parity import show, show_kinds

    if kinds:
        show_kinds()
    if folder is not None and not show(folder, markdown=markdown):
        raise SystemExit(1)
    if folder is None and not kinds:
        raise UserError("parity: give a folder of cases, or --list")


@app.command(rich_help_panel=CHECKS)
def schema(
    write: Annotated[Path | None, typer.Option(help="Write it here instead.")] = None,
    probe: Annotated[str | None, typer.Option(help="Of the options of this probe instead.")] = None,
) -> None:
    """Print the JSON schema of a study, or of a probe's options."""
    from study.config import schema as make
    from study.files import write_text
    from study.probes.options import OPTIONS

    if probe is not None and probe not in OPTIONS:
        raise UserError(f"--probe: {probe!r} is unknown; allowed: {', '.join(OPTIONS)}")
    text = json.dumps(OPTIONS[probe].model_json_schema() if probe else make(), indent=1) + "\n"
    if write is None:
        print(text, end="")
    else:
        write_text(write, text)


HOME = re.compile(r"(--[\w-]+=)?(~)(?=/|$)")

MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
"""Errors of files that are the machine's or the user's, not the code's."""


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 2."""
    # The shell leaves the ~ of --option=~/file as it is.
    sys.argv[1:] = [
        HOME.sub(lambda found: (found[1] or "") + os.path.expanduser("~"), word, count=1)
        if HOME.match(word)
        else word
        for word in sys.argv[1:]
    ]
    try:
        app(standalone_mode=False)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"study: {line}", file=sys.stderr)
        sys.exit(2)
    except typer.BadParameter.__base__ as error:  # UsageError of typer's own copy of click
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            path = error.ctx.command_path if error.ctx else "study"
            words = error.format_message().rstrip(".")
            print(f"study: {words}; see {path} --help", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        print(f"study: {error.filename or 'writing a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # Told by name: importing the trainer here would cost every verb its imports.
        if type(error).__name__ != "Interrupted":
            raise
        print(f"study: {error}", file=sys.stderr)
        sys.exit(75)
