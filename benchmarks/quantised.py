"""A step of LoRA on quantised bases: NF4, and 8 bits decoded or multiplied in 8 bits, in peftkit and in stock PEFT with bitsandbytes."""

from __future__ import annotations

import argparse
from typing import Any

import steps
from report import RESULTS, environment, load, machine, save, slug

HELP = "a step on quantised bases, against PEFT with bitsandbytes"
CASES = ("smollm2", "llama-1b-cut")
STOCK = {
    "peftkit": "peft",
    "peftkit-nf4": "peft-nf4",
    "peftkit-int8": "peft-int8",
    "peftkit-int8-compute": "peft-int8",
    "peftkit-nf4-merge-aware": "peft-nf4",
    "peftkit-int8-merge-aware": "peft-int8",
}
"""Each provider of peftkit and stock PEFT on the same base. PEFT has no merge-aware training: only the first loss, where the
adapter has no effect yet, is comparable."""
PROVIDERS = (*STOCK, *dict.fromkeys(STOCK.values()))

ROUNDED_TOLERANCE = 0.01
"""Largest relative difference of losses if peftkit rounds where stock PEFT does not: the inputs of products to 8 bits, or weights that
are quantised again."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each provider, in turn")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per run")
    steps.add_quiet_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure every case, save the results and print the tables."""
    for case in arguments.case or CASES:
        result = measure(case, arguments)
        save(result, f"quantised-{case}-{slug(result['environment']['cpu'])}")
        print(table(result), flush=True)


def stored() -> list[dict[str, Any]]:
    """The results of every processor, case by case."""
    paths = [path for case in CASES for path in sorted(RESULTS.glob(f"quantised-{case}-*.json"))]
    return [load(path.stem) for path in paths]


def measure(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every provider ``rounds`` times, in turn, and compare their losses."""
    runs = steps.run_in_turn(case, arguments)
    check_losses(runs)
    return {"case": case, "environment": environment(), "runs": runs}


def check_losses(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Raise ``SystemExit`` if a loss differs from that of stock PEFT on the same base."""
    for provider in runs:
        rounds = provider.endswith(("compute", "merge-aware"))
        steps.compare_losses(
            runs,
            provider,
            stock=STOCK.get(provider, provider),
            tolerance=ROUNDED_TOLERANCE if rounds else steps.LOSS_TOLERANCE,
            count=1 if provider.endswith("merge-aware") else None,
        )


def table(result: dict[str, Any]) -> str:
    """The results of a case as a Markdown table, next to float32 and to stock PEFT on the same base."""
    best = {provider: steps.best_run(runs) for provider, runs in result["runs"].items()}
    plain = best.get("peftkit")
    lines = [
        f"**{result['case']}** ({machine(result['environment'])})",
        "",
        "| method | step (s) | / peftkit in float32 | / PEFT on the same base | peak growth (MiB) | / PEFT on the same base |",
        "|---|---|---|---|---|---|",
    ]
    for provider, run in best.items():
        stock = best[STOCK.get(provider, provider)]
        step, peak = run["step_seconds"], run["peak_bytes"]
        over_plain = f"{step / plain['step_seconds']:.2f}" if plain else ""
        lines.append(
            f"| {provider} | {step:.2f} | {over_plain} | {step / stock['step_seconds']:.2f} | "
            f"{peak / 2**20:.0f} | {peak / stock['peak_bytes']:.2f} |"
        )
    remarks = steps.disturbances(result)
    return "\n".join([*lines, "", *remarks] if remarks else lines)
