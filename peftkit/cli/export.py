"""``peftkit export``: write a model, or an adapter alone, as a GGUF file for llama.cpp."""

import json
from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a model, of an adapter that is merged into its base model, or of a finished run.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The file OUT.gguf to write.", show_default=False)],
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write GGUF, which is the only format and the default.")
    ] = True,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="f32|f16|bf16|q8_0",
            help="How matrices are stored. Default: f16; with --adapter-only f32.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="Folder or hub id of an adapter's base model."
        ),
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only",
            help="Write only the adapter, for llama.cpp's --lora. The base model's weights are not read.",
        ),
    ] = False,
    bound: Annotated[
        float | None,
        typer.Option(
            "--bound", help="Largest accepted difference of the logits. Default: by --dtype."
        ),
    ] = None,
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer/--no-tokenizer", help="Write the tokenizer.")
    ] = True,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            "--pre-tokenizer", help="llama.cpp's name for the way the tokenizer splits text."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a GGUF file, read it back, and compare its logits with the model's. No file is left if they differ too much."""
    from peftkit.export import export_adapter_gguf, export_gguf
    from peftkit.finetune.using import weights_of

    model = Path(weights_of(model))
    if adapter_only:
        export_adapter_gguf(model, out, base=base, dtype=dtype or "f32")  # type: ignore[arg-type]
        typer.echo(json.dumps({"path": str(out)}) if as_json else f"written to {out}")
        return
    report = export_gguf(
        model,
        out,
        tokenizer=None if tokenizer else False,
        dtype=dtype or "f16",  # type: ignore[arg-type]
        base=base,
        bound=bound,
        pre_tokenizer=pre_tokenizer,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
        return
    typer.echo(
        f"written to {out}: {report.architecture}, {report.tensors} tensors in {report.dtype}, "
        f"{report.size_bytes / 2**20:.1f} MiB"
    )
    typer.echo(
        f"logits read back by transformers: difference {report.difference:.2g} (bound {report.bound:g}), "
        f"{report.same_choice:.1%} of the most probable tokens are the same"
    )
    for note in report.notes:
        typer.echo(f"note: {note}")
