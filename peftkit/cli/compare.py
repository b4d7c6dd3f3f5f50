"""``peftkit compare``: strategies against simpler baselines, on the same data, budget and seed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE ...", help="Values that replace the recipe's.", show_default=False
        ),
    ] = None,
    strategies: Annotated[
        str,
        typer.Option(
            "--strategies",
            help="Names with commas between them, or a list in YAML: [full, {name: lora, r: 8, lr: 1e-4}].",
        ),
    ] = "full,lora",
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="Held-out rows of the kind that the model was pretrained on; measures what is forgotten.",
        ),
    ] = None,
    source_task: Annotated[
        str | None,
        typer.Option("--source-task", help="The task whose loss is measured on them."),
    ] = None,
    forget_limit: Annotated[
        float,
        typer.Option(
            "--forget-limit", help="Share by which that loss may rise before there is a warning."
        ),
    ] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the result.")] = False,
) -> None:
    """Compare strategies with the pretrained model, a linear probe and training from scratch."""
    from peftkit.finetune import compare as run

    say = (lambda line: None) if quiet or as_json else typer.echo
    found = run(
        recipe,
        _strategies(strategies),
        *(overrides or []),
        source=source,
        source_task=source_task,
        forget_limit=forget_limit,
        say=say,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, default=str))
        return
    for row in found.rows:
        quality = "" if row.quality is None else f"{row.quality:.4g}"
        typer.echo(f"{row.name}: {found.metric.removeprefix('eval_')} {quality}")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"report: {found.folder / 'report.md'}")


def _strategies(text: str) -> list[Any]:
    import yaml

    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"--strategies {text!r} is no list in YAML ({error})") from None
    return list(found)
