"""``peftkit demo``: fine-tune a real model on a task that ships with the project."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    no_compare: Annotated[
        bool,
        typer.Option("--no-compare", help="Leave out the runs of plain PEFT and full fine-tuning."),
    ] = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the report as data to FILE."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where checkpoints and reports go.")
    ] = Path("out/demo"),
) -> None:
    """Fine-tune SmolLM2-135M on English requests to JSON records, and report the result."""
    from peftkit.demo import run

    raise typer.Exit(run(out=out, resume=resume, compare=not no_compare, json_path=json_path))
