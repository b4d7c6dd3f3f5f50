"""docs/gpu.md, from the results of GPU runs in ``benchmarks/results/gpu-*.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from report import HERE, RESULTS

PAGE = HERE.parent / "docs" / "gpu.md"
CONDITIONS = (
    "random weights, bfloat16, rank 16 on all linears, AdamW; median of the steps after two; growth is over the loaded "
    "model; host is the time until the step was issued"
)
_HEAD = """# On a GPU

Everything here was *measured* on the card that each heading names. `make gpu` measures a card in at most six minutes, writes
`benchmarks/results/gpu-<card>.json` and this page; `python benchmarks/run.py gpu --render` writes this page again from the results.
`make bench ARGS=host` measures the host's part without a GPU.

A column `/ PEFT` is the ratio to PEFT's step, for a row of peftkit to PEFT's with the same options; below 1 is better.
"""


def write() -> None:
    """Write the page from all results."""
    PAGE.write_text(text())


def text() -> str:
    """The whole page."""
    files = sorted(RESULTS.glob("gpu-*.json"))
    results = [json.loads(file.read_text()) for file in files if file.stem != "gpu-tiny"]
    return "\n".join([_HEAD, *(page(result) for result in results)])


def page(result: dict[str, Any]) -> str:
    """The part of the page for one result."""
    found = result["environment"]
    versions = [f"{k} {v}" for k, v in found.items() if k not in ("gpu", "host_cores")]
    lines = [
        f"## {found['gpu']}",
        "",
        f"{', '.join(versions)}.",
        "",
        f"Conditions: {result['conditions']}.",
    ]
    if result.get("note"):
        lines += ["", result["note"]]
    lines += ["", *_steps(result["steps"])]
    lines += ["", *_values(result.get("values")), *_parity(result.get("parity", []))]
    lines += _attention(result.get("attention", []))
    for name in ("failed", "skipped"):
        rows = [", ".join(str(v) for v in row.values()) for row in result.get(name, [])]
        if rows:
            lines += ["", f"{name.capitalize()}: ", "", *(f"- {row}" for row in rows)]
    return "\n".join(lines) + "\n"


def _steps(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | provider | step (ms) | / PEFT | host (ms) | GPU busy (ms) | tokens/s | growth (GiB) | / PEFT |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rival = _rival(row, rows)
        ratios = ["", ""]
        if rival is not None:
            ratios = [
                f"{row[key] / rival[key]:.2f}" if rival[key] else ""
                for key in ("step_s", "growth_gib")
            ]
        busy = f"{1e3 * row['busy_s']:.1f}" if "busy_s" in row else ""
        lines.append(
            f"| {row['model']}, {row['batch']} x {row['tokens']} | {row['provider']} | {1e3 * row['step_s']:.1f} | {ratios[0]} "
            f"| {1e3 * row['host_s']:.1f} | {busy} | {row['tokens_per_s']:,} | {row['growth_gib']:.2f} | {ratios[1]} |"
        )
    return lines


def _rival(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """PEFT's row with the same model, batch and options; for a provider that PEFT has no equal of, PEFT's plain row."""
    same = [r for r in rows if all(r[k] == row[k] for k in ("model", "batch", "tokens"))]
    by_name = {r["provider"]: r for r in same}
    options = (
        row["provider"].removeprefix("peftkit") if row["provider"].startswith("peftkit") else ""
    )
    return by_name.get(f"PEFT{options}") or by_name.get("PEFT")


def _values(values: Any) -> list[str]:
    if not values:
        return []
    if isinstance(values, dict):  # an older result keeps counts only
        counts = ", ".join(f"{n} {kind}" for kind, n in values["results"].items())
        wrong, errors = ", ".join(values["wrong"]), ", ".join(values["errors"])
        return [
            f"Values of every op on the device against float64: {counts} of {values['cases']} cases. Wrong: {wrong}. Errors: {errors}."
        ]
    count = {
        kind: sum(row["result"] == kind for row in values)
        for kind in ("right", "wrong", "refused", "out of memory")
    }
    lines = [
        f"Values of every op on the device against float64: {', '.join(f'{n} {kind}' for kind, n in count.items())}."
    ]
    lines += [
        f"- {row['op']}: {row['result']}: {row.get('reason', row.get('wrong'))}"
        for row in values
        if row["result"] != "right"
    ]
    changing = [row["op"] for row in values if row.get("changing")]
    return lines + (
        [f"Bits that differ between two runs: {', '.join(changing)}."] if changing else []
    )


def _parity(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        "| bfloat16 gradients | distance of peftkit from float32 | of PEFT | |",
        "|---|---|---|---|",
    ]
    for row in rows:
        verdict = "wrong" if row["wrong"] else "right"
        lines.append(
            f"| {row['family']} | {row['peftkit_distance']:.4f} | {row['PEFT_distance']:.4f} | {verdict} |"
        )
    return lines


def _attention(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"\nAttention, forward and backward, {row['shape']}: flash {1e3 * row['flash_s']:.2f} ms, cuDNN {1e3 * row['cudnn_s']:.2f} ms."
        for row in rows
        if re.search(r"\d", row["shape"])
    ]
