"""Running scripts in fresh processes, and storing results: one JSON file per benchmark, and a table in the README."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def run_script(name: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder in a fresh process; its last printed line is the result, as JSON."""
    command = [sys.executable, str(HERE / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join([name, *arguments])} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def save(result: dict[str, Any], name: str) -> None:
    """Write a result to its file in one step, so that no partial file is left."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def load(name: str) -> dict[str, Any]:
    """Read the result that ``save`` wrote.

    Raises:
        SystemExit: There is no result of this name.
    """
    path = HERE / "results" / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; run its benchmark first")
    return json.loads(path.read_text())


def update_readme(mark: str, text: str) -> None:
    """Replace the text between the marks named ``mark`` in the README."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    page = README.read_text()
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"README.md lacks the marks {begin} and {end}; add them first")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def environment() -> dict[str, Any]:
    """The processor, the number of threads and the package versions, on which the figures depend."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in cpuinfo.read_text().splitlines()
        if "model name" in line
    ]
    packages = ("torch", "transformers", "peft", "peftkit")
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        **{package: version(package) for package in packages},
    }


def machine(found: dict[str, Any]) -> str:
    """The processor and threads of an ``environment``, for the heading of a table."""
    return f"{found['cpu']}, {found['threads']} threads"
