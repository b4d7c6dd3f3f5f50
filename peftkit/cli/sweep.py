"""``peftkit sweep``: adapters with different options, trained on one frozen model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.finetune import calm, without_known_warnings


def sweep(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE ...",
            help="Values that replace the recipe's; resume=true continues a sweep.",
            show_default=False,
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="KEY=VALUE,VALUE",
            help="A key and the values that are tried, such as strategy.r=4,8,16; may be given several times.",
        ),
    ] = None,
    keep_best: Annotated[
        int | None,
        typer.Option(
            "--keep-best",
            help="Keep so many adapters after a share of the steps, by their evaluation loss, and stop the others.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[
        float, typer.Option("--after", help="The share of the steps before --keep-best.")
    ] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the result.")] = False,
) -> None:
    """Train LoRA adapters with different options on one frozen model.

    Exits with status 0 if all runs are finished or dropped, 1 if a run has a fault, and 3 if they were stopped with checkpoints.
    """
    calm()
    from peftkit.finetune import sweep as run

    say = (lambda line: None) if quiet or as_json else typer.echo
    with without_known_warnings():
        found = run(
            recipe, over or [], *(overrides or []), keep_best=keep_best, after=after, say=say
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, default=str))
    else:
        for row in found.rows:
            quality = "" if row.quality is None else f" {row.quality:.4g}"
            typer.echo(f"{row.name}: {found.metric.removeprefix('eval_')}{quality} ({row.status})")
        typer.echo(f"best: {found.best or 'not known'}")
        typer.echo(f"report: {found.folder / 'report.md'}")
    for row in found.rows:
        for problem in row.problems:
            typer.echo(f"error: {row.name}: {problem}", err=True)
    stopped = any(row.status == "stopped" for row in found.rows)
    raise typer.Exit(1 if any(row.problems for row in found.rows) else 3 if stopped else 0)
