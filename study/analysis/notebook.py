"""Run a notebook in this very Python and render it as one HTML file that opens offline."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import study
from study.files import UserError, atomic, write_json, write_text

KERNEL = "python3"


def run_notebook(
    notebook: str | Path,
    out: str | Path,
    html: str | Path,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Execute ``notebook`` with ``parameters``, write the executed copy and its HTML.

    The kernel is the running interpreter, whatever kernels are installed, and works in the current
    folder, from which relative parameters are read. Outputs hold no times, so that equal inputs
    give equal files. When a cell fails, the cells run so far are kept as
    ``<out stem>.failed.ipynb`` and a ``UserError`` names cell and error.
    """
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    notebook, out = Path(notebook), Path(out)
    if not notebook.is_file():
        raise UserError(f"{notebook}: no such notebook")
    failed = out.with_name(f"{out.stem}.failed.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / out.name
        try:
            with _own_kernel(Path(folder)):
                papermill.execute_notebook(
                    str(notebook),
                    str(executed),
                    parameters=dict(parameters or {}),
                    kernel_name=KERNEL,
                    language="python",
                    progress_bar=False,
                    log_output=False,
                )
        except PapermillExecutionError as error:
            _write(nbformat.read(executed, as_version=4), failed)
            raise UserError(
                f"{notebook}: cell {error.exec_count} failed: {error.ename}: {error.evalue}; "
                f"what ran is kept in {failed}"
            ) from None
        content = _without_times(nbformat.read(executed, as_version=4))
    _write(content, out)
    failed.unlink(missing_ok=True)
    write_text(html, render(content, notebook.stem))


@contextmanager
def _own_kernel(folder: Path) -> Iterator[None]:
    """Make "python3" mean this interpreter, with this package importable, and no user profile."""
    specification = {
        "argv": [
            sys.executable,
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--log-level=50",
        ],
        "display_name": "Python 3",
        "language": "python",
    }
    write_json(folder / "kernels" / KERNEL / "kernel.json", specification)
    package = str(Path(study.__file__).resolve().parent.parent)
    changed = {
        "JUPYTER_PATH": str(folder),
        "JUPYTER_PREFER_ENV_PATH": "0",
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "MPLBACKEND": "Agg",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _without_times(content: Any) -> Any:
    """Drop what differs between two runs: times, random identifiers, the source's path."""
    content.metadata.pop("papermill", None)
    for number, cell in enumerate(content.cells):
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = f"injected-{number}"
    return content


def _write(content: Any, path: Path) -> None:
    import nbformat

    with atomic(path) as temporary:
        nbformat.write(content, temporary)


def render(content: Any, title: str) -> str:
    """An executed notebook as one page: code folded, no scripts, nothing from elsewhere."""
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import TagRemovePreprocessor
    from traitlets.config import Config

    from study.analysis.pages import environment

    exporter = HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(Path(__file__).parent / "templates")],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    tags = {"remove_cell_tags": ["parameters", "injected-parameters"], "enabled": True}
    settings = Config(TagRemovePreprocessor=tags)
    exporter.register_preprocessor(TagRemovePreprocessor(config=settings), enabled=True)
    body, _ = exporter.from_notebook_node(content)
    pages = environment()
    return pages.get_template("notebook.html.j2").render(
        title=title, body=body, css=pages.get_template("page.css").render()
    )
