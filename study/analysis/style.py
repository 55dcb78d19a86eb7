"""One look for every picture: a colour per skip scaling, a marker per backbone, a line per target.

Colours are Okabe and Ito's, which colour-blind readers tell apart and which print.
"""

import io
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
import seaborn as sns
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation
from PIL import Image

from study.analysis.names import ALL, MetricName
from study.files import atomic, write_bytes
from study.spec.metrics import NUMBERS
from study.spec.scalings import SCALINGS

WIDTH = 7.2
"""Inches: the text width of a two-column page."""

RC = {
    **sns.axes_style("ticks"),
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.5,
    "figure.dpi": 100,
    "savefig.dpi": 170,
    "svg.hashsalt": "longskip",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}

_DEFAULTS = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}


def look() -> Any:
    """A context in which matplotlib draws in this look alone, whatever it was set to before."""
    return matplotlib.rc_context({**_DEFAULTS, **RC})


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class _Powers(LogFormatterSciNotation):
    """matplotlib's numbers of logarithmic axes, without its mathematics: 10⁻², 2×10⁻²."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        text = super().__call__(x, pos).removeprefix(r"$\mathdefault{").removesuffix("}$")
        text = text.replace(r"\times", "×")
        return re.sub(r"\^\{(.*?)\}", lambda found: found[1].translate(_RAISED), text)


def finish(fig: Figure) -> Figure:
    """The figure with plain words for every power of ten; see ``text.parse_math``."""
    for axes in fig.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for level in ("major", "minor"):
                old = getattr(axis, f"get_{level}_formatter")()
                if type(old) is LogFormatterSciNotation:
                    powers = _Powers(labelOnlyBase=old.labelOnlyBase)
                    getattr(axis, f"set_{level}_formatter")(powers)
    return fig


COLOURS = {name: row.colour for name, row in SCALINGS.items()}
MARKERS = {"uvit": "o", "udit": "s", "patch_unet": "^", "ddpmpp": "D", "ncsnpp": "v"}
SPARE_MARKERS = ("P", "X", "h", "p", "<", ">")
LINES = {"dsm": "-", "stf": (0, (3, 1.2))}
BACKBONES = {
    "uvit": "U-ViT",
    "udit": "U-DiT",
    "patch_unet": "Patch U-Net",
    "ddpmpp": "DDPM++",
    "ncsnpp": "NCSN++",
}
TARGETS = {"dsm": "DSM", "stf": "STF"}


def method(scaling: str) -> str:
    """The method of a scaling's short text: "cs(0.7)" gives "cs"."""
    return scaling.partition("(")[0]


def scaling_label(scaling: str) -> str:
    """ "cs(0.7)" gives "CS 0.7"; the words of the other methods are ScaleLong's."""
    name, _, numbers = scaling.removesuffix(")").partition("(")
    return f"{SCALINGS[name].label} {numbers}".strip() if name in SCALINGS else scaling


def _backbone(line: str) -> tuple[str, str]:
    """The backbone that a line's first word stands for, and what the name adds.

    "uvit_deep" gives ("uvit", "deep"); a name that begins with no known backbone is its own.
    """
    word = re.split(r"[( ]", line)[0]
    for name in sorted(BACKBONES, key=len, reverse=True):
        if word == name or word.startswith(f"{name}_"):
            return name, word[len(name) + 1 :].replace("_", " ")
    return word, ""


def line_label(line: str) -> str:
    """The proper name of a backbone, with whatever else tells its rows apart."""
    if line == ALL:
        return "all backbones"
    first, *rest = line.split(" / ")
    word, bracket, options = first.partition("(")
    name, more = _backbone(word)
    shown = f"{BACKBONES.get(name, name)} {more}".strip()
    gap = " " if bracket else ""
    return " / ".join([shown + gap + bracket + options, *rest])


def target_label(target: str) -> str:
    return TARGETS.get(target, target)


