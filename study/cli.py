"""``study <verb>``: one verb per stage. Every stage of the workflow can be run by hand.

Each verb imports its modules when it is called; from these imports ``study.ledger.digest`` knows
which code a stage depends on.
"""

import io
import json
import locale
import logging
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from study import processes as processing
from study.files import (
    NO_ACCESS,
    NO_ROOM,
    Stopped,
    UserError,
    parse_json,
    printable,
    read_json,
)
from study.spec.probes import PROBES

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
    typer.Option(
        min=0, help=r"GPUs to take from this machine's free ones; 0 = CPU.  \[default: 1]"
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="The extractor's weights; empty = its own download.")
]
Config = Annotated[Path, typer.Option("--config", "--configfile", help="The study.")]
Only = Annotated[
    str | None, typer.Option(help="Some of its arms, as in a study: '{backbone: uvit}'.")
]


def _json(text: str, option: str) -> dict[str, Any]:
    """Read an option that is JSON or the path of a JSON file."""
    if text.lstrip().startswith("{"):
        value = parse_json(text, option)
    elif os.path.isfile(text):
        value = read_json(text)
    else:
        raise UserError(f"{option}: neither JSON nor the path of a JSON file: {text!r}")
    if not isinstance(value, dict):
        raise UserError(f"{option}: expected a JSON object; got {type(value).__name__}")
    return value


def _content(config: Path, only: str | None) -> dict[str, Any]:
    """A study as its file says it, with the arms chosen that a command is to look at."""
    from study.spec.study import override, read

    return read(config) | (override(f"only={only}") if only else {})


def _device(gpus: int | None) -> Any:
    """Hold free GPUs of this machine while a stage runs, and hide all others from it."""
    from study.ledger.devices import acquire

    return acquire(gpus)


def _alone(folder: Path, name: str = "lock") -> Any:
    """Keep the same job of a killed workflow, which may live on, out of a run's folder.

    To be entered before devices are taken: a job that has to leave must not wait for them.
    """
    if processing.place() is not None:  # a process of several: it has inherited the lock
        return nullcontext()
    from study.ledger.devices import alone

    return alone(folder, name)


def _alone_with(out: Path) -> Any:
    """The same for a job that writes one file, beside others that run at the same time."""
    return _alone(out.parent, f".{out.name}.lock")


@app.command(rich_help_panel=STAGES)
def convert(
    spec: Spec,
    out: Out,
    source_path: Annotated[str, typer.Option(help="Where the source lies.")] = "",
    on_error: Annotated[str, typer.Option(help="Broken images: fail or skip.")] = "fail",
    code: Annotated[str | None, typer.Option(help="Digest of the converting code.")] = None,
) -> None:
    """Convert a source of images to a data set archive."""
    from study.data.convert import convert as run
    from study.ledger.contents import look, remember
    from study.spec.data import DatasetSettings
    from study.spec.explain import check

    settings = _json(spec, "--spec")
    if "path" in settings:
        raise UserError("--spec: path: where a source lies is no setting; give it as --source-path")
    check(DatasetSettings, {"name": settings.get("source"), **settings}, "--spec: ")
    seen = look(source_path or None, out)
    summary = run(settings, out, source_path=source_path or None, on_error=on_error)
    remember(seen, out, summary, code)
    print(json.dumps(summary, indent=1, default=str))


@app.command(rich_help_panel=STAGES)
def extractor(
    data: Data,
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of the classifier.")] = 0,
    threads: Threads = None,
) -> None:
    """Train the small classifier whose features judge samples."""
    processing.set_threads(threads)
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
    processing.set_threads(threads)
    from study.fidelity.reference import make_reference

    with _device(gpus):
        make_reference(data, extractor, weights or None, out)


