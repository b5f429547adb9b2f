"""Building blocks of a self-contained HTML page: no script, no font, no request of any kind.

Each block returns `Html`; every other string that comes in is escaped. Reports put the blocks
together: report.py for benchmark rows, and the sentence-encoder job for its own findings.
"""

from __future__ import annotations

import datetime
import html
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

__all__ = [
    "Cell",
    "Html",
    "cards",
    "details",
    "figure",
    "grid",
    "page",
    "prose",
    "section",
    "table",
    "verdict",
    "warning",
    "when",
]


class Html(str):
    """Text that is HTML already and must not be escaped again."""


@dataclass(frozen=True)
class Cell:
    """A table cell with a tone: "good", "bad", "muted"; "wide" and "fold" for text that may wrap.

    A wide cell takes room for sentences, a folded one as little as its words allow.
    """

    text: str
    tone: str = ""


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
    template = resources.files("maestro_kernels.benchmark").joinpath("page.html")
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=_text(title),
        subtitle=f'<p class="subtitle">{_text(subtitle)}</p>' if subtitle else "",
        body="\n".join(sections),
        footer=f"<footer>{_text(footer)}</footer>" if footer else "",
    )


def section(title: str, *blocks: Html, lead: str = "") -> Html:
    """A heading, one line that says what to look for, and blocks."""
    intro = f'<p class="lead">{_marked(lead)}</p>' if lead else ""
    return Html(f"<section><h2>{_text(title)}</h2>{intro}{''.join(blocks)}</section>")


def verdict(sentences: Iterable[str]) -> Html:
    """The answer in plain words, first sentence emphasised."""
    return Html(f'<div class="verdict">{"".join(map(prose, sentences))}</div>')


def when(time: str) -> str:
    """An ISO time as people write it: "2026-11-21, 13:04 UTC"."""
    moment = datetime.datetime.fromisoformat(time).astimezone(datetime.timezone.utc)
    return f"{moment:%Y-%m-%d, %H:%M} UTC"


def warning(text: str) -> Html:
    """A remark the reader must not miss; `code` may stand in it."""
    return Html(f'<div class="warning">{_marked(text)}</div>')


def prose(text: str) -> Html:
    """One paragraph; `code` may stand in it."""
    return Html(f"<p>{_marked(text)}</p>")


def cards(entries: Iterable[tuple[str, str]]) -> Html:
    """A row of (value, what it is) tiles."""
    tiles = (
        f'<div class="card"><b>{_text(v)}</b><span>{_text(k)}</span></div>' for v, k in entries
    )
    return Html(f'<div class="cards">{"".join(tiles)}</div>')


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    *,
    numeric: Iterable[int] = (),
    caption: str = "",
) -> Html:
    """A table that scrolls inside its own box on a narrow screen.

    Args:
        headers: column titles.
        rows: cells, as text or as `Cell` with a tone.
        numeric: indices of columns that are aligned to the right.
        caption: line above the table.
    """
    right = set(numeric)
    head = "".join(
        f'<th scope="col"{_classes("num" if i in right else "")}>{_text(name)}</th>'
        for i, name in enumerate(headers)
    )
    body = []
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        body.append(
            "".join(
                f"<td{_classes('num' if i in right else '', cell.tone)}>{_text(cell.text)}</td>"
                for i, cell in enumerate(cells)
            )
        )
    lines = "".join(f"<tr>{line}</tr>" for line in body)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll" tabindex="0"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def figure(svg: Html, caption: str = "") -> Html:
    """An inline drawing with a caption."""
    text = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{svg}{text}</figure>")


def grid(*figures: Html) -> Html:
    """Figures side by side where there is room, one under the other where there is not."""
    return Html(f'<div class="grid">{"".join(figures)}</div>')


def details(summary: str, *blocks: Html) -> Html:
    """Blocks that stay folded until they are asked for."""
    return Html(f"<details><summary>{_text(summary)}</summary>{''.join(blocks)}</details>")


def _classes(*names: str) -> str:
    used = " ".join(name for name in names if name)
    return f' class="{used}"' if used else ""


def _marked(value: str) -> str:
    """As `_text`, with what stands between backticks set as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(value))


def _text(value: str) -> str:
    return value if isinstance(value, Html) else html.escape(value)
