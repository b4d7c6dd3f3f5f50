"""The benchmark suite: methods against stock PEFT and full fine-tuning, interleaved, one process a run.

    python benchmarks/run.py training                      # both cases, all providers
    python benchmarks/run.py training --case smollm2 --providers peftkit peft full floor --rounds 3
    python benchmarks/run.py parts                         # which part of peftkit gains what
    python benchmarks/run.py family                        # DoRA against LoRA; LoRA on the experts of a mixture
    python benchmarks/run.py overhead                      # import, wrapping and Python time a layer

A speed is printed only where the losses agree with those of stock PEFT on the same batches. Results go to
``benchmarks/results/`` as JSON and, with ``--update-readme``, as a table into the README between its marks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cases import CASES, PARTS

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PROVIDERS = ("floor", "peftkit", "peft", "full", "peftkit-checkpointed", "peft-checkpointed")
FAMILY = {
    "smollm2": ("peft", "peftkit", "peft-dora", "peftkit-dora"),
    "experts": ("peft", "peftkit"),
}
LOSS_TOLERANCE = 1e-5
"""Largest relative difference from stock PEFT's losses; the steps are the same up to float32 rounding."""


def main() -> int:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("training", help="steps of fine-tuning: time and memory")
    training.add_argument("--case", choices=CASES, action="append", help="default: all")
    training.add_argument(
        "--providers", nargs="+", default=list(PROVIDERS), help="also: peft-compiled"
    )
    training.add_argument("--rounds", type=int, default=3, help="runs of each provider, in turn")
    training.add_argument("--steps", type=int, default=4, help="timed steps a run")
    training.add_argument("--update-readme", action="store_true")
    parts = commands.add_parser("parts", help="peftkit built up part by part")
    parts.add_argument("--case", choices=CASES, default="smollm2")
    parts.add_argument("--rounds", type=int, default=2)
    parts.add_argument("--steps", type=int, default=4)
    parts.add_argument("--update-readme", action="store_true")
    family = commands.add_parser("family", help="DoRA, and LoRA on stacked experts")
    family.add_argument("--rounds", type=int, default=3)
    family.add_argument("--steps", type=int, default=4)
    commands.add_parser("overhead", help="import, wrapping and Python time a layer")
    arguments = parser.parse_args(sys.argv[1:] or ["training"])
    if arguments.command == "overhead":
        return subprocess.run([sys.executable, str(HERE / "overhead.py")], check=False).returncode
    if arguments.command == "family":
        for case, providers in FAMILY.items():
            result = measure(case, list(providers), arguments.rounds, arguments.steps)
            save(result, f"family-{case}")
            print(table(result), flush=True)
        return 0
    if arguments.command == "parts":
        providers = ["peft", *(f"parts-{count + 1}" for count in range(len(PARTS)))]
        result = measure(arguments.case, providers, arguments.rounds, arguments.steps)
        save(result, f"parts-{arguments.case}")
        print(parts_table(result))
        if arguments.update_readme:
            update_readme("parts", parts_table(result))
        return 0
    tables = []
    for case in arguments.case or CASES:
        result = measure(case, arguments.providers, arguments.rounds, arguments.steps)
        save(result, f"training-{case}")
        tables.append(table(result))
        print(tables[-1], flush=True)
    if arguments.update_readme:
        update_readme("benchmark", "\n\n".join(tables))
    return 0


def save(result: dict[str, Any], name: str) -> None:
    """Write a result to its file, whole or not at all."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def measure(case: str, providers: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Run every provider ``rounds`` times in turn; keeps the round with the best median step of each."""
    runs: dict[str, list[dict[str, Any]]] = {provider: [] for provider in providers}
    for number in range(rounds):
        for provider in providers:
            print(
                f"{case}: round {number + 1} of {rounds}, {provider}", file=sys.stderr, flush=True
            )
            runs[provider].append(run_once(case, provider, steps))
    check_losses(runs)
    return {"case": case, "environment": environment(), "runs": runs}


def run_once(case: str, provider: str, steps: int) -> dict[str, Any]:
    """One run in a fresh process."""
    command = [sys.executable, str(HERE / "training.py"), "--case", case, "--provider", provider]
    result = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{case}, {provider} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def check_losses(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Stop where a provider's losses are not those of stock PEFT; full fine-tuning shares only the first."""
    for provider, results in runs.items():
        stock = "peft-dora" if provider.endswith("-dora") else "peft"
        if stock not in runs:
            raise SystemExit(
                f"providers must contain {stock}: every speed is checked against its losses"
            )
        expected = runs[stock][0]["losses"]
        for result in results:
            losses = result.get("losses", [])[: 1 if provider == "full" else None]
            for step, (loss, wanted) in enumerate(zip(losses, expected, strict=False)):
                if not abs(loss - wanted) <= LOSS_TOLERANCE * abs(wanted):
                    raise SystemExit(
                        f"{provider}: loss {loss} at step {step}, stock PEFT has {wanted}; no speed printed"
                    )


def table(result: dict[str, Any]) -> str:
    """The case as a Markdown table, each figure beside its ratio to stock PEFT."""
    best = {provider: best_run(runs) for provider, runs in result["runs"].items()}
    stock = best["peft"]
    lines = [
        f"**{result['case']}** ({result['environment']['cpu']}, {result['environment']['threads']} threads)",
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
    if "floor" in best and "peftkit" in best:
        floors = {
            name: min(run[f"{name}_seconds"] for run in result["runs"]["floor"])
            for name in ("torch", "chosen")
        }
        step = best["peftkit"]["step_seconds"]
        lines += [
            "",
            f"Frozen products of a step alone: {floors['torch']:.2f} s by torch.mm (peftkit's step is "
            f"{step / floors['torch']:.2f} x that), {floors['chosen']:.2f} s by the routine peftkit chooses "
            f"({step / floors['chosen']:.2f} x).",
        ]
    if "peftkit-dora" in best and "peftkit" in best:
        ratio = best["peftkit-dora"]["step_seconds"] / best["peftkit"]["step_seconds"]
        lines += ["", f"peftkit's DoRA step is {ratio:.2f} x its LoRA step."]
    if "full" in best and "peftkit" in best:
        ratio = best["peftkit"]["step_seconds"] / best["full"]["step_seconds"]
        lines.append(f"peftkit's step is {ratio:.2f} x that of full fine-tuning.")
    return "\n".join(lines)


def parts_table(result: dict[str, Any]) -> str:
    """What each part adds, as a Markdown table."""
    rows = [("stock PEFT", ""), *((f"+ {part}", saves) for part, saves in PARTS.items())]
    lines = [
        f"**{result['case']}** ({result['environment']['cpu']}, {result['environment']['threads']} threads)",
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
    return "\n".join(lines)


def best_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the shortest median step."""
    return min(runs, key=lambda run: run.get("step_seconds", 0))


def environment() -> dict[str, Any]:
    """What the figures depend on."""
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


def update_readme(mark: str, text: str) -> None:
    """Put ``text`` between the marks of that name in the README."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    page = README.read_text()
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"README.md lacks the marks {begin} and {end}")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
