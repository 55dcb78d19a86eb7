"""What every section of a study is made of."""

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    WrapSerializer,
    model_serializer,
    model_validator,
)

from study.files import UserError, canonical_json

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]

Place = Annotated[
    str,
    StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f]+$"),
    AfterValidator(os.path.expanduser),
]
"""Where a file or folder lies; ``~`` is the user's home."""


class Model(BaseModel):
    """Base of all sections: unknown keys are errors, and so are infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Options(Model):
    """Options of one kind of a thing that has kinds; subclasses say which in ``kind``."""

    model_config = ConfigDict(validate_default=True)

    implementation: ClassVar[str] = ""
    """What does the work, as ``module:name``; it is imported when it is needed."""

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why; a study may not set them."""
        yield from ()

    @model_serializer(mode="wrap")
    def _with_its_kind(self, handler: Any) -> dict[str, Any]:
        """Whatever is left out of the content, as defaults may be, its kind is not."""
        return {"kind": self.kind, **handler(self)}  # type: ignore[attr-defined]


def implementation(place: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def kinds(models: Mapping[str, type[Options]], description: str) -> Any:
    """The type of a value of one of several kinds: a kind's name, or a mapping with its options."""

    def tag(value: Any) -> str | None:
        if isinstance(value, str):
            return "<name>" if value.strip() in models else None
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        return f"<{kind}>" if isinstance(kind, str) and kind in models else None

    def named(value: str) -> Options:
        return models[value.strip()]()

    class Named:
        @classmethod
        def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
            choices = [
                _required_kind(model.model_json_schema(), kind) for kind, model in models.items()
            ]
            names = {"type": "string", "enum": list(models)}
            return {"anyOf": [names, *choices], "description": description}

    # A validator before all of them would end strictness as JSON means it: lists for tuples.
    choices = (
        Annotated[str, AfterValidator(named), Tag("<name>")],
        *(Annotated[model, Tag(f"<{kind}>")] for kind, model in models.items()),
    )
    which = Discriminator(tag, "unknown_kind", f"allowed: {', '.join(models)}")
    return Annotated[
        Union[choices],  # noqa: UP007
        which,
        AfterValidator(refuse_idle),
        Named,
    ]


def _as_given(values: Any, dump: Any) -> Any:
    written = dump(values)
    return written[0] if len(written) == 1 else written


def axis(one: Any) -> Any:
    """The type of a value, or a list of values of which each makes measurements of its own."""

    def tag(value: Any) -> str:
        return "<many>" if isinstance(value, list | tuple) else "<one>"

    def each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
        for number, value in enumerate(values):
            if value in values[:number]:
                raise ValueError(f"entries {values.index(value)} and {number} are the same")
        return values

    choices = (
        Annotated[one, AfterValidator(lambda value: (value,)), Tag("<one>")],
        Annotated[tuple[one, ...], Field(min_length=1), AfterValidator(each_once), Tag("<many>")],
    )
    return Annotated[
        Union[choices],  # noqa: UP007
        Discriminator(tag),
        # One value is written as it was given, not as a list of one.
        WrapSerializer(_as_given),
    ]


def of_kind(models: Mapping[str, type[Options]], content: Any, what: str) -> Any:
    """The checked options of ``{"kind": ..., ...}``; options stay as they are.

    ``what`` names the thing in the ``UserError`` for an unknown kind, key or value.
    """
    if isinstance(content, Options):
        return content
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in models:
        close = difflib.get_close_matches(str(kind), models, n=1)
        hint = f"did you mean {close[0]}?" if close else "allowed: " + ", ".join(models)
        raise UserError(f"{what}: kind {kind!r} is unknown; {hint}")
    try:
        return models[kind].model_validate(content)
    except ValidationError as error:
        where = "." if error.errors()[0]["loc"] else ": "
        raise UserError(f"{what}{where}{one_line(error)}") from None


def one_line(error: ValidationError) -> str:
    """The first fault of a pydantic error, on one line: where, what, and what was given."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {fault['input']!r}" if where else message


def _required_kind(schema: dict[str, Any], kind: str) -> dict[str, Any]:
    schema.pop("title", None)
    rest = {key: value for key, value in schema["properties"].items() if key != "kind"}
    required = [key for key in schema.get("required", ()) if key != "kind"]
    return schema | {
        "properties": {"kind": {"const": kind}, **rest},
        "required": ["kind", *required],
    }


class Shorthand(Model):
    """A section that may also be written as text: ``name`` or ``name(number)``.

    ``_shorthand`` gives the section that such a text stands for.
    """

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _read_shorthand(cls, value: Any) -> Any:
        return cls._shorthand(value) if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        full = handler(core)
        description = (cls.__doc__ or "").strip().splitlines()[0]
        return {"anyOf": [{"type": "string"}, full], "description": description}


def digest(content: Any) -> str:
    """Eight hex digits that stand for ``content``."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:8]


def slug(text: str) -> str:
    """``text`` as a part of a folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def call(text: str) -> tuple[str, str | None]:
    """Split ``name(argument)``."""
    match = re.fullmatch(r"\s*([A-Za-z_0-9]+)\s*(?:\(\s*([^()]*?)\s*\))?\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is neither a name nor name(number)")
    return match[1], match[2]


def number(text: str, of: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{of}({text}): {text!r} is not a number") from None


def refuse_idle(model: Any) -> Any:
    """The model; raises ``ValueError`` for a key that is not at its default and cannot act."""
    fields = type(model).model_fields
    for key, why in model.idle():
        if getattr(model, key) != fields[key].get_default(call_default_factory=True):
            raise ValueError(f"{key} cannot act: {why}; leave it out")
    return model
