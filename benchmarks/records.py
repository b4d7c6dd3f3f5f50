"""The stored rows of the suite: JSON lines, one file a device, appended and never changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from report import HERE, RESULTS, slug

_PACKAGES = (
    *("torch", "transformers", "peft", "peftkit", "bitsandbytes"),
    *("adapters", "liger-kernel", "unsloth"),
)
VERSIONS_SCRIPT = f"""
import json
from importlib.metadata import PackageNotFoundError, version
found = {{}}
for package in {_PACKAGES}:
    try:
        found[package] = version(package)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""
"""Prints the versions of the packages of another interpreter."""

KEY = (
    *("suite", "case", "provider", "batch", "length", "rank", "adapters", "checkpointing", "isa"),
    *("smoke", "target_loss"),
)
"""The fields that name a row. Of rows with the same values the last one counts."""


def environment() -> dict[str, Any]:
    """The device, the instructions and product library that are used, threads, versions, commit and day.

    A process of its own sees the limits of ``--isa``.
    """
    import instructions
    import torch

    from peftkit.machine import processor
    from peftkit_kernels import gemm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    blas = "MKL" if torch.backends.mkl.is_available() else "the BLAS of torch"
    return {
        "device": gpu or _processor_with_model(),
        "gpu": gpu,
        "processor": processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "instructions": instructions.in_use(native=True),
        "products": "oneDNN" if gemm.prefers_onednn() else blas,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _processor_with_model() -> str:
    """The processor with its family and model: a cloud may give one name to several generations."""
    from peftkit.machine import processor

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = [re.search(rf"^{key}\s*: (\d+)$", text, re.M) for key in ("cpu family", "model")]
    numbers = [match[1] for match in found if match]
    suffix = f" (family {numbers[0]}, model {numbers[1]})" if len(numbers) == 2 else ""
    return f"{processor() or 'unknown processor'}{suffix}"


def versions() -> dict[str, str]:
    """The versions of the installed packages that matter."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit, with ``-modified`` if files that can change a measurement differ from it."""
    git = ["git", "-C", str(HERE.parent)]
    code = ["peftkit", "kernels", "benchmarks", ":!benchmarks/results"]
    try:
        head = _output([*git, "rev-parse", "--short", "HEAD"])
        changed = _output([*git, "status", "--porcelain", "--", *code])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-modified" if changed else head


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def path_of(device: str, folder: Path = RESULTS) -> Path:
    """The file of a device."""
    return folder / f"{slug(device)}.jsonl"


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row as one line, and make sure that it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, of each key the last one.

    Raises:
        SystemExit: A line is not a row, as after an interrupted write.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(
                f"{path.name}, line {number} is not JSON ({error}); delete this line if its write was interrupted"
            ) from None
        rows.pop(key(row), None)
        rows[key(row)] = row
    return list(rows.values())


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The values of ``KEY``."""
    return tuple(row.get(name) for name in KEY)


def is_finished(row: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether ``--resume`` keeps a row: it has a speed, and was measured at this commit, on this machine, with these versions.

    Args:
        row: A stored row.
        now: The environment of the process that would measure it again.
    """
    if now["commit"] == "unknown" or now["commit"].endswith("-modified"):
        return False
    return row["status"] == "ok" and all(
        row["environment"].get(name) == value for name, value in now.items() if name != "date"
    )


def stored() -> list[dict[str, Any]]:
    """The rows of every device, without those of ``--smoke``."""
    return [
        row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path) if not row["smoke"]
    ]


if __name__ == "__main__":
    print(json.dumps(environment()))
