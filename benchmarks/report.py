"""Running scripts in fresh processes, and storing their results: one JSON file per benchmark."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peftkit.errors import count

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def run_script(name: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder in a fresh process; its last printed line is the result, as JSON."""
    command = [sys.executable, str(HERE / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join([name, *arguments])} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(result: dict[str, Any], name: str) -> None:
    """Write a result to its file in one step, so that no partial file is left."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def load(name: str) -> dict[str, Any]:
    """Read the result that ``save`` wrote.

    Raises:
        SystemExit: There is no result of this name.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; run its benchmark first")
    return json.loads(path.read_text())


def environment() -> dict[str, Any]:
    """The processor, the instructions that torch uses, the number of threads and the package versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in cpuinfo.read_text().splitlines()
        if "model name" in line
    ]
    packages = ("torch", "transformers", "peft", "peftkit")
    return {
        "cpu": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        **{package: version(package) for package in packages},
    }


def machine(found: dict[str, Any]) -> str:
    """The processor, threads and, if they were recorded, instructions of an ``environment``, for the heading of a table."""
    threads = count(found["threads"], "thread")
    return ", ".join(filter(None, [found["cpu"], threads, instruction_set(found)]))


def instruction_set(found: dict[str, Any]) -> str:
    """The instructions of an ``environment`` as docs write them; empty if they were not recorded."""
    return (found.get("instructions") or "").replace("AVX512", "AVX-512")
