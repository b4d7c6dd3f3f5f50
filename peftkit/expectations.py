"""Say which speed and memory to expect on a machine, against stock PEFT, from the project's measurements.

``expectations.json`` has the measured figures. ``python benchmarks/run.py docs`` writes it from the results in ``benchmarks/results/``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FIGURES = Path(__file__).with_suffix(".json")

_X86 = ("x86_64", "amd64")
_MIN_CAPABILITY = (8, 0)
"""The compute capability from which every kernel runs in bfloat16."""

_SAME_SAVED = "what a step keeps in memory depends on the code that runs, not on the {}"


def expectations(
    machine: dict[str, Any], *, onednn: bool, native: bool, threads: int
) -> list[dict[str, Any]]:
    """Return what to expect of a training step with LoRA on each device of a machine.

    Args:
        machine: The facts that ``describe_machine`` returns.
        onednn: Whether float32 products on the CPU run in oneDNN.
        native: Whether the native passes for the CPU are there.
        threads: Number of threads that torch uses.

    Returns:
        One dictionary for each device and measured model, with ``device``, ``model``, ``step_time`` and ``memory`` (ratios to
        PEFT's step and to the memory that it adds to the loaded model; below 1 is better; ``None`` if they are not known),
        ``step_time_basis`` and ``memory_basis`` (``"measured"``, ``"predicted"`` or ``"not measured"``), ``measured_on`` (the
        label of the measured machine), ``result`` (its file in ``benchmarks/results/``) and ``why``, a sentence on the basis.
    """
    figures = json.loads(_FIGURES.read_text())
    found = []
    for gpu in machine["gpus"]:
        found += _on_gpu(gpu, figures["gpu"])
    return found + _on_cpu(machine, figures["cpu"], onednn, native, threads)


def _on_cpu(
    machine: dict[str, Any], figures: list[dict[str, Any]], onednn: bool, native: bool, threads: int
) -> list[dict[str, Any]]:
    rows = [f for f in figures if (f["onednn"], f["native"]) == (onednn, native)]
    known = bool(rows) and (machine["architecture"] or "").lower() in _X86
    if not rows:  # the products save nothing, so the memory is that of the same passes
        rows = [f for f in figures if f["native"] == native]
    here = machine["processor"], threads

    def is_measured(row: dict[str, Any]) -> bool:
        return known and not row["switched_off"] and (row["machine"], row["threads"]) == here

    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        # this machine, otherwise one whose parts were not switched off
        own = [row for row in rows if row["model"] == model]
        row = min(own, key=lambda row: (not is_measured(row), row["switched_off"]))
        if is_measured(row):
            found.append(_expected("CPU", row, "measured", "measured", ""))
        elif known:
            why = "this processor was not measured; another one ran the same parts of peftkit"
            found.append(_expected("CPU", row, "predicted", "predicted", why))
        else:
            why = f"no such processor was measured; {_SAME_SAVED.format('processor')}"
            found.append(_expected("CPU", row, "not measured", "predicted", why))
    return found


def _on_gpu(gpu: dict[str, Any], figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    name = gpu["name"] or "unknown GPU"
    if rows := [f for f in figures if name.startswith(f["machine"])]:
        return [_expected(name, row, "measured", "measured", "") for row in rows]
    capability = gpu["capability"]
    if gpu["kind"] != "cuda" or capability is None:
        return [_unknown(name, "no GPU of this kind was measured")]
    if rows := [f for f in figures if f["capability"] == capability]:
        why = "this card was not measured; one with the same compute capability was"
        return [_expected(name, row, "predicted", "predicted", why) for row in rows]
    if tuple(map(int, capability.split("."))) < _MIN_CAPABILITY:
        return [_unknown(name, f"compute capability {capability} has no kernels for bfloat16")]
    why = f"no card with compute capability {capability} was measured; {_SAME_SAVED.format('card')}"
    rows = [f for f in figures if f["result"] == figures[0]["result"]]
    return [_expected(name, row, "not measured", "predicted", why) for row in rows]


def _expected(
    device: str, row: dict[str, Any], step_time: str, memory: str, why: str
) -> dict[str, Any]:
    return {
        "device": device,
        "model": row["model"],
        "step_time": None if step_time == "not measured" else row["step_time"],
        "step_time_basis": step_time,
        "memory": row["memory"],
        "memory_basis": memory,
        "measured_on": row["label"],
        "result": row["result"],
        "why": why,
    }


def _unknown(device: str, why: str) -> dict[str, Any]:
    return {
        "device": device,
        "model": None,
        "step_time": None,
        "step_time_basis": "not measured",
        "memory": None,
        "memory_basis": "not measured",
        "measured_on": None,
        "result": None,
        "why": why,
    }
