"""The parts of a page as HTML, and the page around them. Every text is escaped; text between backticks is shown as code."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from peftkit.report_page.charts import Bars, Lines, Stack
from peftkit.report_page.script import SCRIPT
from peftkit.report_page.style import SHEET
from peftkit.report_page.svg import to_svg
from peftkit.report_page.writing import write_bytes


@dataclass(frozen=True, slots=True)
class Tile:
    """A large figure with the words that say what it is."""

    figure: str
    words: str
    wide: bool = False


def page(title: str, *parts: str, lead: str = "") -> str:
    """The whole page.

    Args:
        title: Title and heading.
        parts: The content, as made by the other functions of this module.
        lead: A sentence or two below the heading.
    """
    lead = f'<p class="lead">{inline(lead)}</p>\n' if lead else ""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{SHEET}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{lead}{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Write a page in one step.

    Raises:
        OSError: The file cannot be written.
    """
    write_bytes(path, text.encode())


def section(title: str, *parts: str) -> str:
    """A part of the page with a heading."""
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"
    )


def paragraph(text: str, note: bool = False) -> str:
    """A paragraph; a note is grey."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{inline(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """A list with bullets."""
    return "<ul>" + "".join(f"<li>{inline(text)}</li>" for text in texts) + "</ul>"


def tiles(found: Sequence[Tile]) -> str:
    """Large figures side by side."""
    boxes = ""
    for tile in found:
        kind = ' class="wide"' if tile.wide else ""
        boxes += f"<div{kind}><dt>{escape(tile.figure)}</dt><dd>{escape(tile.words)}</dd></div>"
    return f'<dl class="tiles">{boxes}</dl>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    words: bool = False,
    code: Sequence[int] = (),
    sortable: bool = False,
    keys: Sequence[dict[str, str]] | None = None,
    name: str = "",
) -> str:
    """A table. A wide one scrolls inside the page.

    Args:
        head: Titles of the columns; empty titles for a table without a head.
        rows: The cells: texts, or pairs of a text and the number by which its column is sorted.
        words: Whether the cells are words, aligned left. Otherwise all columns but the first are numbers.
        code: Columns that are shown as code.
        sortable: Whether a click on a title sorts the rows.
        keys: For each row, what filters compare: the value by name.
        name: The name by which ``chosen`` finds the table.
    """
    titles = [
        f'<th scope="col"><button type="button">{escape(h)}</button></th>'
        if sortable
        else f'<th scope="col">{escape(h)}</th>'
        for h in head
    ]
    top = f"<thead><tr>{''.join(titles)}</tr></thead>" if any(head) else ""
    lines = []
    for i, row in enumerate(rows):
        own = "".join(f' data-{k}="{escape(v)}"' for k, v in keys[i].items()) if keys else ""
        cells = "".join(_cell(cell, j in code) for j, cell in enumerate(row))
        lines.append(f"<tr{own}>{cells}</tr>")
    kinds = " ".join(filter(None, ["words" if words else "", "sortable" if sortable else ""]))
    kind = f' class="{kinds}"' if kinds else ""
    label = f' data-table="{escape(name)}"' if name else ""
    body = f"<tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table{kind}{label}>{top}{body}</table></div>'


def _cell(cell: Any, code: bool) -> str:
    text, key = cell if isinstance(cell, tuple) else (cell, None)
    shown = inline(str(text))
    if code and str(text) not in ("", "✓"):
        shown = f"<code>{escape(str(text), quote=False)}</code>"
    return f"<td>{shown}</td>" if key is None else f'<td data-key="{key}">{shown}</td>'


def chosen(
    name: str,
    choices: dict[str, tuple[str, Sequence[str]]],
    *,
    search: bool = False,
    every: bool = True,
) -> str:
    """Controls that show the rows of a table, or the figures, whose keys have the chosen values.

    Args:
        name: The name of the table or the figures.
        choices: For each key its title and its values.
        search: Whether there is a field to search the text of rows.
        every: Whether all values can be chosen together, as at the start. Otherwise the first value is chosen.
    """
    all_of_them = '<option value="">all</option>' if every else ""
    controls = []
    for key, (title, values) in choices.items():
        options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
        controls.append(
            f'<label>{escape(title)}<select data-key="{escape(key)}">{all_of_them}{options}</select></label>'
        )
    if search:
        controls.append('<label>Search<input type="search" placeholder="any text"></label>')
    return f'<div class="filters" data-filters="{escape(name)}">' + "".join(controls) + "</div>"


def command(text: str) -> str:
    """A command with a button that copies it."""
    button = '<button type="button" data-copy>Copy</button>'
    return f'<div class="command"><pre>{escape(text, quote=False)}</pre>{button}</div>'


def details(summary: str, *parts: str) -> str:
    """Content that is shown after a click."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def figure(
    chart: Bars | Lines | Stack, caption: str = "", keys: dict[str, str] | None = None
) -> str:
    """A chart with its caption. ``keys`` are the values that controls compare."""
    own = "".join(f' data-{k}="{escape(v)}"' for k, v in (keys or {}).items())
    caption = f"<figcaption>{inline(caption)}</figcaption>" if caption else ""
    return f"<figure{own}>{to_svg(chart)}{caption}</figure>"


def figures(*found: str, name: str = "") -> str:
    """Figures side by side, or one below the other on a narrow page."""
    label = f' data-figures="{escape(name)}"' if name else ""
    return f'<div class="figures"{label}>' + "".join(found) + "</div>"


def inline(text: str) -> str:
    """Escape a text, and show what is between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