@app.command(rich_help_panel=STAGES)
def points(
    data: Data,
    reference: Annotated[Path, typer.Option(help="Folder that `study reference` made.")],
    out: Out,
    images: Annotated[
        int | None, typer.Option(min=2, help=r"As many as samples.  \[default: the data set's]")
    ] = None,
    metrics: Annotated[str, typer.Option(help="Which, with commas between.")] = "fd,kid,is,prc",
    code: Annotated[str | None, typer.Option(help="Digest of the measuring code.")] = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Measure what numbers mean: real images, a Gaussian fitted to the pixels, noise."""
    processing.set_threads(threads)
    from study.fidelity.points import reference_points

    wanted = tuple(filter(None, metrics.split(",")))
    with _alone_with(out), _device(gpus):
        reference_points(data, reference, out, images=images, metrics=wanted, code=code)


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
    from study.combinations import unshared
    from study.spec.explain import check
    from study.spec.run import Spec
    from study.spec.study import Machine

    described, settings = Spec.read(_json(spec, "--spec")), _json(machine, "--machine")
    check(Machine, settings, "--machine: ")
    if described.checkpoint is not None:
        with _alone(state):
            _take_weights(described, checkpoint, data, out, code)
        return
    processes = settings.get("processes", 1)
    if gpus is None and processes > 1:
        from study.ledger.devices import visible

        gpus = processes if visible() else 0
    problem = unshared(described.training.batch, processes, gpus or 0)
    if problem:
        raise UserError(problem)
    each = max(1, threads // processes) if threads else None
    processing.set_threads(each)
    with _alone(state), _device(gpus):
        if processes > 1 and processing.place() is None:
            command = [sys.executable, "-m", "study", *sys.argv[1:]]
            raise SystemExit(processing.launch(command, processes))
        from study.training import train as run

        run(
            described,
            data,
            out,
            state,
            machine=settings,
            threads=each,
            stop_file=stop_file,
            code=code,
        )


def _take_weights(spec: Any, checkpoint: str, data: Path, out: Path, code: str | None) -> None:
    """Import the weights of a run instead of training it.

    A function of its own, so that the importing code is no part of the training code.
    """
    from study.importing import import_run

    if not checkpoint:
        named = spec.checkpoint.sha256 or spec.checkpoint.name
        raise UserError(f"--checkpoint: missing; the spec names {named}")
    import_run(spec, checkpoint, data, out, code=code)


@app.command(rich_help_panel=STAGES)
def generate(
    run_dir: Annotated[Path, typer.Option(help="Folder of a run, which holds train/.")],
    measurement: Annotated[
        str,
        typer.Option(
            help="What is to be measured, as JSON or the path of a JSON file: at, weights, "
            "sampler, guidance, images, seed, labels; defaults may be left out."
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder to write, in the run's measurements/.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    decoder: Annotated[str, typer.Option(help="The weights of the decoder of latents.")] = "",
    code: Annotated[str | None, typer.Option(help="Digest of the generating code.")] = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Generate the samples of a trained run for one measurement."""
    processing.set_threads(threads)
    from study.spec.explain import check
    from study.spec.measuring import Measurement

    settings = check(Measurement, _json(measurement, "--measurement"), "--measurement: ")
    with _alone(run_dir / "state" / "measurements", f"{out.name}.lock"), _device(gpus):
        from study.sampling.draw import generate as run

        run(run_dir, settings, data, out, decoder=decoder, batch=batch, threads=threads, code=code)


@app.command(rich_help_panel=STAGES)
def evaluate(
    samples: Annotated[Path, typer.Option(help="samples.npz of a measurement.")],
    reference: Annotated[Path, typer.Option(help="Folder that `study reference` made.")],
    protocol: Annotated[str, typer.Option(help="extractor and metrics, as JSON.")],
    out: Out,
    weights: Weights = None,
    code: Annotated[str | None, typer.Option(help="Digest of the evaluating code.")] = None,
    threads: Threads = None,
    gpus: Gpus = None,
) -> None:
    """Measure samples against the data set's reference."""
    processing.set_threads(threads)
    from study.fidelity.evaluate import evaluate as run

    settings = _json(protocol, "--protocol")
    with _alone_with(out), _device(gpus):
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
    processing.set_threads(threads)
    with _alone_with(out), _device(gpus):
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
    from study.analysis.tables.aggregate import aggregate as run

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
    from study.analysis.report.page import report as run

    run(manifest, results, out)


@app.command(rich_help_panel=STUDIES)
def runs(
    config: Config = Path("config.yaml"),
    only: Only = None,
    measurements: Annotated[bool, typer.Option("--measurements", help="Theirs, too.")] = False,
) -> None:
    """List the runs of a study: folder, arm, seed."""
    from study.arms import runs as resolve
    from study.arms import selected
    from study.ledger.checks import check, missing_files
    from study.spec.study import load

    study = load(_content(config, only))
    whole = resolve(study)
    found = selected(study, whole)
    told = [*check(study, whole), *missing_files(study, found)]
    for run in found.values():
        print(f"{run.name}\t{run.display}\tseed {run.axes['seed']}")
        for one in run.measurements if measurements else ():
            print(f"  {one.name}\t{', '.join(one.protocols)}\t{', '.join(one.extractors)}")
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
    arms: Annotated[
        bool | None, typer.Option(help=r"A row for each arm.  \[default: up to 200 runs]")
    ] = None,
    count: Annotated[
        bool | None,
        typer.Option(help=r"Count parameters and operations.  \[default: up to 200 runs]"),
    ] = None,
    only: Only = None,
) -> None:
    """Say what a study will cost before it starts."""
    from study.ledger.plan import show
    from study.ledger.progress import check_folder

    check_folder()
    show(_content(config, only), arms=arms, counting=count)


