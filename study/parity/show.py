"""What ``study parity`` prints: a table of verdicts, and the kinds that there are."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from study.files import printable, write_text
from study.parity.case import names
from study.parity.coverage import coverage
from study.parity.judge import Verdict, run
from study.parity.kinds import KINDS
from study.provenance import Stopwatch


def _table(verdicts: Iterable[Verdict]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("case", "outputs", "abs. error", "rel. error", "tolerance", "used", ""):
        right = column in ("outputs", "abs. error", "rel. error", "used")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for one in verdicts:
        compared = one.outputs > 0
        table.add_row(
            Text(printable(one.case)),
            str(one.outputs),
            f"{one.absolute:.2e}" if compared else "",
            f"{one.relative:.2e}" if compared else "",
            one.tolerance,
            f"{one.share:.1%}" if compared else "",
            Text("ok", style="green") if one.passed else Text("FAILED", style="bold red"),
        )
    return table


def show(folder: str | Path, markdown: str | Path | None = None) -> bool:
    """Run a folder's cases and print the table. Returns whether all passed.

    Errors are the largest over a case's outputs: "abs." of any number, "rel." relative to the
    largest number of the same output; "tolerance" belongs to the output that comes closest to its
    limit, and "used" says how close. ``markdown`` is a file for the table of what cases cover.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    cases, facts = names(folder)
    watch = Stopwatch()
    with console.status(f"{len(cases)} cases") if console.is_terminal else nullcontext():
        verdicts = list(run(folder))
    console.print(_table(verdicts))
    for one in verdicts:
        if one.problems:
            # Worst first: one wrong layer puts all outputs behind it out.
            ranked = sorted(one.problems, key=lambda text: not text.startswith(one.worst or "\0"))
            more = f" (and {len(ranked) - 1} more)" if len(ranked) > 1 else ""
            console.print(Text(printable(f"{one.case}: {ranked[0]}{more}"), style="red"))
    if facts:
        console.print(f"Facts without tensors, not cases: {', '.join(facts)}")
    failed = sum(not one.passed for one in verdicts)
    result = f"{failed} failed" if failed else "all passed"
    console.print(f"{len(verdicts)} cases, {result}, {watch.seconds:.0f} s")
    if markdown is not None:
        write_text(markdown, coverage(folder, verdicts))
        console.print(f"Coverage: {markdown}")
    return not failed


def show_kinds() -> None:
    """Print the kinds and what computes each."""
    for kind, runner in KINDS.items():
        function = getattr(runner, "func", runner)  # of a partial one
        about = (function.__doc__ or "").strip().partition("\n")[0]
        print(f"{kind:22} {function.__module__.removeprefix('study.'):16} {about}")
