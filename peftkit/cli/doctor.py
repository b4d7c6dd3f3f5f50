"""``peftkit doctor``: show the installed packages, the device, and which path each operation takes and why."""

import json
from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of tables.")
    ] = False,
) -> None:
    """Show what is installed and which path each operation takes on this device."""
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
    facts = Table("", "", title="Environment")
    for name, value in found["environment"].items():
        facts.add_row(name.replace("_", " "), str(value))
    for name, value in found["packages"].items():
        if name not in found["environment"]:
            facts.add_row(name, value or "not installed")
    for name, value in found["cpu"].items():
        facts.add_row(f"CPU: {name}", value)
    paths = Table("operation", "path", "why", title="Operations")
    for row in found["operations"]:
        paths.add_row(row["operation"], row["path"], row["reason"])
    console.print(facts, paths)
    for warning in found["warnings"]:
        console.print(f"[yellow]{warning}")
