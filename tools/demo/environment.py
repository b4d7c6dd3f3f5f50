"""The facts of the report about the machine, the versions and the time of a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from peftkit.report_page.machine import machine_facts

_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """The machine and the versions by name, and the commit of the project if it is a git repository."""
    facts = machine_facts()
    found = commit()
    return facts | ({"commit": found} if found else {})


def commit() -> str | None:
    """The commit of the project, with "changed" if tracked files differ from it; ``None`` without git."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(_ROOT), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}, changed" if changes else head
