"""Files are UTF-8 whatever the locale: every text file that the project opens says so."""

import ast
import re

import pytest
from conftest import ROOT

SOURCES = [
    *sorted((ROOT / "study").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *(
        path
        for path in sorted((ROOT / ".ci").iterdir())
        if "python" in path.open("rb").readline().decode()
    ),
    *(ROOT / "tests" / name for name in ("conftest.py", "miniature.py", "synthetic.py")),
]
TEXT_MODE = re.compile(r"[rwax+t]+")


def unsaid(call: ast.Call) -> bool:
    """Whether a call reads or writes text and leaves it to the locale how."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in given or "encoding" in given:
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    method = isinstance(call.func, ast.Attribute)
    if name in ("run", "Popen", "check_output") and (
        "text" in given or "universal_newlines" in given
    ):
        return True
    if method and name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    place = {"open": 0 if method else 1, "fdopen": 1, "NamedTemporaryFile": 0}.get(name)
    if place is None or ast.unparse(call.func) == "os.open":
        return False
    mode = given.get("mode") or (call.args[place] if len(call.args) > place else None)
    if mode is None:  # Path.open() and open() are for text; others have their own defaults
        return name == "open" and (not method or not call.args)
    # The first argument of other things' open is a name, not a mode.
    return isinstance(mode, ast.Constant) and bool(TEXT_MODE.fullmatch(str(mode.value)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_as_utf8(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [f"line {call.lineno}: {ast.unparse(call)[:80]}" for call in calls if unsaid(call)] == []
