"""Reports: blocks of a self-contained page, and the same tables for a terminal and for Markdown.

A page has no script, no font of its own, and makes no request of any kind. Each block returns
`Html`; every other string that comes in is escaped. What a block looks like is in blocks.html, the
page around it with its style in page.html.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from maestro_kernels.measure import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# Text that is HTML already and is not escaped again.
Html = Markup
_COLOURS = {"good": "green", "bad": "red", "muted": "dim"}


@dataclass(frozen=True)
class Cell:
    """A table cell with a tone: "good", "bad", "muted"; "wide" and "fold" for text that may wrap.

    A wide cell takes room for sentences, a folded one as little as its words allow.
    """

    text: str
    tone: str = ""


Row = Sequence[str | Cell]


def page(
    title: str, sections: Iterable[Html], *, subtitle: str = "", footer: str | Html = ""
) -> str:
    """A whole document: light and dark, readable on a phone, works from file://.

    Args:
        title: heading and window title.
        sections: what `section`, `verdict`, `cards` and the other blocks return, in order.
        subtitle: one line under the title, e.g. machine and date.
        footer: one line at the end.
    """
    return (
        _templates()
        .get_template("page.html")
        .render(title=title, sections=sections, subtitle=subtitle, footer=footer, plots=plots)
    )


def section(title: str, *blocks: Html, lead: str = "") -> Html:
    """A heading, one line that says what to look for, and blocks."""
    return _block("section", title, blocks, lead)


def verdict(sentences: Iterable[str]) -> Html:
    """The answer in plain words, first sentence emphasised."""
    return _block("verdict", sentences)


def warning(text: str) -> Html:
    """A remark the reader must not miss; `code` may stand in it."""
    return _block("warning", text)


def prose(text: str) -> Html:
    """One paragraph; `code` may stand in it."""
    return _block("prose", text)


def cards(entries: Iterable[tuple[str, str]]) -> Html:
    """A row of (value, what it is) tiles."""
    return _block("cards", entries)


def table(
    headers: Sequence[str], rows: Iterable[Row], *, numeric: Iterable[int] = (), caption: str = ""
) -> Html:
    """A table that scrolls inside its own box on a narrow screen.

    Args:
        headers: column titles.
        rows: cells, as text or as `Cell` with a tone.
        numeric: indices of columns that are aligned to the right.
        caption: line above the table.
    """
    return _block("table", headers, [list(map(_cell, row)) for row in rows], set(numeric), caption)


def figure(drawing: Figure, caption: str = "") -> Html:
    """A drawing of plots.py with a caption; what reads pages aloud says its title."""
    return _block("figure", Html(plots.inline(drawing)), drawing.get_label(), caption)


def grid(*figures: Html) -> Html:
    """Figures side by side where there is room, one under the other where there is not."""
    return _block("grid", figures)


def details(summary: str, *blocks: Html) -> Html:
    """Blocks that stay folded until they are asked for."""
    return _block("details", summary, blocks)


def facts(summary: str, values: Mapping[str, object]) -> Html:
    """What a page was made from, name by value, folded; None is left out."""
    lines = [(name, Cell(str(v), "wide")) for name, v in values.items() if v is not None]
    return details(summary, table(("what", "value"), lines))


def terminal_table(
    title: str, headers: Sequence[str], rows: Iterable[Row], *, numeric: Iterable[int] = ()
) -> Table:
    """The same table for a terminal, tones as colours; an empty row draws a line across."""
    from rich.markup import escape as plain
    from rich.table import Table

    right = set(numeric)
    made = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(headers):
        # Figures stay whole; what is no figure may fold.
        justify: Any = "right" if i in right else "left"
        made.add_column(name, justify=justify, no_wrap=i in right, overflow="fold")
    for row in rows:
        if not row:
            made.add_section()
            continue
        cells = []
        for cell in map(_cell, row):
            colour = _COLOURS.get(cell.tone) if cell.text else None
            cells.append(f"[{colour}]{plain(cell.text)}[/]" if colour else plain(cell.text))
        made.add_row(*cells)
    return made


def markdown_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Iterable[int] = ()
) -> list[str]:
    """The lines of the same table in a document."""
    right = set(numeric)
    rule = "|".join("--:" if i in right else "---" for i in range(len(headers)))
    return [
        f"| {' | '.join(headers)} |",
        f"|{rule}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _cell(value: str | Cell) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


@functools.cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("maestro_kernels.measure", ""),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["marked"] = _marked
    return made


def _block(name: str, *args: object) -> Html:
    """A macro of blocks.html."""
    return Html(getattr(_templates().get_template("blocks.html").module, name)(*args))


def _marked(text: str) -> Html:
    """Text in which what stands between backticks is set as code."""
    return Html(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
