"""``peftkit prune``: a smaller LoRA in a new folder."""

import json
from pathlib import Path
from typing import Annotated

import typer


def prune(
    source: Annotated[
        str,
        typer.Argument(help="Folder of an adapter or of a finished run.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the result.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option("--rank", help="Largest rank of a layer of a LoRA.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            help="Share of the squared norm of each layer's update that is kept, such as 0.99.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows on which a run is evaluated before and after."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON document.")
    ] = False,
) -> None:
    """Lower the ranks of a LoRA.

    The report is also in prune.json in the new folder.
    """
    from peftkit.cli.finetune import calm, without_known_warnings
    from peftkit.compress import prune as write

    calm()
    with without_known_warnings():
        report = write(source, out, rank=rank, energy=energy, data=data)
    typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else f"{report}\nwritten to {out}")
