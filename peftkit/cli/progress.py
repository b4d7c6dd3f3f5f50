"""The last line of the terminal while ``peftkit train`` trains: a bar, loss, speed, memory and the time that is left."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from peftkit.planning.result import size_text

if TYPE_CHECKING:
    from peftkit.finetune.progress import Progress


class TrainingDisplay:
    """Lines of text that stay, above a line that shows the progress.

    Args:
        console: A console of rich. Default: the terminal.
    """

    def __init__(self, console: Any = None):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[facts]}", markup=False),
            console=console or Console(),
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> TrainingDisplay:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        """Show the progress after a step. The line of a training that is finished disappears."""
        if self._task is None:
            self._task = self._bars.add_task("", total=progress.steps, facts="")
        self._bars.update(
            self._task, completed=progress.step, total=progress.steps, facts=facts_of(progress)
        )
        if progress.step >= progress.steps:
            self._bars.remove_task(self._task)
            self._task = None


def facts_of(progress: Progress) -> str:
    """Loss, learning rate, speed, memory and the time that is left, in one line."""
    speed = f"{progress.rows_per_second:.3g} rows/s"
    if progress.tokens_per_second is not None:
        speed = f"{progress.tokens_per_second:,.0f} tokens/s"
    planned = progress.planned_bytes
    memory = f"memory +{size_text(progress.memory_bytes)}" + (
        f" of {size_text(planned)} planned" if planned is not None else ""
    )
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
    loss = "" if progress.loss is None else f"loss {progress.loss:.4g}"
    rate = "" if progress.learning_rate is None else f"lr {progress.learning_rate:.2e}"
    return "  ".join(filter(None, [loss, rate, speed, memory, left]))
