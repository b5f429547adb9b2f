"""Blocks of a page, and the same tables for a terminal and for a document."""

import io
import re

from rich.console import Console

from maestro_kernels.measure import report as html


def test_blocks_escape_text_and_keep_html():
    table = html.table(("a<", "b"), [("1<2", html.Cell("x&y", "good"))], numeric=[0], caption="c")
    assert "a&lt;" in table
    assert '<td class="num">1&lt;2</td>' in table
    assert '<td class="good">x&amp;y</td>' in table
    page = html.page("t<", [html.section("s", html.prose("p"), html.Html("<svg/>"))])
    assert "<title>t&lt;</title>" in page
    assert "<section><h2>s</h2><p>p</p><svg/></section>" in page
    assert not re.search(r"\$|\{\{|\{%", page)


def test_the_same_table_is_written_for_a_terminal_and_for_a_document():
    lines = [("a [b]", html.Cell("1.5", "good")), (), ("c", "2")]
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(html.terminal_table("t", ("name", "value"), lines, numeric=[1]))
    text = console.export_text(styles=True)
    assert "a [b]" in text
    assert "\x1b[32m1.5\x1b[0m" in text
    assert html.markdown_table(("name", "value"), [("a", "1.5")], numeric=[1]) == [
        "| name | value |",
        "|---|--:|",
        "| a | 1.5 |",
    ]
