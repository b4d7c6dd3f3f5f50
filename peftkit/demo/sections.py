"""The parts a report is made of, whatever it is rendered to."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells.

    Attributes:
        prose: Cells are text to be read, aligned left; else all but the first column are numbers.
    """

    head: list[str]
    rows: list[list[str]]
    prose: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the report.

    Attributes:
        plot: Name of the plot that closes it.
        on_terminal: Whether it is short enough to be printed at the end of the run.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plot: str | None = None
    on_terminal: bool = True
