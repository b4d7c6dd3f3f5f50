"""The rows of the results' page: one shape for the JSON lines of ``results/*.jsonl`` and for the older JSON files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from report import machine
from steps import best_run

_SUITES = ("training", "methods", "quantised")
_OWN, _PEFT, _FULL = "peftkit", "peft", "full"


def rows(results: Path) -> list[dict[str, Any]]:
    """Every result in a folder, in the shape of the JSON lines.

    Raises:
        SystemExit: A file cannot be read. The message names the file and the line.
    """
    found = [row for path in sorted(results.glob("*.jsonl")) for row in _lines(path)]
    for path in sorted(results.glob("*.json")):
        suite, _, case = path.stem.partition("-")
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise SystemExit(f"{path} is not JSON ({error}); measure it again") from None
        if suite in _SUITES:
            found += _of_runs(suite, result.get("case", case), result)
        elif suite == "gpu" and case != "tiny":
            found += _of_gpu(result)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SystemExit(
                f"{path}, line {number}: not JSON ({error}); remove the line or measure it again"
            ) from None
        missing = [key for key in ("suite", "case", "status", "environment") if key not in row]
        if not isinstance(row, dict) or missing:
            raise SystemExit(f"{path}, line {number}: a row needs {', '.join(missing)}")
        found.append(row)
    return found


def _of_runs(suite: str, case: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file with runs by provider: the best run of each."""
    found = result["environment"]
    environment = {
        "device": machine(found),
        "processor": found["cpu"],
        "isa": found.get("instructions"),
        "threads": found["threads"],
        "versions": {k: found[k] for k in ("torch", "transformers", "peft", "peftkit")},
    }
    rows = []
    for provider, runs in result["runs"].items():
        if provider == "floor":
            continue
        best = best_run(runs)
        seconds = [run["step_seconds"] for run in runs]
        library, method = _named(provider)
        rows.append(
            {
                "suite": suite,
                "case": case,
                "provider": provider,
                "library": library,
                "method": method,
                "checkpointing": "checkpointed" in provider,
                "status": "ok",
                "step_seconds": best["step_seconds"],
                "step_spread": [min(seconds), max(seconds)],
                "tokens_per_second": best["tokens_per_second"],
                "peak_bytes": best["peak_bytes"],
                "trainable": best["trainable"],
                "losses": best["losses"],
                "environment": environment,
            }
        )
    return rows


def _of_gpu(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file of ``make gpu``."""
    found = result["environment"]
    versions = {k: v for k, v in found.items() if k not in ("gpu", "host_cores", "capability")}
    environment = {"device": found["gpu"], "versions": versions}
    rows = []
    for step in result["steps"]:
        library, method = _named(step["provider"])
        rows.append(
            {
                "suite": "gpu",
                "case": step["model"],
                "provider": step["provider"],
                "library": library,
                "method": method,
                "batch": step["batch"],
                "length": step["tokens"],
                "checkpointing": "checkpointed" in step["provider"],
                "status": "ok",
                "step_seconds": step["step_s"],
                "tokens_per_second": step["tokens_per_s"],
                "peak_bytes": round(step["growth_gib"] * 2**30),
                "losses": step["losses"],
                "environment": environment,
            }
        )
    return rows


def _named(provider: str) -> tuple[str, str]:
    """The library and the method that a provider's name means: ``"peft-dora"`` is PEFT's DoRA."""
    plain = provider.lower()
    library = next(
        (
            title
            for name, title in (
                ("liger", "Liger + PEFT"),
                ("unsloth", "Unsloth"),
                ("peftkit", "peftkit"),
                ("peft", "PEFT"),
            )
            if name in plain
        ),
        "torch",
    )
    if plain.startswith("full"):
        return library, "full"
    words = plain.replace(",", "").replace("-", " ").split()
    method = next((w for w in words if w in ("dora", "bottleneck", "prefix")), "lora")
    base = next((w for w in words if w in ("nf4", "int8")), "")
    return library, f"{method} on {base}" if base else method


def device_of(row: dict[str, Any]) -> str:
    """The device of a row, by name."""
    found = row["environment"]
    return str(found.get("device") or found.get("processor") or "unknown")


def label_of(row: dict[str, Any]) -> str:
    """Library and method of a row in words, for a bar."""
    method, library = str(row.get("method") or ""), str(row.get("library") or row.get("provider"))
    if method == "full":
        return (
            "full fine-tuning"
            if library in ("torch", "transformers", "full", "None")
            else f"full fine-tuning with {library}"
        )
    known = {
        "lora": "LoRA",
        "dora": "DoRA",
        "qlora-nf4": "QLoRA (NF4)",
        "qlora-int8": "QLoRA (int8)",
    }
    words = [known.get(word, word) for word in method.split()]
    parts = [f"{' '.join(words)} with {library}" if words else library]
    if row.get("checkpointing"):
        parts.append("checkpointing")
    for option in ("compiled", "compute", "dropout"):
        if option in str(row.get("provider", "")) and option not in library:
            parts.append({"compute": "8-bit products"}.get(option, option))
    return ", ".join(parts)


def shape_of(row: dict[str, Any]) -> str:
    """Batch, length and rank of a row in words; empty if they are not known."""
    parts = []
    if row.get("batch") and row.get("length"):
        parts.append(f"{row['batch']} x {row['length']} tokens")
    if row.get("rank"):
        parts.append(f"rank {row['rank']}")
    return ", ".join(parts)


def measured(row: dict[str, Any], key: str) -> float | None:
    """A number of a row; ``None`` if the row has none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
