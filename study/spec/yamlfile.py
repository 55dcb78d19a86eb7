"""A study's file as plain values: YAML or JSON in UTF-8, read more strictly than YAML asks for.

YAML lets a key be given twice, anchors grow without bound, keys be numbers, and ``010`` be eight.
None of that is meant in a study, so each is one line that says where it stands.
"""

import codecs
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml

from study.files import UserError

LARGEST = 4 * 2**20
"""Bytes of a file; what is larger is not a study."""

DEEPEST = 50
"""Sections within sections."""

MOST = 100_000
"""Values, once every anchor is written out."""

PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
"""The types of YAML that a study has; of dates, sets and binary values JSON knows nothing."""


class _Loader(yaml.SafeLoader):
    yaml_constructors: ClassVar = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in PLAIN
    }
    # 2020-01-01 is text, as is =.
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in found if not tag.endswith((":timestamp", ":value"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:  # a number of 5,000 digits, a text that is tagged !!int
            kind = node.tag.rpartition(":")[2]
            raise _problem(node, f"{str(node.value)[:40]!r} cannot be read as {kind}") from None


class _Unwanted(yaml.MarkedYAMLError):
    """Valid YAML that no study has."""


def _problem(node: yaml.Node, text: str) -> _Unwanted:
    return _Unwanted(problem=text, problem_mark=node.start_mark)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _key(node: yaml.Node) -> str:
    """The text of a key."""
    if not isinstance(node, yaml.ScalarNode):
        raise _problem(node, "a key is text, not a list or a mapping")
    if not node.tag.endswith((":str", ":merge")):
        raise _problem(node, f"the key {node.value!r} is not text to YAML; write it in quotes")
    return node.value


def _check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag.endswith((":int", ":float")) and node.style is None:
        if ":" in node.value:
            raise _problem(node, f"{node.value} is a number of base 60 to YAML; write it in quotes")
        if re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            raise _problem(
                node, f"{node.value} is an octal number to YAML; leave the leading zeros out"
            )


def _size(node: yaml.Node, known: dict[yaml.Node, int | None], depth: int = 0) -> int:
    """Check a node and what is below it; returns how many values it is with anchors written out."""
    if node in known:
        size = known[node]
        if size is None:
            raise _problem(node, "the anchor stands within itself")
        return size
    if depth > DEEPEST:
        raise _problem(node, f"more than {DEEPEST} sections within each other")
    known[node], size = None, 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_size(item, known, depth + 1) for item in node.value)
    else:
        first: dict[str, int] = {}
        for key, value in node.value:
            name = _key(key)
            if name in first:
                raise _problem(
                    key, f"the key {name!r} is given twice, first in line {first[name]}; keep one"
                )
            first[name] = _line(key)
            size += _size(value, known, depth + 1)
    if size > MOST:
        raise _problem(node, f"more than {MOST} values when its anchors are written out")
    known[node] = size
    return size


def _text(path: Path) -> str:
    """The content of a file, decoded."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; give the YAML file of a study") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > LARGEST:
        raise UserError(f"{path}: above {LARGEST // 2**20} MiB; not a study")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:2]:
        raise UserError(f"{path}: UTF-16 or UTF-32; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _json(text: str) -> Any:
    """Of JSON what YAML has no words for (tabs, ``1e5``); ``ValueError`` where it is none."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(found)
        if len(content) < len(found):
            _yaml(text.replace("\t", " "))  # which names the lines
        return content

    return json.loads(text, object_pairs_hook=pairs)


def _words(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    return problem if isinstance(error, _Unwanted) else f"not valid YAML ({problem})"


def value(text: str, where: str) -> Any:
    """A value as in a study's file. Raises ``UserError`` that begins with ``where``."""
    try:
        return _yaml(text)
    except RecursionError:
        raise UserError(f"{where}: more than {DEEPEST} sections within each other") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {_words(error)}") from None


def read(path: str | Path) -> dict[str, Any]:
    """The content of a study's file, of plain values. Raises ``UserError`` where it is no study."""
    path = Path(path)
    text = _text(path)
    try:
        content = None
        if text.lstrip().startswith("{"):
            with suppress(ValueError):
                content = _json(text)
        content = _yaml(text) if content is None else content
    except RecursionError:
        raise UserError(f"{path}: more than {DEEPEST} sections within each other") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{path}, line {line}: the character #x{ord(text[error.position]):04x} is not text"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {_words(error)}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path}: a study is a mapping of keys; got {found}")
    return content
