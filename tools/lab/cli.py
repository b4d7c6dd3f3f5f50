"""``make kernels``: list the operations, and verify their GPU kernels on a machine without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

kernels = typer.Typer(
    no_args_is_help=True, help="List the operations and verify their GPU kernels without a GPU."
)

Ops = Annotated[
    list[str] | None,
    typer.Option("--op", metavar="NAME", help="Only this operation; may be repeated."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help='Print one JSON document {"rows": [...]} instead of a table.'),
]
Rows = list[dict[str, Any]]


@kernels.command("list")
def list_(ops: Ops = None, as_json: Json = False) -> None:
    """List the operations: what each computes, its implementations, and what it saves for the backward."""
    from lab import catalogue

    rows = catalogue.rows(ops)
    _show(rows, as_json, "Operations", {"implementations": ", ".join})


@kernels.command()
def check(ops: Ops = None, as_json: Json = False) -> None:
    """Run every kernel in the interpreter and compare the results with the definition in float64.

    Exits with status 1 if an error exceeds its bound, a launch has a data race or accesses memory outside its tensors, or the
    order of programs changes any bit of a result.
    """
    rows = _in_child("check", ops, interpret=True)
    _show(rows, as_json, "Values in the interpreter", {"problems": _sentences})
    if any(row["problems"] for row in rows):
        raise typer.Exit(1)


@kernels.command()
def inspect(
    archs: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            metavar="ARCH",
            help="Target such as cuda:90; may be repeated. Default: cuda:80, cuda:90.",
        ),
    ] = None,
    ops: Ops = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Compile for every target, rank, dtype and size: tens of thousands of compilations, which take hours on two cores.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile every kernel that the dispatcher can choose, and inspect the machine code for real GPUs.

    Exits with status 1 if a kernel spills registers, needs more shared memory than a block has, or does not use tensor cores or
    wide loads.
    """
    from lab import child
    from lab.inventory import known_archs

    options = {"ops": _known(ops), "archs": known_archs(archs or ()), "every": every}
    rows = child.call("aot", "rows", interpret=False, **options)
    hidden = {"aligned", "dram_margin", "bytes_in_flight", "error"}
    formats = {
        "tensor_instructions": _counts,
        "load_widths": _counts,
        "problems": _sentences,
    }
    _show(rows, as_json, "Machine code", formats, hidden)
    if any(row["problems"] for row in rows):
        raise typer.Exit(1)


@kernels.command()
def traffic(ops: Ops = None, as_json: Json = False) -> None:
    """Count the bytes of every launch in the interpreter, and compare them with the prediction's formula and eager torch.

    Exits with status 1 if a launch does not move the bytes that the formula gives.
    """
    rows = _in_child("volumes", ops, interpret=True)
    title = "Bytes, forward and backward in bfloat16 at small sizes"
    _show(rows, as_json, title, {"as_formula": lambda well: "yes" if well else "NO"})
    if not all(row["as_formula"] for row in rows):
        raise typer.Exit(1)


@kernels.command()
def predict(ops: Ops = None, as_json: Json = False) -> None:
    """Predict time and bytes on GPUs with a roofline model, compared with eager torch. Nothing is measured."""
    rows = _in_child("predict", ops, interpret=False)
    shown = rows if as_json else [_prediction(row) for row in rows]
    _show(shown, as_json, "Predicted (not measured), forward and backward in bfloat16", {})


def _prediction(row: dict[str, Any]) -> dict[str, str]:
    """Make a row of the table: fewer columns, each number next to the number of eager torch."""

    def beside(name: str, unit: float, form: str) -> str:
        return f"{row[name] / unit:{form}} / {row['eager_' + name] / unit:{form}}"

    overhead = row["overhead"]
    return {
        "operation": row["op"],
        "M, K, N": f"{row['M']}, {row['K']}, {row['N']}",
        "p": str(row["p"]),
        "device": row["device"],
        "GiB / eager": beside("unique_bytes", 2**30, ".2f"),
        "ms / eager": beside("microseconds", 1e3, ".2f"),
        "kernels / eager": beside("kernels", 1, ".0f"),
        "speedup": f"{row['speedup']:.2f}",
        "over frozen / eager": "" if overhead is None else beside("overhead", 1, "+.0%"),
    }


def _known(ops: list[str] | None) -> list[str]:
    """Return ``ops``, or all ops with Triton kernels if ``ops`` is None."""
    from lab.cases import chosen
    from lab.inventory import OPS

    return chosen(ops, OPS)


def _in_child(module: str, ops: list[str] | None, *, interpret: bool) -> Rows:
    from lab import child

    return child.call(module, "rows", interpret=interpret, ops=_known(ops))


def _show(
    rows: Rows,
    as_json: bool,
    title: str,
    formats: dict[str, Callable[[Any], str]],
    hidden: set[str] | None = None,
) -> None:
    """Print rows as one JSON document, or as a table without the ``hidden`` columns."""
    if as_json:
        typer.echo(json.dumps({"rows": rows}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    columns = [name for name in rows[0] if name not in (hidden or ())]
    table = Table(*(name.replace("_", " ") for name in columns), title=title)
    for row in rows:
        cells = ((row[name], formats.get(name, str)) for name in columns)
        table.add_row(*("" if value is None else form(value) for value, form in cells))
    Console().print(table)


def _sentences(problems: list[str]) -> str:
    return "; ".join(problems) or "none"


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{name}:{count}" for name, count in counts.items())
