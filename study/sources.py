"""Where the settings of a study come from: ``study provenance``.

A study names the source of its settings in its section ``sources``. Here they are laid beside the
values; what has no source, and what sources disagree on, is listed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.files import UserError
from study.spec.explain import leaves
from study.spec.origins import Source
from study.spec.study import Study, load, read

STUDIES = (Path("config.yaml"), Path("workflow/studies"))
"""Where studies lie, seen from the project's folder."""

_IMAGES = r"dataset(s\.[^.]+)?(\.reference)?"
_PROTOCOL = r"protocols\.[^.]+"
NO_SETTINGS = re.compile(
    r"(study|title|notebooks|machine|published|sources|only|arms\[\d+\]\.name"
    rf"|{_IMAGES}\.(name|path|on_error|note)"
    rf"|{_PROTOCOL}\.(like|keep|only|extractors(\[\d+\])?\.weights))([.\[].*)?"
)
"""Keys that name things, say where they lie, or concern speed alone; they need no source."""


@dataclass(frozen=True)
class Setting:
    """A value that a study sets, and where it comes from (``None``: the study does not say)."""

    key: str
    value: Any
    source: Source | None

    @property
    def shown(self) -> str:
        """The value as YAML would have it on one line."""
        if isinstance(self.value, str):
            return self.value
        return json.dumps(self.value, default=str)


def is_setting(key: str) -> bool:
    """Whether a key of a study changes a result, so that it needs a source."""
    if key == "published.parameters":
        return True
    return not NO_SETTINGS.fullmatch(key)


def settings(content: Mapping[str, Any], study: Study) -> list[Setting]:
    """Every setting of a study, in the order of its file. ``content`` is the file, unchecked."""
    return [
        Setting(key, value, study.sources.get(key))
        for key, value in leaves(content).items()
        if is_setting(key)
    ]


def find(name: str) -> Path:
    """The file of a study, given by its path, its file's name or its own name."""
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"{name}: no such file")
    files = [
        file
        for place in STUDIES
        for file in (sorted(place.rglob("*.yaml")) if place.is_dir() else [place])
        if file.is_file()
    ]
    for file in files:
        if name == file.stem:
            return file
    for file in files:
        if read(file).get("study") == name:
            return file
    known = ", ".join(file.stem for file in files) or "none here"
    raise UserError(f"{name}: neither a file nor a study of this folder; studies: {known}")


def show(name: str) -> None:
    """Print every setting of a study with its source, and what sources disagree on."""
    from rich.console import Console

    path = find(name)
    content = read(path)
    study = load(content)
    found = settings(content, study)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(_settings_table(found))
    conflicts = [one for one in found if one.source and one.source.conflicts]
    if conflicts:
        console.print("\n[bold]Sources that disagree[/bold] (the first line is what is used)")
        console.print(_conflicts_table(conflicts))
    if study.published is not None:
        _show_publication(console, study)
    without = [one.key for one in found if one.source is None]
    line = f"{path}: {len(found)} settings, {len(conflicts)} with conflicting sources, "
    line += f"{len(without)} without a source"
    console.print(f"\n{line}", highlight=False, soft_wrap=True)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("key", "source"))
    return table


def _settings_table(found: list[Setting]) -> Any:
    from rich.text import Text

    table = _table("key", "value", "source", "where", "note")
    for one in found:
        source = one.source
        cells = ["-", "", ""]
        if source is not None:
            kind = source.source + (" *" if source.conflicts else "")
            cells = [kind, source.where, source.note]
        table.add_row(*(Text(text) for text in (one.key, one.shown, *cells)))
    return table


def _conflicts_table(conflicts: list[Setting]) -> Any:
    from rich.text import Text

    table = _table("key", "source", "value", "where", "note")
    for one in conflicts:
        used = one.source
        rows = [(one.key, used.source, one.shown, used.where, used.note)]
        for other in used.conflicts:
            value = other.value if isinstance(other.value, str) else json.dumps(other.value)
            rows.append(("", other.source, value, other.where, other.note))
        for row in rows:
            table.add_row(*map(Text, row))
    return table


def _show_publication(console: Any, study: Study) -> None:
    from study.published import numbers

    followed = study.published
    for name, repository in followed.repositories.items():
        console.print(f"\n[bold]{name}[/bold]: {repository.url} at {repository.commit}")
    for heading, lines in (
        ("What you bring", followed.needs),
        ("What the publication does otherwise", followed.differences),
    ):
        if lines:
            console.print(f"\n[bold]{heading}[/bold]")
            for line in lines:
                console.print(f"- {line}", highlight=False, markup=False)
    if not followed.model:
        return
    where = {"paper": followed.paper, "model": followed.model}
    if followed.dataset:
        where["dataset"] = followed.dataset
    found = [n for n in numbers(**where) if n.origin == "stated" and "FID" in n.metric]
    if found:
        console.print("\n[bold]Published[/bold]")
    for number in found:
        text = f"- {number.metric} {number.value} ({number.table_or_figure}"
        text += f"; {number.setting}" if number.setting else ""
        console.print(f"{text}; {number.source})", highlight=False, markup=False)
