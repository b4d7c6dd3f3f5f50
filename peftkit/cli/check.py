"""``peftkit check``: show what an adapter contains and whether it serves as trained, or what works on an architecture."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def check(
    adapter: Annotated[
        Path | None,
        typer.Argument(help="Folder of an adapter, or of a finished run.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Folder or hub id of the base model; only its config is read.",
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="peft|vllm|sglang|gguf",
            help="The library or server that is to load it; gguf is llama.cpp.",
        ),
    ] = "peft",
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", help="The server's --max-lora-rank."),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            metavar="NAME_OR_CONFIG",
            help="Instead of an adapter: try every method on a tiny model of this architecture. A model type, the path of a "
            "config, or a hub id.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="With --family: try only this method; may be repeated."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of tables.")
    ] = False,
) -> None:
    """Check whether an adapter serves as trained, tensor by tensor, or which methods work on an architecture.

    Exits with status 0 if it does, and with 1 if not, if that depends on a base model that was not given, or if a method fails.
    """
    if (adapter is None) == (family is None):
        raise typer.BadParameter("give either the folder of an adapter or --family NAME_OR_CONFIG")
    if family is not None:
        raise typer.Exit(_family(family, method, as_json))
    raise typer.Exit(_adapter(adapter, target, base, max_rank, as_json))


def _adapter(
    adapter: Any, target: Any, base: str | None, max_rank: int | None, as_json: bool
) -> int:
    from peftkit.finetune.using import weights_of
    from peftkit.serving import serving_report

    found = serving_report(Path(weights_of(adapter)), target, base=base, max_rank=max_rank)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "base": base}, indent=1))
    else:
        _print_adapter(found.facts, found)
    return 0 if found.serves == "as trained" else 1


def _print_adapter(facts: Any, found: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", title=str(facts.folder), show_header=False)
    counted = ", ".join(f"{count} {name}" for name, count in facts.dtypes.items())
    rows = {
        "method": f"{facts.method}, written by {facts.written_by}",
        "trained on": facts.trained_on or "not recorded",
        "tensors": f"{len(facts.shapes)} ({counted}), {facts.parameters:,} numbers, {facts.size_bytes / 2**20:.2f} MiB",
        "modules": ", ".join(f"{name} ({n})" for name, n in facts.modules.items()),
        "keys": "\n".join(_examples(facts.shapes)),
    }
    for kind, sizes in facts.sizes.items():
        rows[kind] = ", ".join(f"{size} ({count} times)" for size, count in sizes.items())
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    console.print(_fates(found))
    for problem in found.problems:
        console.print(Text(f"does not fit: {problem}", style="red"))
    for note in found.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    good = found.serves == "as trained"
    verdict = {
        "as trained": f"loads in {found.target}; serves as trained",
        "not at all": "does not load",
        "unknown": "pass --base to know whether it serves as trained",
    }.get(found.serves, f"serves {found.serves}")
    console.print(Text(f"{found.server}: {verdict}", style="green" if good else "red"))


def _fates(found: Any) -> Any:
    """A table of what happens to the tensors: one row for all tensors of the same kind with the same fate."""
    from rich.table import Table
    from rich.text import Text

    kinds: dict[tuple[str, str, str], int] = {}
    for row in found.rows:
        parts = [part for part in row.subject.split(".") if part not in ("weight", "base_layer")]
        what = ".".join(parts[-2:]) if row.subject in found.facts.shapes else row.subject
        kinds[what, row.verdict, row.why] = kinds.get((what, row.verdict, row.why), 0) + 1
    table = Table("tensor or field", "count", found.target, "why")
    for (what, verdict, why), count in kinds.items():
        style = {"loads": "green", "no effect": "yellow"}.get(verdict, "red")
        table.add_row(Text(what), str(count), Text(verdict, style=style), Text(why))
    return table


def _examples(shapes: dict[str, tuple[int, ...]], shown: int = 4) -> list[str]:
    lines = [f"{key} {list(shape)}" for key, shape in list(shapes.items())[:shown]]
    return lines + ([f"... and {len(shapes) - shown} more"] if len(shapes) > shown else [])


def _family(family: str, methods: list[str] | None, as_json: bool) -> int:
    import transformers

    from peftkit.compatibility import METHODS, family_case, run_cells, tiny_model

    unknown = [name for name in methods or [] if name not in METHODS]
    if unknown:
        raise ValueError(f"--method {unknown[0]!r} is unknown; use one of {', '.join(METHODS)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    built = type(tiny_model(family)).__name__
    outcomes = {name: run_cells(family_case(family), name) for name in methods or METHODS}
    if as_json:
        rows = {
            name: {cell: vars(outcome) for cell, outcome in cells.items()}
            for name, cells in outcomes.items()
        }
        typer.echo(json.dumps({"family": family, "model": built, "methods": rows}, indent=1))
    else:
        _print_family(built, outcomes)
    verdicts = [o.verdict for cells in outcomes.values() for o in cells.values()]
    return 1 if "fails" in verdicts else 0


def _print_family(built: str, outcomes: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("method", *next(iter(outcomes.values())), title=f"A tiny {built}")
    reasons: dict[str, int] = {}
    for method, cells in outcomes.items():
        signs = []
        for outcome in cells.values():
            note = ""
            if outcome.verdict in ("no", "fails"):
                note = f" {reasons.setdefault(outcome.why, len(reasons) + 1)}"
            style = {"yes": "green", "fails": "red"}.get(outcome.verdict, "")
            signs.append(Text(outcome.verdict + note, style=style))
        table.add_row(method, *signs)
    console = Console()
    console.print(table)
    for reason, number in reasons.items():
        console.print(Text(f"{number}. {reason}"))
