"""``peftkit plan``: the memory of a training step before anything is loaded, or settings that fit into a given memory."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of the base model; only its config is read.", show_default=False
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="lora|dora|full|bottleneck|prefix", help="What is trained."
        ),
    ] = "lora",
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="bf16|fp16|fp32|int8|nf4|fp8", help="How the base model is stored."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows of a batch. Default: 1.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", help="Tokens of each row. Default: 1024.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="Rank, bottleneck size or number of virtual tokens. Default: 16."
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer",
            metavar="adamw|adamw_fused|adamw_8bit|adafactor|sgd",
            help="Default: adamw_fused, as in Trainer.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="cpu, cuda, or a card such as H100. Default: this machine's."
        ),
    ] = None,
    auto_class: Annotated[
        str | None,
        typer.Option("--auto-class", help="Class of the model, such as AutoModelForCausalLM."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="Search for settings that fit into SIZE, such as 24GiB. Options that are given are kept.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write the settings, with --fit the fastest, as a recipe of peftkit train.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write the plan, with --fit that of the fastest settings, as a page.",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image",
            "--png",
            metavar="FILE",
            help="Write its stacked bar as a picture: .png (needs matplotlib) or .svg.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show how much memory a training step needs, or which settings fit.

    Exits with status 1 if nothing fits. Sizes on a GPU and speeds are predictions.
    """
    import transformers

    from peftkit.planning import MemoryPlan, fit
    from peftkit.planning import plan as make_plan
    from peftkit.planning.recipe import configs_of, write_recipe

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: Any
    if budget is not None:
        found = fit(
            model,
            budget,
            method=method,
            base=base,
            batch_size=batch_size,
            seq_len=seq_len,
            rank=rank,
            checkpointing=checkpointing,
            optimizer=optimizer,
            device=device,
            auto_class=auto_class,
        )
        best = found.options[0].plan if found.options else None
    else:
        rank = 16 if rank is None else rank
        found = best = make_plan(
            model,
            *configs_of(method, rank),
            base=base or "auto",  # type: ignore[arg-type]
            batch_size=1 if batch_size is None else batch_size,
            seq_len=1024 if seq_len is None else seq_len,
            optimizer=optimizer or "adamw_fused",  # type: ignore[arg-type]
            checkpointing=bool(checkpointing),
            device=device,
            auto_class=auto_class,
        )
        found.settings.update(method=method, rank=rank)
    written = []
    if best is not None:
        writers = ((out, write_recipe), (html, MemoryPlan.to_html), (image, MemoryPlan.to_image))
        for path, write in writers:
            if path is not None:
                write(best, path)
                written.append(path)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found, budget is not None)
        for path in written:
            typer.echo(f"written to {path}")
    if best is None:
        raise typer.Exit(1)


def _print(found: Any, is_fit: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from peftkit.planning.result import size_text

    console = Console()
    if not is_fit:
        console.print(Text(str(found)))
        return
    if found.nearest is not None:
        console.print(Text(str(found), style="red"))
        return
    names = ("base", "batch_size", "seq_len", "rank", "checkpointing", "optimizer")
    headers = [name.replace("_", " ") for name in names]
    table = Table(
        "speed", "memory", *headers, title=f"What fits into {size_text(found.budget_bytes)}"
    )
    for option in found.options:
        settings = option.plan.settings
        cells = [str(settings[name]) for name in names]
        table.add_row(f"{option.relative:.2f}", size_text(option.plan.reserved_bytes), *cells)
    console.print(table)
    console.print(
        "speed: tokens per second relative to the first row, predicted by the data sheet",
        highlight=False,
    )
