"""A study's mistakes in one line each: key, value, and what is allowed."""

import difflib
import json
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from study.files import UserError


def _number_in_text(value: Any, whole: bool) -> str | None:
    """What to say of a text that is meant as a number; ``None`` of anything else."""
    if not isinstance(value, str):
        return None
    text = value.strip().replace("_", "")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if not number.is_finite() or abs(number.adjusted()) > 300:
        return None
    if whole and number != int(number):
        return f"{value!r} is text, and not a whole number"
    right = str(int(number)) if whole else f"{float(number):.15g}"
    if "e" in right and "." not in right:
        right = right.replace("e", ".0e")
    elif not whole and "e" not in right and "e" in text.lower():
        mantissa, _, power = text.lower().partition("e")
        right = f"{float(mantissa)}e{int(power):+d}"
    if "e" in text.lower() and not re.fullmatch(r"[-+]?\d*\.\d*[eE][-+]\d+", text):
        why = "YAML 1.1 reads a number with an exponent only with a point and a sign"
    else:
        why = "it stands in quotes"
    return f"{value!r} is text ({why}); write {right}"


def _siblings(model: Any, place: tuple[Any, ...]) -> list[str]:
    """Field names of the section that holds the last key of ``place``."""
    found = _models(model)
    for part in place[:-1]:
        if str(part).startswith("<"):
            of_kind = [one for one in found if f"<{_kind(one)}>" == part]
            found = of_kind or found
        elif found and part in found[0].model_fields:
            found = _models(found[0].model_fields[part].annotation) or found
    return list(found[0].model_fields) if found else []


def _kind(model: type[BaseModel]) -> Any:
    """The kind of options; nothing for a section that has none."""
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value of this type may be."""
    return [
        kind for kind in _walk(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]


def _walk(annotation: Any) -> list[Any]:
    nested = [item for part in getattr(annotation, "__args__", ()) for item in _walk(part)]
    return [annotation, *nested]


def _place(item: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where a mistake is, without the parts that name a branch of a union."""
    pydantic = r"\[|^<|^Grid$|^function|^tuple|^int$|^constrained-int$"
    return tuple(
        part for part in item["loc"] if isinstance(part, int) or not re.search(pydantic, part)
    )


def _of_another_branch(item: Any, others: list[Any]) -> bool:
    """Whether a union has a branch of the value's own type, whose mistake says more."""
    place = _place(item)
    return item["type"].endswith("_type") and any(
        _place(other)[: len(place)] == place
        and (not other["type"].endswith("_type") or others.index(other) < others.index(item))
        for other in others
        if other is not item
    )


def explain(
    error: ValidationError, model: Any, prefix: str = "", whole: str = "study"
) -> list[str]:
    """One line per mistake: key, value, and what is allowed. ``whole`` is the key of the model."""
    lines = []
    details = error.errors()
    for item in details:
        if _of_another_branch(item, details):
            continue
        where = _place(item)
        if item["type"] == "too_short" and any(
            other["loc"][: len(item["loc"])] == item["loc"] and other is not item
            for other in details
        ):
            continue  # a list of which no item was valid: the items' own mistakes say why
        key = prefix + ".".join(str(part) for part in where)
        key = re.sub(r"\.(\d+)", r"[\1]", key if where else key.rstrip(".: ")) or whole
        if key.startswith("grid[0]") and not any(o["loc"][:2] == ("grid", 1) for o in details):
            key = "grid" + key.removeprefix("grid[0]")
        value, kind = item["input"], item["type"]
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        if kind == "extra_forbidden":
            known = _siblings(model, item["loc"])
            close = difflib.get_close_matches(str(where[-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif kind == "missing" and where and isinstance(where[-1], int):
            lines.append(f"{key.rpartition('[')[0]}: too few values; got {shown}")
        elif kind == "missing":
            lines.append(f"{key}: missing")
        elif kind == "unknown_kind" and isinstance(value, str):
            lines.append(f"{key}: kind {value!r} is unknown; {item['msg']}")
        elif kind == "unknown_kind" and not isinstance(value, Mapping):
            lines.append(f"{key}: neither a kind nor a mapping with its options; got {shown}")
        elif kind == "unknown_kind" and "kind" not in value:
            lines.append(f"{key}.kind: missing")
        elif kind == "unknown_kind":
            lines.append(f"{key}: kind {value['kind']!r} is unknown; {item['msg']}")
        elif kind in ("float_type", "int_type") and _number_in_text(value, kind == "int_type"):
            lines.append(f"{key}: {_number_in_text(value, kind == 'int_type')}")
        elif kind == "int_type" and isinstance(value, float) and value.is_integer():
            lines.append(f"{key}: a whole number is written without point; write {int(value)}")
        elif kind == "string_type" and isinstance(value, int | float):
            lines.append(f"{key}: {shown} is no text to YAML; write it in quotes")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if kind != "value_error":
                message = message[0].lower() + message[1:]
            lines.append(f"{key}: {message}; got {shown}")
    return list(dict.fromkeys(lines))


_adapter = cache(TypeAdapter)


def check(model: Any, value: Any, prefix: str = "") -> Any:
    """A value of type ``model``, strictly: text is never read as a number.

    Raises ``UserError`` with one line per mistake, whose key begins with ``prefix``.
    """
    for key, leaf in leaves(value, prefix.rstrip(".")).items():
        for number in leaf if isinstance(leaf, list | tuple) else (leaf,):
            if isinstance(number, int) and abs(number) >= 2**63:
                raise UserError(f"{key}: {str(number)[:20]}... is beyond 64 bits")
    try:
        return _adapter(model).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise UserError(*explain(error, model, prefix)) from None


def leaves(content: Any, where: str = "") -> dict[str, Any]:
    """Every value that a study's content sets, by its key: ``training.lr``, ``arms[0].seed``.

    Mappings and lists of mappings are followed; other lists are values.
    """
    if isinstance(content, Mapping) and content:
        items = [(f"{where}.{key}" if where else str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple) and any(isinstance(v, Mapping) for v in content):
        items = [(f"{where}[{number}]", value) for number, value in enumerate(content)]
    else:
        return {where: content}
    return {key: leaf for path, value in items for key, leaf in leaves(value, path).items()}
