"""The demo: fine-tune SmolLM2-135M-Instruct to turn English requests into JSON records, and report the result."""

from __future__ import annotations

import time
from pathlib import Path

from demo.files import DemoError
from demo.settings import Settings, open_folder

__all__ = ["DemoError", "Settings", "run"]

INTERRUPTED_STATUS = 130


def run(
    out: Path,
    resume: bool = False,
    compare: bool = True,
    json_path: Path | None = None,
    settings: Settings | None = None,
) -> int:
    """Run the demo, or continue it, and print and save its report.

    Args:
        out: Folder for the state of the run, the adapter and the report.
        resume: Continue the run in ``out``.
        compare: Also measure plain PEFT and full fine-tuning, each in a separate process.
        json_path: A further file for the report as JSON.
        settings: The settings of the run; by default those of the demo.

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
    try:
        from demo.phases import (
            run_phases,
        )  # imports torch and transformers, which takes seconds

        return run_phases(
            folder, settings, console, compare=compare, json_path=json_path, began=began
        )
    except (KeyboardInterrupt, Interrupted) as stop:
        reason = str(stop) or "stopped"
        options = "--resume" if Path(out) == Path("out/demo") else f'"--resume --out {out}"'
        console.print(
            f"\n{reason}; continue with: make demo ARGS={options}",
            highlight=False,
            markup=False,
            soft_wrap=True,  # so that the command can be copied
        )
        return INTERRUPTED_STATUS
