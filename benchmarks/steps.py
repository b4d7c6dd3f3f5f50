"""Fine-tuning steps: providers run in turn, one process per run, and each is checked against the losses of stock PEFT."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from cases import CASES, PARTS
from guard import Guard
from report import environment, machine, run_script, save

LOSS_TOLERANCE = 1e-5
"""Largest allowed relative difference from stock PEFT's losses; the steps are the same up to float32 rounding."""

OTHER_METHODS = ("full", "peftkit-bottleneck", "peftkit-prefix")
"""Providers that do not train LoRA. Only their first loss, that of the base model, equals stock PEFT's."""


class Training:
    """Time and memory of a step: peftkit, stock PEFT and full fine-tuning."""

    HELP = "fine-tuning steps: time and memory"
    CASES = ("smollm2", "llama-1b-cut")
    PROVIDERS = (
        "floor",
        "peftkit",
        "peft",
        "full",
        "peftkit-checkpointed",
        "peft-checkpointed",
        "peft-compiled",
    )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""
        parser.add_argument("--case", choices=cls.CASES, action="append", help="default: all")
        _add_run_options(parser, cls.PROVIDERS)

    @classmethod
    def run(cls, arguments: argparse.Namespace) -> None:
        """Measure every case, save the results and print the tables."""
        for case in arguments.case or cls.CASES:
            result = measure(case, arguments)
            save(result, f"training-{case}")
            print(table(result), flush=True)


class Parts:
    """The gain of each part of peftkit: every provider has one part more than the one before."""

    HELP = "the gain of each part of peftkit"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""
        parser.add_argument("--case", choices=CASES, default="smollm2")
        _add_run_options(parser, ["peft", *(f"parts-{count + 1}" for count in range(len(PARTS)))])

    @staticmethod
    def run(arguments: argparse.Namespace) -> None:
        """Measure, save the result and print the table."""
        result = measure(arguments.case, arguments)
        save(result, f"parts-{arguments.case}")
        print(parts_table(result))


def _add_run_options(parser: argparse.ArgumentParser, providers: Any) -> None:
    parser.add_argument("--providers", nargs="+", default=providers)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each provider, in turn")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per run")
    add_quiet_options(parser)


def add_quiet_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run_in_turn``."""
    parser.add_argument(
        "--retries", type=int, default=2, help="how often a run on a busy machine is repeated"
    )
    parser.add_argument(
        "--wait", type=float, default=60, help="seconds to wait for a quiet machine before a run"
    )


def measure(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every provider ``rounds`` times, in turn, and compare their losses."""
    runs = run_in_turn(case, arguments)
    check_losses(runs)
    return {"case": case, "environment": environment(), "runs": runs}


