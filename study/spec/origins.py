"""Where the settings of a published study come from."""

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from study.spec.base import Model, Name, Shorthand

Origin = Literal["paper", "code", "readme", "ours"]


class Conflict(Model):
    """Another source that says something else."""

    source: Origin = Field(description="Where it stands.")
    value: Any = Field(description="What it says.")
    where: str = Field("", description="File and key, table or section.")
    note: str = Field("", description="Why it was not followed.")


class Source(Shorthand):
    """Where a setting comes from: code(file key), readme(place), paper(place), ours(reason)."""

    source: Origin = Field(description="ours: no source says it; the note says why it is so.")
    where: str = Field("", description="File and key, table or section; not for ours.")
    note: str = Field("", description="What a reader should know; for ours the reason.")
    conflicts: list[Conflict] = Field([], description="Sources that say something else.")

    @classmethod
    def _shorthand(cls, text: str) -> dict[str, Any]:
        match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
        if match is None:
            raise ValueError(f"{text!r} is not of the form code(place) or ours(reason)")
        return {"source": match[1], "note" if match[1] == "ours" else "where": match[2].strip()}

    @model_validator(mode="after")
    def _says_something(self) -> "Source":
        if self.source == "ours" and not self.note:
            raise ValueError("ours needs a note: why the value is what it is")
        if self.source != "ours" and not self.where:
            raise ValueError(f"{self.source} needs where: the place that says so")
        return self


class Repository(Model):
    """A released code."""

    url: str = Field(description="Where it is published.")
    commit: str = Field(description="The commit that was read.")


class Published(Model):
    """The publication that a study follows."""

    paper: str = Field(description="Its name in our table of published numbers.")
    model: str = Field("", description="The model's name in that table.")
    dataset: str = Field("", description="The data set's name in that table.")
    repositories: dict[Name, Repository] = Field(
        {}, description="Released code; places without a repository's name are in the first."
    )
    parameters: int | None = Field(
        None, ge=1, description="Parameters of the network, counted on the released code."
    )
    needs: tuple[str, ...] = Field(
        (), description="What a user brings, and in which form: data, weights."
    )
    differences: tuple[str, ...] = Field(
        (), description="What the publication does and this study does not do, or otherwise."
    )
