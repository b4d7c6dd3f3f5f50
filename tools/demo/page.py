"""Render the report as a single HTML file."""

from __future__ import annotations

from collections.abc import Sequence

from demo.sections import Section, Table
from peftkit.report_page import (
    Tile,
    command,
    figure,
    figures,
    page,
    paragraph,
    section,
    table,
    tiles,
)


def to_html(title: str, lead: str, headline: Sequence[Tile], sections: Sequence[Section]) -> str:
    """Render the page.

    Args:
        title: Title of the page.
        lead: A sentence below the title.
        headline: The large figures at the top.
        sections: The sections of the report.
    """
    return page(title, tiles(headline), *map(_section, sections), lead=lead)


def _section(found: Section) -> str:
    parts = [paragraph(text) for text in found.paragraphs]
    for one in found.commands:
        parts += [paragraph(one.words), command(one.text)]
    if found.charts:
        parts.append(figures(*(figure(chart) for chart in found.charts.values())))
    parts += map(_table, found.tables)
    return section(found.title, *parts)


def _table(found: Table) -> str:
    return table(found.head, found.rows, words=found.prose, code=found.code)
