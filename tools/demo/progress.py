"""The progress display of the demo: one bar per phase, with loss, speed and memory during training."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Display:
    """Shows progress bars on a terminal. If the console is not a terminal, prints a line at intervals.

    Args:
        console: The console to write to.
        line_every_s: Seconds between the lines of a phase if the console is not a terminal.
    """

    def __init__(self, console: Console, line_every_s: float = 30.0):
        self.console = console
        self._line_every_s = line_every_s
        self._last_line = 0.0
        self._title, self._total = "", 0
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, highlight=False)

    def phase(self, title: str, total: int, done: int = 0) -> None:
        """Start a phase of ``total`` units, of which ``done`` are already finished."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._title, self._total = title, total
        self._task = self._progress.add_task(title, total=total, completed=done, note="")
        self._last_line = time.monotonic()
        if not self.console.is_terminal:
            self.say(f"{title} ...")

    def advance_to(self, done: int, note: str = "") -> None:
        """Show that ``done`` units are finished, with a note such as the loss."""
        assert self._task is not None, "phase comes first"
        self._progress.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= self._line_every_s:
            self._last_line = now
            self.say(f"{self._title} {done}/{self._total} {note}".rstrip())
