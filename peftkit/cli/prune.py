"""``peftkit prune``: a LoRA with smaller ranks, or a model with zeros, in a new folder."""

import json
from pathlib import Path
from typing import Annotated

import typer


def prune(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of an adapter or of a finished run; folder or hub id of a model.",
            show_default=False,
        ),
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
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", help="Share of zeros in each linear layer, such as 0.5."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern", metavar="2:4|4:8", help="Zeros in half of each 4 or 8 neighbours."
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Largest size of one file of a model.")
    ] = "5GB",
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows on which a run is evaluated before and after."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON document.")
    ] = False,
) -> None:
    """Lower the ranks of a LoRA, or set the smallest weights of a model to zero.

    The report is also in prune.json in the new folder.
    """
    from peftkit.cli.finetune import calm, without_known_warnings
    from peftkit.compress import prune as write

    calm()
    with without_known_warnings():
        report = write(
            source,
            out,
            rank=rank,
            energy=energy,
            sparsity=sparsity,
            pattern=pattern,
            data=data,
            max_shard_size=shard_size,
        )
    typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else f"{report}\nwritten to {out}")