def metric_label(metric: str, extractor: str = "") -> str:
    """ "fd_digits_1797" gives "FD (digits), 1797 images": never "FID" for other features.

    Where a study measured in several ways, the identity follows: ", identity ab12cd34".
    """
    parts = MetricName.parse(metric)
    features = parts.features or (extractor if parts.base not in ("fid",) else "")
    known = NUMBERS.get(parts.base)
    name = known.numbers[parts.base] if known else parts.base
    name += f" ({features})" if features else ""
    name += f", {parts.images} images" if parts.images is not None else ""
    return f"{name}, identity {parts.way}" if parts.way else name


def order_scalings(scalings: Iterable[str]) -> list[str]:
    known = list(COLOURS)

    def rank(scaling: str) -> tuple:
        name = method(scaling)
        place = known.index(name) if name in known else len(known)
        number = re.search(r"[\d.]+", scaling)
        return place, -float(number.group()) if number else 0.0, scaling

    return sorted(set(scalings), key=rank)


def order_lines(lines: Iterable[str]) -> list[str]:
    known = list(BACKBONES)

    def rank(line: str) -> tuple:
        name, _ = _backbone(line)
        return known.index(name) if name in known else len(known), line

    return sorted(set(lines), key=rank)


def order_targets(targets: Iterable[str]) -> list[str]:
    return sorted(set(targets), key=lambda target: (target != "dsm", target))


def scaling_colours(scalings: Iterable[str]) -> dict[str, str]:
    """A colour per scaling; several constants of one method get tints of its colour."""
    answer = {}
    ordered = order_scalings(scalings)
    for scaling in ordered:
        family = [other for other in ordered if method(other) == method(scaling)]
        tint = 0.55 * family.index(scaling) / max(len(family) - 1, 1)
        base = to_rgb(COLOURS.get(method(scaling), "#56b4e9"))
        answer[scaling] = to_hex([part + (1 - part) * tint for part in base])
    return answer


def markers(lines: Iterable[str], families: Mapping[str, str]) -> dict[str, str]:
    """A marker per line: the first of a backbone has that of its family, others the spare ones."""
    free, spare, answer = dict(MARKERS), iter(SPARE_MARKERS * 9), {}
    for line in order_lines(lines):
        answer[line] = free.pop(families[line], None) or next(spare)
    return answer


def figure(width: float = WIDTH, height: float = 3.0) -> Figure:
    """An empty figure that belongs to no window system."""
    return Figure(figsize=(width, height), layout="constrained")


def footer(fig: Figure, text: str) -> None:
    """Small print under a figure: what it is made of. Keeps its own room at the bottom."""
    width, height = fig.get_size_inches()
    lines = textwrap.wrap(text, int(width * 23.5))
    room = (len(lines) * 0.105 + 0.08) / height
    fig.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    fig.text(
        0.008,
        room - 0.03 / height,
        "\n".join(lines),
        fontsize=5.6,
        color="#5a5a5a",
        va="top",
        linespacing=1.25,
    )


def _settle(fig: Figure) -> None:
    """Round the layout: its solver's last digits differ from build to build, and ids in an SVG are
    hashes of exact positions.
    """
    for part in fig.subfigs:
        part.bbox_relative.p0 = part.bbox_relative.p0.round(6)
        part.bbox_relative.p1 = part.bbox_relative.p1.round(6)
    for axes in fig.axes:
        bounds = axes.get_position(original=True).bounds
        axes.set_position([round(number, 6) for number in bounds])


def pixels(figure: Figure) -> bytes:
    """The figure as a PNG of 128 colours: a third of the bytes, and to the eye the same."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", metadata={"Software": None})
    with Image.open(whole) as image:
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(small, "png", optimize=True)
    return small.getvalue()


def save(fig: Figure, path_without_suffix: Any, formats: Iterable[str]) -> list[str]:
    """Write a figure in each format, without dates, so that equal figures are equal bytes."""
    paths = []
    metadata = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    with look():
        # The layout is the slow part and the same for every format: make it once.
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        _settle(fig)
        for suffix in formats:
            path = f"{path_without_suffix}.{suffix}"
            if suffix == "png":
                write_bytes(path, pixels(fig))
            else:
                with atomic(path) as temporary:
                    fig.savefig(temporary, format=suffix, metadata=metadata[suffix])
            paths.append(path)
    return paths