@app.command(rich_help_panel=STUDIES)
def status(
    config: Config = Path("config.yaml"),
    watch: Annotated[bool, typer.Option("--watch", help="Keep watching.")] = False,
    only: Only = None,
) -> None:
    """Say how far every run is: done, running, diverged, missing, stale."""
    from study.ledger.progress import check_folder
    from study.ledger.status import show

    check_folder()
    show(_content(config, only), watch=watch)


@app.command(rich_help_panel=STUDIES)
def preview(config: Config = Path("config.yaml"), only: Only = None) -> None:
    """Report what is there now, while a study runs; what is missing is named."""
    from study.analysis.report.preview import preview as run

    page, trained, whole = run(_content(config, only))
    print(f"{page}: {trained} of {whole} runs are trained")


@app.command(rich_help_panel=STUDIES)
def stop() -> None:
    """Ask all running trainings of this folder to save a checkpoint and leave."""
    from study.ledger.progress import request_stop

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
        str | None, typer.Option(help=r"Kind, or JSON with options.  \[default: the published one]")
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
    # The order of sums of one thread, and that which MKL has on every processor: what is compared
    # is the arithmetic.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    from study.parity.show import show, show_kinds

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
    from study.files import write_text
    from study.spec.study import schema as make

    if probe is not None and probe not in PROBES:
        raise UserError(f"--probe: {probe!r} is unknown; allowed: {', '.join(PROBES)}")
    text = json.dumps(PROBES[probe].model_json_schema() if probe else make(), indent=1) + "\n"
    if write is None:
        print(text, end="")
    else:
        write_text(write, text)


HOME = re.compile(r"(--[\w-]+=)?(~)(?=/|$)")


def _speak_utf8() -> None:
    """Start anew in Python's UTF-8 mode where the locale has another encoding.

    Else the locale would decide what the names in an archive are, which files can be named at all,
    and whether a sign in an arm's name ends the job. Only a terminal is spoken to in its own
    encoding, with escapes for what that lacks; files and pipes are UTF-8.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and Path("/proc/self/cmdline").exists():
        # The arguments as they came: this process may have decoded them with a loss.
        python, *rest = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one will start
        sys.stdout.flush()
        os.execv(sys.executable, [python, b"-X", b"utf8", *rest])
    own = locale.getencoding()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            foreign = stream.isatty() and own.lower() not in ("utf-8", "ansi_x3.4-1968", "us-ascii")
            foreign = foreign and not os.environ.get("PYTHONIOENCODING")
            stream.reconfigure(encoding=own if foreign else None, errors="backslashreplace")


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 2.

    A command that was asked to leave, or finds another job at its work, ends with status 75: the
    same command goes on later.
    """
    _speak_utf8()
    if not sys.flags.safe_path:
        sys.path.append(os.getcwd())  # where a user's own backbone lies
    # The shell leaves the ~ of --option=~/file as it is.
    sys.argv[1:] = [
        HOME.sub(lambda found: (found[1] or "") + os.path.expanduser("~"), word, count=1)
        if HOME.match(word)
        else word
        for word in sys.argv[1:]
    ]
    # xformers, where it is asked for and built for another torch, warns at length of what one line
    # of ours says.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    with processing.own_environment():
        processing.join()
        processing.leave_when_asked()
        sys.exit(_run())


def _say(text: object) -> None:
    for line in str(text).splitlines():
        print(f"study: {line}", file=sys.stderr)


def _run() -> int:
    """The exit status of the command."""
    try:
        # typer returns 130 after Ctrl-C inside a verb, and raises Abort for a file's early end.
        status = app(standalone_mode=False) or 0
        if status == 130:
            raise KeyboardInterrupt
        return status
    except UserError as error:
        _say(str(error) or "failed without a reason")
        return 2
    except typer.BadParameter.__base__ as error:  # UsageError of typer's own copy of click
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            path = error.ctx.command_path if error.ctx else "study"
            words = printable(error.format_message().rstrip("."))
            print(f"study: {words}; see {path} --help", file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None
        _say("interrupted")
        return 130
    except (Stopped, processing.Asked) as error:
        _say(error)
        return processing.STOPPED
    except MemoryError as error:
        _say(f"not enough memory ({printable(str(error)) or 'no more to be had'})")
        return 1
    except OSError as error:
        if error.errno not in NO_ROOM | NO_ACCESS:
            processing.hold_back()
            raise
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{os.strerror(error.errno).lower()}")
        return 2
    except Exception:
        processing.hold_back()
        raise
