"""The progress display of the demo: one bar per phase, with loss, speed and memory during training."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Display:
    """Shows progress bars on a terminal. If the console is not a terminal, prints a line at intervals.

    Args:
        console: The console to write to.
        phases: Number of phases, which the titles then mention: "phase 2 of 8".
        line_every_s: Seconds between the lines of a phase if the console is not a terminal.
    """

    def __init__(self, console: Console, phases: int | None = None, line_every_s: float = 30.0):
        self.console = console
        self._phases, self._line_every_s = phases, line_every_s
        self._last_line = self._began = 0.0
        self._title, self._total, self._first, self._unit = "", 0, 0, ""
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counted]}"),
            TextColumn("{task.fields[note]}"),
            TextColumn("left:"),
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
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def phase(
        self, title: str, total: int, done: int = 0, unit: str = "", number: int | None = None
    ) -> None:
        """Start a phase of ``total`` units, of which ``done`` are already finished.

        Args:
            title: What the phase does.
            total: Number of units.
            done: Number of units that are finished.
            unit: What is counted, in the plural.
            number: Number of the phase; by default the title has none.
        """
        if self._task is not None:
            self._progress.remove_task(self._task)
        if number is not None and self._phases is not None:
            title = f"phase {number} of {self._phases}: {title}"
        self._title, self._total, self._first, self._unit = title, total, done, unit
        self._task = self._progress.add_task(
            title, total=total, completed=done, note="", counted=self._counted(done)
        )
        self._last_line = self._began = time.monotonic()
        if not self.console.is_terminal:
            self.say(f"{title} ...")

    def advance_to(self, done: int, note: str = "") -> None:
        """Show that ``done`` units are finished, with a note such as the loss."""
        assert self._task is not None, "phase comes first"
        self._progress.update(self._task, completed=done, note=note, counted=self._counted(done))
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= self._line_every_s:
            self._last_line = now
            parts = [f"{self._title}: {self._counted(done)}", note, self._left(done, now)]
            self.say(", ".join(filter(None, parts)))

    def _counted(self, done: int) -> str:
        return f"{done:,}/{self._total:,} {self._unit}".rstrip()

    def _left(self, done: int, now: float) -> str:
        if not self._first < done < self._total:
            return ""
        rate = (now - self._began) / (done - self._first)
        return f"about {duration(rate * (self._total - done))} left"


def duration(seconds: float) -> str:
    """A time in words that suit its length: ``"40 s"``, ``"3 min"``, ``"1 h 05 min"``."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
