"""Digests of the code of a stage: a comment keeps them, a changed statement does not.

Snakemake sees neither the modules that a job imports nor what in them changed. Each rule therefore
carries, as a parameter, the digest of the modules that its stage imports, taken over their syntax
trees: comments, docstrings and layout are not part of it. To compute it nothing of the package is
imported but what settings are.
"""

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from study.files import UserError
from study.spec import defaults
from study.spec.guidance import GuidanceOptions, guidance_options
from study.spec.metrics import METRICS, NUMBERS, numbers
from study.spec.probes import PROBES
from study.spec.run import Spec
from study.spec.samplers import SamplerOptions
from study.spec.scalings import SCALINGS
from study.spec.training import Snapshots

PACKAGE = Path(__file__).resolve().parents[1]

SPEC, LEDGER = f"{PACKAGE.name}.spec", f"{PACKAGE.name}.ledger"
"""What settings are (a run's are in its spec, and ``_behaviour`` counts what they do), and what
tells of results."""

# Left out, and not followed: registries and declarations, whose effect on a run is in its spec;
# the command line; and what only reports, locks, writes or draws progress.
DECLARATIONS = frozenset(
    f"{PACKAGE.name}{module}"
    for module in (
        "",
        ".__main__",
        ".arms",
        ".cli",
        ".combinations",
        ".files",
        ".processes",
        ".provenance",
        ".sources",
        ".warm",
        ".backbones",
        ".data.sources",
        ".diffusion",
        ".diffusion.samplers",
        ".probes",
    )
)


def _declared(module: str, exclude: frozenset[str] = DECLARATIONS) -> bool:
    if module == f"{SPEC}.steps":  # arithmetic, which samplers and formulations use
        return False
    return module in exclude or f"{module}.".startswith((f"{SPEC}.", f"{LEDGER}."))


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
            if name == "body" and isinstance(value, list) and not _is_drawn(node):
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


def _is_drawn(node: ast.AST) -> bool:
    """A figure's function, whose docstring is its caption."""
    return any("drawn" in ast.unparse(one) for one in getattr(node, "decorator_list", ()))


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
    text = _canonical(tree) + "".join(_data(tree, path))
    return hashlib.sha256(text.encode()).hexdigest(), tuple(sorted(names))


@cache
def _files(package: Path) -> dict[str, list[Path]]:
    """The files of a package that are no code, by their names."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.*")):
        if path.suffix not in (".py", ".pyc") and path.is_file():
            found.setdefault(path.name, []).append(path)
    return found


def _data(tree: ast.AST, path: Path) -> Iterator[str]:
    """Hashes of what a module names of its package: numbers, templates, styles, folders of them."""
    package = next(one for one in path.parents if not (one.parent / "__init__.py").exists())
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for name in sorted(name for name in names if isinstance(name, str) and name):
        files = _files(package).get(name, [])
        folder = path.parent / name
        data = name.isidentifier() and name != "__pycache__" and folder.is_dir()
        if data and not any(folder.rglob("*.py")):
            files = sorted(one for one in folder.rglob("*") if one.is_file())
        yield from (hashlib.sha256(one.read_bytes()).hexdigest() for one in files)


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
        if module in found or (_declared(module, exclude) and module not in roots):
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
            verbs[node.name.strip("_")] = tuple(
                sorted(name for name in found if not _declared(name))
            )
    return verbs


@cache
def stage(verb: str) -> str:
    """Digest of the code behind ``study <verb>``, for stages whose code is the same in all runs."""
    known = repr(SCALINGS) if verb in ("figures", "notebook", "report") else ""
    if verb == "evaluate":  # words for people are no part of a measurement
        known = repr({key: (one.possible, list(one.numbers)) for key, one in METRICS.items()})
    elif verb in ("aggregate", "figures", "notebook", "report"):
        known += repr(METRICS) + _function(numbers)
    return _whole(stage_digest(_verbs()[verb]) + known, ("protocol",) * (verb == "evaluate"))


def conversion(source: str) -> str:
    """Digest of the code that converts a kind of source; another source has no part in it."""
    registry = f"{PACKAGE.name}.data.sources"
    # Read, not imported: reading images needs packages that a plan does without.
    for node in ast.parse(_path(registry, PACKAGE).read_bytes()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SOURCES":
            module = ast.literal_eval(node.value)[source].partition(":")[0]
            code = stage_digest((*_verbs()["convert"], f"{registry}.{module}"))
            return _whole(code, ("dataset",))
    raise LookupError(f"no SOURCES in {registry}")


CHECKS = {"check", "idle", "problem", "skip_shapes", "no_null_label", "_check_splits"}
TOLD = {"settings", "agrees", "speed_settings", "_dump"}
"""Methods of options that refuse settings, or tell of them, and change no result."""


@cache
def _function(function: Callable[..., Any]) -> str:
    return _canonical(ast.parse(textwrap.dedent(inspect.getsource(function))))


@cache
def _behaviour(model: type) -> tuple[str, ...]:
    """What the properties and methods of a section of a spec do; its fields are in the spec."""
    found = []
    validators = model.__pydantic_decorators__.model_validators
    for base in model.__mro__:
        for name, member in vars(base).items() if base.__module__.startswith(SPEC) else ():
            if name in CHECKS | TOLD or name in validators or name.startswith("__"):
                continue
            function = member.fget if isinstance(member, property) else member
            if inspect.isfunction(function):
                found.append(_function(function))
            elif name in model.__class_vars__ and isinstance(member, str):
                found.append(f"{name} = {member!r}")
    return tuple(found)


def _whole(code: str, sections: Iterable[str], *models: type) -> str:
    """The digest of a stage's code, of what its sections do, and of defaults that have changed."""
    done = sorted({text for model in models for text in _behaviour(model)})
    told = [code, done, *filter(None, [defaults.changed(*sorted(sections))])]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


