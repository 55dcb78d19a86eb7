"""The templates of the pages that people read."""

import jinja2

from study.analysis.words import count


def environment() -> jinja2.Environment:
    """The templates of this package, with everything escaped that they print."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("study.analysis"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["counted"] = count
    return made