def run_in_turn(case: str, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The runs by provider. A run that other work disturbed is repeated; if it still was, the run has the reason as ``disturbed``."""
    runs: dict[str, list[dict[str, Any]]] = {provider: [] for provider in arguments.providers}
    watched = Guard()
    for number in range(arguments.rounds):
        for provider in arguments.providers:
            where = f"{case}: round {number + 1} of {arguments.rounds}, {provider}"
            print(where, file=sys.stderr, flush=True)
            options = ["--case", case, "--provider", provider, "--steps", str(arguments.steps)]
            command = partial(run_script, "training.py", *options)
            runs[provider].append(watched.run(command, arguments.retries, arguments.wait))
    for run in (run for several in runs.values() for run in several):
        run["disturbed"] = watched.disturbed(run)
    return runs


def check_losses(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Raise ``SystemExit`` if a provider's losses differ from stock PEFT's. Of other methods only the first loss is compared."""
    for provider in runs:
        compare_losses(
            runs,
            provider,
            stock="peft-dora" if provider.endswith("-dora") else "peft",
            tolerance=LOSS_TOLERANCE,
            count=1 if provider in OTHER_METHODS else None,
        )


def compare_losses(
    runs: dict[str, list[dict[str, Any]]],
    provider: str,
    stock: str,
    tolerance: float,
    count: int | None,
) -> None:
    """Compare the first ``count`` losses (``None``: all) of a provider's runs with those of the first run of ``stock``.

    Raises:
        SystemExit: A loss differs by more than ``tolerance``, relatively, or ``stock`` has no run.
    """
    if stock not in runs:
        raise SystemExit(
            f"providers must contain {stock}: {provider} is checked against its losses"
        )
    expected = runs[stock][0]["losses"]
    for result in runs[provider]:
        losses = result.get("losses", [])[:count]
        for step, (loss, wanted) in enumerate(zip(losses, expected, strict=False)):
            if not abs(loss - wanted) <= tolerance * abs(wanted):
                raise SystemExit(
                    f"{provider}: loss {loss} at step {step}, {stock} has {wanted}; no speed printed"
                )


def table(result: dict[str, Any]) -> str:
    """The results of a case as a Markdown table, each figure next to its ratio to stock PEFT."""
    best = {provider: best_run(runs) for provider, runs in result["runs"].items()}
    stock = best["peft"]
    lines = [
        f"**{result['case']}** ({machine(result['environment'])})",
        "",
        "| method | step (s) | / PEFT | first step (s) | tokens/s | peak growth (MiB) | / PEFT | trained parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for provider, run in best.items():
        if provider == "floor":
            continue
        step, peak = run["step_seconds"], run["peak_bytes"]
        lines.append(
            f"| {provider} | {step:.2f} | {step / stock['step_seconds']:.2f} | {run['first_seconds']:.2f} | "
            f"{run['tokens_per_second']:.0f} | {peak / 2**20:.0f} | {peak / stock['peak_bytes']:.2f} | "
            f"{run['trainable']:,} |"
        )
    remarks = [*disturbances(result)]
    if "floor" in best:
        step = best["peftkit"]["step_seconds"]
        floors = {
            name: min(run[f"{name}_seconds"] for run in result["runs"]["floor"])
            for name in ("torch", "chosen")
        }
        remarks.append(
            f"The frozen matrix products of one step take {floors['torch']:.2f} s with torch.mm (peftkit's whole step takes "
            f"{step / floors['torch']:.2f} x as long) and {floors['chosen']:.2f} s with the routine that peftkit chooses "
            f"({step / floors['chosen']:.2f} x)."
        )
    for provider, rival, sentence in (
        (
            "peftkit",
            "full",
            "A step of peftkit takes {:.2f} x as long as a step of full fine-tuning.",
        ),
        ("peftkit-dora", "peftkit", "A step of DoRA takes {:.2f} x as long as a step of LoRA."),
        (
            *("peftkit-bottleneck", "peftkit"),
            "A step of bottlenecks takes {:.2f} x as long as a step of LoRA with as many parameters.",
        ),
    ):
        if provider in best and rival in best:
            ratio = best[provider]["step_seconds"] / best[rival]["step_seconds"]
            remarks.append(sentence.format(ratio))
    return "\n".join([*lines, "", *remarks] if remarks else lines)


def disturbances(result: dict[str, Any]) -> list[str]:
    """One sentence for each provider whose best run was disturbed: its speed must not be trusted."""
    best = {provider: best_run(runs) for provider, runs in result["runs"].items()}
    return [
        f"The best run of {provider} was disturbed: {run['disturbed']}."
        for provider, run in best.items()
        if run.get("disturbed")
    ]


def parts_table(result: dict[str, Any]) -> str:
    """The gain of each part as a Markdown table."""
    rows = [("stock PEFT", ""), *((f"+ {part}", saves) for part, saves in PARTS.items())]
    lines = [
        f"**{result['case']}** ({machine(result['environment'])})",
        "",
        "| | what it saves | step (s) | / PEFT | peak growth (MiB) | / PEFT |",
        "|---|---|---|---|---|---|",
    ]
    best = [best_run(runs) for runs in result["runs"].values()]
    for (name, saves), run in zip(rows, best, strict=True):
        step, peak = run["step_seconds"], run["peak_bytes"]
        lines.append(
            f"| {name} | {saves} | {step:.2f} | {step / best[0]['step_seconds']:.2f} | "
            f"{peak / 2**20:.0f} | {peak / best[0]['peak_bytes']:.2f} |"
        )
    remarks = disturbances(result)
    return "\n".join([*lines, "", *remarks] if remarks else lines)


def best_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the shortest median step."""
    return min(runs, key=lambda run: run.get("step_seconds", 0))
