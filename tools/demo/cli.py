"""``make demo``: fine-tune a real model on a task that ships with the project."""

from pathlib import Path
from typing import Annotated

import typer

from demo.settings import DEFAULT_MINUTES, DEFAULT_OUT


def demo(
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")
    ] = False,
    no_compare: Annotated[
        bool,
        typer.Option("--no-compare", help="Skip the runs of plain PEFT and full fine-tuning."),
    ] = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the report as JSON to FILE."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for checkpoints and reports.")
    ] = DEFAULT_OUT,
    minutes: Annotated[
        float,
        typer.Option(
            "--minutes",
            min=1,
            help="Time that the demo may take. If the estimate for this machine is longer, the demo is shorter.",
        ),
    ] = DEFAULT_MINUTES,
) -> None:
    """Fine-tune SmolLM2-135M to turn English requests into JSON records, and report the result."""
    from demo import run

    raise typer.Exit(
        run(out=out, resume=resume, compare=not no_compare, json_path=json_path, minutes=minutes)
    )
