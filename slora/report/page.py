"""A report as one self-contained HTML file: text, tables and figures, these as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

import slora
from slora.io.atomic import write_text
from slora.report.style import PALETTE

_FONTS = re.compile(r"'DejaVu Sans'[^;\"]*")
_IDS = re.compile(r'(\bid="|href="#|url\(#)')


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row, the others hold numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure with its alternative text and a caption."""

    figure: Figure
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, a list, a table and pictures, in this order; `folded` sections open on a click."""

    heading: str
    text: Sequence[str] = ()
    points: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()
    folded: bool = False


def render(title: str, lead: str, sections: Sequence[Section], footer: str = "", alert: str = "") -> str:
    """Return the page. Everything but the figures is escaped.

    Args:
        title: of the page, and its first heading.
        lead: the sentences under it, with the main results.
        sections: the rest, in order.
        footer: the last line, after the version of slora.
        alert: a warning in red above the lead.
    """
    source = files("slora.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    numbers = iter(range(10_000))
    return environment.from_string(source).render(
        title=title, lead=lead, sections=sections, footer=footer, alert=alert, version=slora.__version__,
        palette=PALETTE, svg=lambda picture: inline_svg(picture.figure, picture.alt, f"f{next(numbers)}"),
    )  # fmt: skip


def write_page(
    path: Path, title: str, lead: str, sections: Sequence[Section], footer: str = "", alert: str = ""
) -> Path:
    """Write what `render` returns to `path`, atomically, and return `path`.

    Raises:
        WriteError: the file cannot be written; names it, the cause and the remedy.
    """
    write_text(path, render(title, lead, sections, footer, alert))
    return path


def inline_svg(figure: Figure, alt: str, name: str) -> Markup:
    """Return `figure` as an SVG element for HTML.

    Its text is text, its colours are the page's CSS variables, and its ids begin with `name`, which must differ
    between the figures of a page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _FONTS.sub("var(--font)", svg)
    svg = _IDS.sub(rf"\1{name}-", svg)
    for key, (colour, _) in PALETTE.items():
        svg = svg.replace(colour, f"var(--{key})")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(alt)}" ', 1))


def scaled(value: float) -> str:
    """Return `value` to three digits with an SI prefix: 1.23e12 is `1.23 T`."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
