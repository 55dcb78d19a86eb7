"""Digests of the code of a stage: a comment keeps them, a changed statement does not.

Snakemake sees neither the modules that a job imports nor what in them changed. Each rule therefore
carries, as a parameter, the digest of the modules that its stage imports, taken over their syntax
trees: comments, docstrings and layout are not part of it. Nothing is imported to compute it.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent

# Left out, and not followed: registries and declarations, whose effect on a run is in its spec;
# the command line; and what only reports, locks, writes or draws progress.
DECLARATIONS = frozenset(
    f"{PACKAGE.name}{module}"
    for module in (
        "",
        ".__main__",
        ".arms",
        ".cli",
        ".config",
        ".contents",
        ".devices",
        ".digest",
        ".files",
        ".plan",
        ".processes",
        ".progress",
        ".provenance",
        ".sources",
        ".status",
        ".backbones",
        ".backbones.options",
        ".data.sources",
        ".diffusion",
        ".diffusion.options",
        ".diffusion.samplers",
        ".diffusion.samplers.options",
        ".probes",
        ".probes.options",
    )
)


def _path(module: str, package: Path) -> Path | None:
    """The source file of a dotted module name inside ``package``, ``None`` for any other name."""
    first, *rest = module.split(".")
    if first != package.name:
        return None
    base = package.joinpath(*rest)
    for path in (base / "__init__.py", base.with_suffix(".py") if rest else None):
        if path is not None and path.is_file():
            return path
    return None


def _canonical(node: Any) -> str:
    """Text of a syntax tree: no positions, no empty fields (their set differs between Pythons)."""
    if isinstance(node, ast.AST):
        fields = []
        for name, value in ast.iter_fields(node):
            if name in ("ctx", "kind", "type_comment") or value is None or value == []:
                continue
            if name == "body" and isinstance(value, list):
                value = [item for item in value if not _is_text(item)] or [ast.Pass()]
            fields.append(f"{name}={_canonical(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def _is_text(node: ast.AST) -> bool:
    """A statement that is only a string: a docstring or a note, without effect."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node of a tree but those under ``if TYPE_CHECKING``, which never run."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        children: Iterable[ast.AST] = ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children = node.orelse
        waiting.extend(children)


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that the tree may import, anywhere in it, relative ones made absolute."""
    parts = module.split(".")
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                keep = len(parts) - node.level + (1 if is_package else 0)
                prefix = ".".join([*parts[:keep], *([node.module] if node.module else [])])
            else:
                prefix = node.module or ""
            yield prefix
            for alias in node.names:
                yield f"{prefix}.{alias.name}"


@cache
def _module(module: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """Digest of one source file, and the names it imports from its own package."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    is_package = path.name == "__init__.py"
    top = module.split(".")[0]
    names = {name for name in _imports(tree, module, is_package) if name.split(".")[0] == top}
    return hashlib.sha256(_canonical(tree).encode()).hexdigest(), tuple(sorted(names))


@cache
def closure(
    roots: tuple[str, ...], exclude: frozenset[str] = DECLARATIONS, package: Path = PACKAGE
) -> dict[str, str]:
    """Modules of ``package`` that importing ``roots`` runs, each with the digest of its file.

    Imports inside functions count. A module in ``exclude`` is neither counted nor followed,
    unless it is a root itself. An unknown root raises ``LookupError``.
    """
    for root in roots:
        if _path(root, package) is None:
            raise LookupError(f"no module {root} in {package}")
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module in found or (module in exclude and module not in roots):
            continue
        path = _path(module, package)
        if path is None:  # a name inside a module, such as a function
            continue
        found[module], names = _module(module, path)
        waiting.extend(names)
        # Importing a.b.c also runs a and a.b.
        parts = module.split(".")
        waiting.extend(".".join(parts[:n]) for n in range(1, len(parts)))
    return found


@cache
def stage_digest(
    roots: tuple[str, ...], exclude: frozenset[str] = DECLARATIONS, package: Path = PACKAGE
) -> str:
    """Sixteen hexadecimal digits for the code of a stage whose work starts in modules ``roots``."""
    listing = sorted(closure(roots, exclude, package).items())
    return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]


@cache
def _verbs(package: Path = PACKAGE) -> dict[str, tuple[str, ...]]:
    """The modules that each verb's function in ``cli.py`` imports: where its stage starts."""
    name = f"{package.name}.cli"
    verbs: dict[str, tuple[str, ...]] = {}
    for node in ast.parse((package / "cli.py").read_bytes()).body:
        if isinstance(node, ast.FunctionDef):
            found = {module for module in _imports(node, name, False) if _path(module, package)}
            verbs[node.name.strip("_")] = tuple(sorted(found - DECLARATIONS))
    return verbs


def stage(verb: str) -> str:
    """Digest of the code behind ``study <verb>``, for stages whose code is the same in all runs."""
    return stage_digest(_verbs()[verb])


def conversion(source: str) -> str:
    """Digest of the code that converts a kind of source; another source has no part in it."""
    registry = f"{PACKAGE.name}.data.sources"
    # Read, not imported: reading images needs packages that a plan does without.
    for node in ast.parse(_path(registry, PACKAGE).read_bytes()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SOURCES":
            module = ast.literal_eval(node.value)[source].partition(":")[0]
            return stage_digest((*_verbs()["convert"], f"{registry}.{module}"))
    raise LookupError(f"no SOURCES in {registry}")


def _network(spec: Mapping[str, Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The modules that a run's network, loss and target add, and what it has no part in."""
    from study.backbones import family
    from study.diffusion import FORMULATIONS

    roots = [
        family(spec["backbone"]["family"]).module,
        FORMULATIONS[spec["formulation"]["kind"]].partition(":")[0],
    ]
    stable_target = f"{PACKAGE.name}.diffusion.stf"
    if spec["target"]["kind"] == "stf":
        return (*roots, stable_target), DECLARATIONS
    return tuple(roots), DECLARATIONS | {stable_target}


def training(spec: Mapping[str, Any]) -> str:
    """Digest of the code that trains the run of a resolved spec, or imports its weights.

    Another backbone's file, formulation or target has no part in it.
    """
    modules, exclude = _network(spec)
    verb = "import" if "checkpoint" in spec else "train"
    return stage_digest((*_verbs()[verb], *modules), exclude)


def generation(spec: Mapping[str, Any], sampler: str) -> str:
    """Digest of the code that generates the samples of a run with the sampler of that kind."""
    from study.diffusion.samplers import REGISTRY

    modules, exclude = _network(spec)
    exclude |= {f"{PACKAGE.name}.diffusion.stf"}
    roots = [module for module in modules if module not in exclude]
    return stage_digest((*_verbs()["generate"], *roots, REGISTRY[sampler].split(":")[0]), exclude)


def probe(kind: str, specs: Iterable[Mapping[str, Any]]) -> str:
    """Digest of the code of a probe that looks at networks of these resolved specs.

    Other probes, and backbones and formulations that none of the specs has, have no part in it.
    """
    from study.probes import PROBES

    roots, exclude = {PROBES[kind]}, DECLARATIONS
    for spec in specs:
        modules, _ = _network(spec)
        roots.update(modules)
    return stage_digest((*_verbs()["probe"], *sorted(roots)), exclude)


@cache
def notebook(path: str) -> str:
    """Digest of the code that a notebook calls; its cells are a file that the workflow watches."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    lines = "\n".join(code).splitlines()
    tree = ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))
    names = {name for name in _imports(tree, "__main__", False) if _path(name, PACKAGE)}
    return stage_digest((*_verbs()["notebook"], *sorted(names - DECLARATIONS)))