TRAINED = (
    *("dataset", "skip_scaling", "target"),
    *("training", "training.ema", "training.snapshots", "training.models"),
)
"""Sections of a spec whatever its backbone and formulation."""


@cache
def _file(path: Path | None) -> str:
    """The code of a user's own backbone: of its file, not of what that imports."""
    if path is None:
        return ""
    try:
        return _canonical(ast.parse(path.read_bytes(), filename=str(path)))
    except (SyntaxError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a module of Python ({error})") from None


def _sections(spec: Spec) -> tuple[str, ...]:
    own = (f"backbone {spec.backbone.family}", f"formulation {spec.formulation.kind}")
    return (*TRAINED, "seeds", "backbone", *own)


def _network(spec: Spec) -> tuple[tuple[str, ...], frozenset[str], tuple[type, ...]]:
    """What a run's network, loss and target add: modules, what has no part in it, sections."""
    own = spec.backbone.row.own
    network = [] if own else [spec.backbone.row.module]
    roots = [*network, spec.formulation.implementation.partition(":")[0]]
    stable_target = f"{PACKAGE.name}.diffusion.stf"
    models = (type(spec.formulation), type(spec.skip_scaling), type(spec.training), Snapshots)
    if spec.stable:
        return (*roots, stable_target), DECLARATIONS, models
    return tuple(roots), DECLARATIONS | {stable_target}, models


def _own(spec: Spec) -> str:
    """What a run's spec names and does not hold: its scaling's kind of gate, a user's own code."""
    row = SCALINGS[spec.skip_scaling.method]
    return repr((row.learned, row.shared, _file(spec.backbone.row.own)))


def network(spec: Spec) -> str:
    """Digest of the code of a run's network alone."""
    own = spec.backbone.row.own
    return _whole(_file(own), ()) if own else stage_digest((spec.backbone.row.module,))


@dataclass(frozen=True)
class _Kind:
    """A spec, and a sampler, as far as they decide which code runs: of many runs it is the same."""

    decides: tuple[Any, ...]
    spec: Spec = field(compare=False)
    sampler: SamplerOptions | None = field(default=None, compare=False)

    @classmethod
    def of(cls, spec: Spec, sampler: SamplerOptions | None = None) -> "_Kind":
        own = (spec.backbone.family, spec.formulation.kind, spec.skip_scaling.method, spec.stable)
        whole = (*own, spec.checkpoint is None, type(spec.training), sampler and sampler.kind)
        return cls(whole, spec, sampler)


def training(spec: Spec) -> str:
    """Digest of the code that trains the run of a spec, or imports its weights.

    Another backbone's file, formulation or target has no part in it.
    """
    return _training(_Kind.of(spec))


@cache
def _training(kind: _Kind) -> str:
    spec = kind.spec
    modules, exclude, models = _network(spec)
    verb = "import" if spec.checkpoint is not None else "train"
    code = stage_digest((*_verbs()[verb], *modules), exclude)
    code += _function(Spec.models.fget) + _function(Spec.lineage.fget) + _own(spec)
    return _whole(code, _sections(spec), *models)


def generation(spec: Spec, sampler: SamplerOptions) -> str:
    """Digest of the code that generates the samples of a run with the sampler of that kind."""
    return _generation(_Kind.of(spec, sampler))


@cache
def _generation(kind: _Kind) -> str:
    spec, sampler = kind.spec, kind.sampler
    modules, exclude, models = _network(spec)
    exclude |= {f"{PACKAGE.name}.diffusion.stf"}
    roots = [module for module in modules if module not in exclude]
    walks = sampler.implementation.partition(":")[0]
    code = stage_digest((*_verbs()["generate"], *roots, walks), exclude)
    sections = (*_sections(spec), "measurement", "guidance", f"sampler {sampler.kind}")
    better = repr({number: metric.better for number, metric in NUMBERS.items()})
    code += _own(spec) + _function(guidance_options) + better
    return _whole(code, sections, *models, type(sampler), GuidanceOptions)


def probe(kind: str, specs: Iterable[Spec]) -> str:
    """Digest of the code of a probe that looks at networks of these specs.

    Other probes, and backbones and formulations that none of the specs has, have no part in it.
    """
    roots, models = {PROBES[kind].implementation.partition(":")[0]}, {PROBES[kind]}
    sections, named = {f"probe {kind}"}, set()
    for spec in specs:
        modules, _, parts = _network(spec)
        if PROBES[kind].subject == "study":  # it looks at networks, whatever their targets
            modules = tuple(name for name in modules if not name.endswith(".stf"))
        roots.update(modules)
        models.update(parts)
        sections.update(_sections(spec))
        named.add(_own(spec))
    code = stage_digest((*_verbs()["probe"], *sorted(roots)), DECLARATIONS)
    return _whole(code + "".join(sorted(named)), sections, *models)


@cache
def notebook(path: str) -> str:
    """Digest of the code that a notebook calls; its cells are a file that the workflow watches."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    lines = "\n".join(code).splitlines()
    tree = ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))
    names = {name for name in _imports(tree, "__main__", False) if _path(name, PACKAGE)}
    code = stage_digest(
        (*_verbs()["notebook"], *sorted(name for name in names if not _declared(name)))
    )
    return _whole(code + repr(SCALINGS) + repr(METRICS), ())
