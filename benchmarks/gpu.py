"""Everything about one GPU: values of all ops, parity of whole models, training steps against PEFT and others, single operations.

    python benchmarks/run.py gpu                # at most six minutes; with make: make gpu
    python benchmarks/run.py gpu --minutes 3    # the most important rows first; what is skipped is listed
    python benchmarks/run.py gpu --render       # write docs/gpu.md again from the results that exist
    python benchmarks/run.py gpu --tiny         # small models, also without a GPU: to try the command

It needs torch, Triton, transformers, peft, accelerate and safetensors, and no network. bitsandbytes, Liger and Unsloth are measured
where they are installed. Each row runs in a process of its own, and a row that fails or takes too long is kept with its reason. The
results are written after every row, so an interrupted run keeps what it has. The exit status is 1 if a value or a gradient is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import gpu_page
import torch
from report import HERE, RESULTS

HELP = "everything about one GPU, in at most six minutes"


class Row(NamedTuple):
    """One row of a run, and how long it may take.

    Attributes:
        part: ``"values"``, ``"parity"``, ``"steps"`` or ``"kernels"``.
        arguments: What ``gpu_row.py`` gets besides the part.
        seconds: The most that its process may take.
    """

    part: str
    arguments: dict[str, Any]
    seconds: int = 60


def _steps(model: str, batch: int, tokens: int, *providers: str) -> list[Row]:
    sizes = {"model": model, "batch": batch, "tokens": tokens}
    return [Row("steps", sizes | {"provider": provider}) for provider in providers]


ROWS = [
    Row("values", {}, 90),
    *(Row("parity", {"family": family}) for family in ("llama", "qwen3", "mistral")),
    *_steps("8 layers of Llama-3.1-8B", 1, 4096, "peftkit", "PEFT", "Unsloth", "Liger + PEFT"),
    *_steps("Llama-3.1-8B", 1, 4096, "peftkit", "PEFT"),
    *_steps("8 layers of Llama-3.1-8B", 1, 4096, "peftkit, checkpointed", "PEFT, checkpointed"),
    *_steps(
        "8 layers of Llama-3.1-8B", 1, 4096, "peftkit NF4", "PEFT NF4", "peftkit DoRA", "PEFT DoRA"
    ),
    *_steps("8 layers of Llama-3.1-8B", 1, 4096, "peftkit int8", "PEFT int8", "full"),
    *_steps("Llama-3.1-8B", 2, 4096, "peftkit", "PEFT"),
    *_steps("Llama-3.2-1B", 4, 2048, "peftkit", "PEFT", "full"),
    *_steps("8 layers of Llama-3.1-8B", 1, 4096, "peftkit, dropout 0.1", "PEFT, dropout 0.1"),
    *_steps("8 layers of Llama-3.1-8B", 1, 4096, "peftkit prefix", "peftkit bottleneck"),
    *_steps("8 layers of Llama-3.1-8B", 1, 4096, "peftkit, rank 256", "PEFT, rank 256"),
    Row("kernels", {}, 120),
]
"""The most important first."""
TINY = [
    Row("values", {"tiny": True}, 300),
    Row("parity", {"family": "llama"}, 120),
    *_steps(
        *("tiny", 2, 16, "peftkit", "PEFT", "peftkit, checkpointed", "peftkit DoRA"),
        *("peftkit, rank 256", "full", "Unsloth"),
    ),
]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--minutes", type=float, default=6.0, help="start no row after this time")
    parser.add_argument("--render", action="store_true", help="only write docs/gpu.md again")
    parser.add_argument("--tiny", action="store_true", help="small models, also without a GPU")
    parser.add_argument(
        "--out", type=Path, help="the result file; default: by the name of the card"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, save after each row, and write docs/gpu.md.

    Raises:
        SystemExit: There is no GPU and neither ``--tiny`` nor ``--render`` was given, or something is wrong.
    """
    if arguments.render:
        gpu_page.write()
        return
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no GPU on this machine; --tiny tries the command without one, --render writes the page again"
        )
    path = arguments.out or RESULTS / f"gpu-{card() if not arguments.tiny else 'tiny'}.json"
    result = measure(TINY if arguments.tiny else ROWS, path, arguments.minutes)
    if path.parent == RESULTS and not arguments.tiny:
        gpu_page.write()
    print(gpu_page.page(result))
    wrong = [row for row in (*result["values"], *result["parity"]) if row.get("wrong")]
    if wrong:
        raise SystemExit(f"wrong: {json.dumps(wrong)}")


def card() -> str:
    """The short name of the GPU, as in the names of result files: ``h100``."""
    name = torch.cuda.get_device_name().lower()
    found = re.search(r"[a-z]*\d{2,4}[a-z]*", name)
    return found[0] if found else re.sub(r"\W+", "-", name)


def measure(rows: list[Row], path: Path, minutes: float) -> dict[str, Any]:
    """Run the rows and write what is known to ``path`` after each."""
    result: dict[str, Any] = {
        "environment": environment(),
        "conditions": gpu_page.CONDITIONS,
        **{part: [] for part in ("values", "parity", "steps", "kernels")},
        "failed": [],
        "skipped": [],
    }
    end = time.monotonic() + 60 * minutes
    for row in rows:
        if time.monotonic() > end:
            result["skipped"].append({"part": row.part, **row.arguments})
        else:
            left = max(5.0, end - time.monotonic())
            found = run_row(row, min(row.seconds, left))
            if "reason" in found:
                result["failed"].append({"part": row.part, **row.arguments, **found})
            else:
                result[row.part] += found["rows"]
        save(result, path)
        print(f"{row.part} {row.arguments}", file=sys.stderr, flush=True)
    return result


def run_row(row: Row, seconds: float) -> dict[str, Any]:
    """``{"rows": [...]}``, or ``{"reason": ...}`` if the row cannot be measured."""
    command = [sys.executable, str(HERE / "gpu_row.py"), row.part, json.dumps(row.arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"reason": f"it took more than {seconds:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"reason": said[-1][:300]}


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result in one step, so that no partial file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """The card, the versions of the packages that matter, the commit and the day."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"gpu": "none (CPU)"}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    for package in (
        "torch",
        "triton",
        "transformers",
        "peft",
        "liger_kernel",
        "unsloth",
        "bitsandbytes",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        found["commit"] = subprocess.run(
            git, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found | {"day": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
