"""The parts of a report, independent of the output format."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells.

    Attributes:
        head: Titles of the columns.
        rows: The cells of each row.
        prose: Whether the cells are text, aligned left. If False, all columns but the first are numbers, aligned right.
    """

    head: list[str]
    rows: list[list[str]]
    prose: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the report.

    Attributes:
        title: The title.
        paragraphs: Texts before the tables.
        tables: The tables.
        plot: Name of the plot at the end of the section, or None.
        on_terminal: Whether the section is printed on the terminal at the end of the run.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plot: str | None = None
    on_terminal: bool = True
