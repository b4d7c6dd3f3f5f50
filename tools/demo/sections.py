"""The parts of a report, independent of the output format."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftkit.report_page import Bars, Lines


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells.

    Attributes:
        head: Titles of the columns.
        rows: The cells of each row.
        prose: Whether the cells are text, aligned left. If False, all columns but the first are numbers, aligned right.
        code: Columns whose cells are shown as code.
    """

    head: list[str]
    rows: list[list[str]]
    prose: bool = False
    code: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """A command to copy, and the words before it."""

    words: str
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the report.

    Attributes:
        title: The title.
        paragraphs: Texts before everything else.
        tables: The tables.
        charts: The charts by their names as files.
        commands: Commands to copy.
        on_terminal: Whether the section is printed on the terminal at the end of the run.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: dict[str, Bars | Lines] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)
    on_terminal: bool = True
