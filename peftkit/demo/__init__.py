"""The main job: fine-tune SmolLM2-135M-Instruct to turn English requests into JSON records, and report what came of it."""

from __future__ import annotations

import time
from pathlib import Path

from peftkit.demo.files import DemoError
from peftkit.demo.settings import Settings, open_folder

__all__ = ["DemoError", "Settings", "run"]

INTERRUPTED_STATUS = 130


def run(
    out: Path,
    resume: bool = False,
    compare: bool = True,
    json_path: Path | None = None,
    settings: Settings | None = None,
) -> int:
    """Run the demo, or what is left of it, and print and save its report.

    Args:
        out: Folder of the run: state, adapter and report.
        resume: Go on with the run in ``out``.
        compare: Also measure plain PEFT and full fine-tuning, each in a process of its own.
        json_path: Where else to write the report as data.
        settings: What the run is defined by; the defaults are the demo.

    Returns:
        An exit status: 0, 1 if plain PEFT or the merged model disagrees, 130 after Ctrl-C.

    Raises:
        DemoError: A package of the ``demo`` extra is missing, or ``out`` does not fit ``resume``.
    """
    from rich.console import Console

    from peftkit.demo.interrupt import Interrupted
    from peftkit.demo.model import require_extra

    began = time.perf_counter()
    console = Console()
    settings = settings or Settings()
    require_extra()
    folder = open_folder(Path(out), settings, resume=resume)
    try:
        from peftkit.demo.phases import run_phases  # loads torch and transformers: seconds

        return run_phases(
            folder, settings, console, compare=compare, json_path=json_path, began=began
        )
    except (KeyboardInterrupt, Interrupted) as stop:
        reason = str(stop) or "stopped"
        option = "" if Path(out) == Path("out/demo") else f" --out {out}"
        console.print(
            f"\n{reason}; go on with: peftkit demo --resume{option}", highlight=False, markup=False
        )
        return INTERRUPTED_STATUS
