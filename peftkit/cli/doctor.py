"""``peftkit doctor``: show the machine, the installed packages, what to expect, and which path each operation takes and why."""

import json
from typing import Annotated, Any

import typer

_SHOWN_WITH_THE_MACHINE = ("device", "cpu", "cores")
_MEASURE = "Memory is what a step adds to the loaded model. In a copy of the project, `make bench` measures a CPU and `make gpu` a GPU."


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of tables.")
    ] = False,
) -> None:
    """Show this machine, which speed and memory to expect on it, and which path each operation takes."""
    from peftkit.doctor import diagnose

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = Table(title="Machine", show_header=False)
    for name, value in _machine_rows(found["machine"]):
        machine.add_row(name, value)
    for name, value in found["cpu"].items():
        machine.add_row(f"CPU: {name}", value)
    for name, value in found["gpu"].items():
        machine.add_row(f"GPU: {name}", value)
    facts = Table(title="Environment", show_header=False)
    for name, value in found["environment"].items():
        if name not in _SHOWN_WITH_THE_MACHINE:
            facts.add_row(name.replace("_", " "), str(value))
    for name, value in found["packages"].items():
        if name not in found["environment"]:
            facts.add_row(name, value or "not installed")
    expected = Table(
        *("device", "model and batch", "step time", "memory", "measured on"),
        title="What to expect of a LoRA step: ratio to PEFT, below 1 is better",
    )
    for row in found["expectations"]:
        expected.add_row(row["device"], *_expectation_cells(row))
    paths = Table("operation", "path", "why", title="Operations")
    for row in found["operations"]:
        paths.add_row(row["operation"], row["path"], row["reason"])
    console.print(machine, expected)
    reasons = dict.fromkeys((row["device"], row["why"]) for row in found["expectations"])
    for device, why in reasons:
        if why:
            console.print(f"{device}: {why}.", highlight=False)
    console.print(_MEASURE, highlight=False)
    console.print(facts, paths)
    for warning in found["warnings"]:
        console.print(f"[yellow]{warning}")


def _machine_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    total, available, limit = (
        _gib(machine[name]) for name in ("memory_bytes", "available_bytes", "memory_limit_bytes")
    )
    rows = [
        ("processor", machine["processor"] or "unknown"),
        ("architecture", machine["architecture"] or "unknown"),
        ("instruction sets", machine["instructions"] or "unknown"),
        ("cores", str(machine["cores"])),
        ("memory", f"{total}, available {available}"),
    ]
    if machine["memory_limit_bytes"] is not None:
        rows.append(("memory limit of the container", limit))
    for index, gpu in enumerate(machine["gpus"]):
        facts = f"memory {_gib(gpu['memory_bytes'])}, compute capability {gpu['capability'] or 'unknown'}"
        rows.append((f"GPU {index}", f"{gpu['name'] or 'unknown'}: {facts}"))
    return rows if machine["gpus"] else [*rows, ("GPU", "none")]


def _expectation_cells(row: dict[str, Any]) -> list[str]:
    ratios = [
        basis if value is None else f"{value:.2f} ({basis})"
        for value, basis in (
            (row["step_time"], row["step_time_basis"]),
            (row["memory"], row["memory_basis"]),
        )
    ]
    return [row["model"] or "", *ratios, row["measured_on"] or ""]


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
