"""``peftkit convert``: write an adapter in the form that a server reads."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    adapter: Annotated[
        Path,
        typer.Argument(help="Folder of a LoRA adapter, or of a finished run.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            metavar="per-expert|stacked",
            help="Layout of LoRA on a mixture of experts: one pair for each expert, or PEFT's target_parameters.",
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="One rank and one scale for all modules, without rsLoRA, rank_pattern and alpha_pattern.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Folder or hub id of the base model, for --experts; only its config is read.",
        ),
    ] = None,
) -> None:
    """Write an adapter that computes the same with keys, layout of experts, ranks and scales that more servers read."""
    from peftkit.finetune.using import weights_of
    from peftkit.serving import convert_adapter

    convert_adapter(Path(weights_of(adapter)), out, experts=experts, uniform=uniform, base=base)  # type: ignore[arg-type]
    typer.echo(f"written to {out}")
