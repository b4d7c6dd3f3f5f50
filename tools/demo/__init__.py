"""The demo: fine-tune SmolLM2-135M-Instruct to turn English requests into JSON records, and report the result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from demo.command import demo_command
from demo.files import DemoError
from demo.settings import DEFAULT_MINUTES, Settings, open_folder, resume_options

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DemoError", "Settings", "run"]

INTERRUPTED_STATUS = 130


def run(
    out: Path,
    resume: bool = False,
    compare: bool = True,
    json_path: Path | None = None,
    settings: Settings | None = None,
    minutes: float = DEFAULT_MINUTES,
) -> int:
    """Run the demo, or continue it, and print and save its report.

    Args:
        out: Folder for the state of the run, the adapter and the report.
        resume: Continue the run in ``out``.
        compare: Also measure plain PEFT and full fine-tuning, each in a separate process.
        json_path: A further file for the report as JSON.
        settings: The settings of the run; by default those of the demo.
        minutes: Time that the run may take. If the estimate for this machine is longer, the run is shorter.

    Returns:
        An exit status: 0, or 1 if plain PEFT or the merged model disagrees, or 130 after Ctrl-C.

    Raises:
        DemoError: A package that the demo needs is missing, or ``out`` does not fit ``resume``.
    """
    from rich.console import Console

    from demo.interrupt import Interrupted
    from demo.model import require_packages

    began = time.perf_counter()
    console = Console()
    settings = settings or Settings()
    require_packages()
    folder = open_folder(Path(out), settings, resume=resume)
    _say_what_happens(console, resume=resume, compare=compare)
    try:
        from demo.phases import (
            run_phases,
        )  # imports torch and transformers, which takes seconds

        return run_phases(
            folder,
            settings,
            console,
            compare=compare,
            json_path=json_path,
            began=began,
            minutes=minutes,
        )
    except (KeyboardInterrupt, Interrupted) as stop:
        reason = str(stop) or "stopped"
        console.print(
            f"\n{reason}; continue with: {demo_command(resume_options(Path(out)))}",
            highlight=False,
            markup=False,
            soft_wrap=True,  # so that the command can be copied
        )
        return INTERRUPTED_STATUS


def _say_what_happens(console: Console, *, resume: bool, compare: bool) -> None:
    """Print the opening lines, before the imports that take seconds."""
    last = ", compares time and memory with plain PEFT and full fine-tuning" if compare else ""
    text = (
        "This demo fine-tunes a real language model, SmolLM2-135M-Instruct, on this machine. The model learns to turn English "
        f"requests into JSON records. The demo measures it before and after, checks that plain PEFT loads the result{last}, and "
        "writes a report."
    )
    if resume:
        text += " It continues where it stopped."
    else:
        text += " First it unpacks the weights and times this machine, in about a minute; then it says how long the rest takes."
    console.print(text, highlight=False, markup=False)
