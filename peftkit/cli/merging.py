"""``peftkit merge``: merge an adapter into its base model and write a new model folder with a certificate."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def merge(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER [BASE] OUT",
            help="Folder of the adapter, or of a finished run; folder or hub id of the base model (default: the one named in the adapter's config); "
            "new folder for the merged model.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="bf16|fp16|fp32|base",
            help="Dtype of the merged weights; base keeps the storage of the base model.",
        ),
    ] = "bf16",
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="nf4|int8",
            help="Quantise the base model while it is loaded, as it was when the adapter was trained.",
        ),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            metavar="outputs|nearest",
            help="Round the weights by the layers' outputs on the probe, or each by itself.",
        ),
    ] = "outputs",
    probe: Annotated[
        Path | None,
        typer.Option(
            "--probe",
            help="Text file with one text per line on which the models are compared. Default: random token ids.",
        ),
    ] = None,
    min_recovery: Annotated[
        float | None,
        typer.Option(
            "--min-recovery",
            help="Smallest share of the adapter's effect that has to be kept. The default depends on the storage.",
            show_default=False,
        ),
    ] = None,
    any_recovery: Annotated[
        bool, typer.Option("--any-recovery", help="Accept any recovery.")
    ] = False,
    base_weights: Annotated[
        Path | None,
        typer.Option(
            "--base-weights",
            help="With a quantised base: folder of the original model, to merge into its weights.",
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Largest size of one file.")
    ] = "5GB",
    no_certificate: Annotated[
        bool, typer.Option("--no-certificate", help="Do not run the model to compare.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the certificate as one JSON document.")
    ] = False,
) -> None:
    """Merge an adapter into its base model.

    Exits with status 1 if too little of the adapter's effect would be kept. Then no model is written.
    """
    if len(paths) not in (2, 3):
        raise typer.BadParameter(f"give ADAPTER [BASE] OUT, not {len(paths)} paths")
    if any_recovery and min_recovery is not None:
        raise typer.BadParameter("give either --min-recovery or --any-recovery")
    import transformers

    from peftkit.finetune.using import weights_of
    from peftkit.merging import merge as write_merged
    from peftkit.merging.loading import load_for_merging, tokenizer_folder
    from peftkit.merging.mapped import files_of

    transformers.utils.logging.disable_progress_bar()
    adapter, out, base = (
        Path(weights_of(paths[0])),
        paths[-1],
        paths[1] if len(paths) == 3 else None,
    )
    model = load_for_merging(adapter, base, quantize)
    folder = tokenizer_folder(adapter, model)
    texts = None if probe is None else _lines(probe)
    recovery: Any = None if any_recovery else "default" if min_recovery is None else min_recovery
    found = write_merged(
        model,
        out,
        dtype,  # pyright: ignore[reportArgumentType]
        certificate=not no_certificate,
        min_recovery=recovery,
        rounding=rounding,  # pyright: ignore[reportArgumentType]
        probe=texts,
        tokenizer=folder if texts is None else _tokenizer(folder, probe),
        base_weights=base_weights,
        max_shard_size=shard_size,
    )
    read_from = files_of(model.get_base_model()).note
    if as_json:
        facts = {"out_dir": out, "base_read_from": read_from}
        typer.echo(json.dumps(facts | (found.to_dict() if found else {}), indent=1))
    else:
        _print(out, found, read_from)


def _lines(file: Path) -> list[str]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--probe {str(file)!r} has no text")
    return lines


def _tokenizer(folder: Path | None, probe: Path | None) -> Any:
    if folder is None:
        raise ValueError(
            f"--probe {str(probe)!r} needs a tokenizer, but neither the adapter's folder nor the base model's has one"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _print(out: str, found: Any, read_from: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if found is None:
        console.print(Text(f"merged into {out}, without a certificate", style="yellow"))
        console.print(Text(f"base model read from {read_from}"))
        return
    facts, outputs = found.facts, found.outputs
    rows = {
        "adapters": ", ".join(f"{name} ({kind})" for name, kind in facts["adapters"].items()),
        "merged into": facts["merged_into"],
        "base model read from": read_from,
        "stored as": f"{facts['dtype']}, {facts['size_bytes'] / 2**20:.1f} MiB, rounding: {facts['rounding']}",
        "probe": facts["probe"],
        "tokenizer": facts["tokenizer"],
        "layers": str(len(found.layers)),
        "recovery": _number(found.recovery),
        "projection": _number(outputs.projection),
        "effect of the adapter": f"{outputs.effect:.3g} of the outputs",
        "largest difference": f"{outputs.max_abs:.3g}",
    }
    if outputs.kl is not None:
        rows["KL divergence"] = f"{outputs.kl:.3g} nats (base model: {outputs.kl_base:.3g})"
        rows["same most probable token"] = f"{outputs.top_token:.1%} of the positions"
    for first, second in facts["untied"]:
        rows[f"no longer tied to {first}"] = second
    table = Table("", "", title=out, show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    limit = "any" if found.min_recovery is None else f"at least {found.min_recovery}"
    console.print(
        Text(f"merged: recovery {_number(found.recovery)}, {limit} was asked for", style="green")
    )


def _number(value: float | None) -> str:
    return "not defined (no effect)" if value is None else f"{value:.5f}"
