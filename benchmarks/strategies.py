"""The proof of the workflow: strategies beside simpler rows on six tasks with real models, by ``peftkit.compare``.

    python benchmarks/run.py strategies
    python benchmarks/run.py strategies --tasks docstrings digits --strategies full lora --steps 20
    python benchmarks/run.py strategies --smoke             # two blocks of each model and four steps, to try the command

SmolLM2-135M-Instruct and MiniLM-L6 are from PyPI packages. The model for digits is pretrained here, on the images without their labels.
Each row of a task has the same rows of data, number of steps, batches and seed, and a process of its own; the rates are in ``RATES``.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import strategy_data
import tools_path  # noqa: F401
from report import HERE, RESULTS, environment, machine

HELP = "quality, time and memory of strategies beside simpler rows, on real models"
RESULT = RESULTS / "strategies.json"
NOT_MEASURED = "Not measured yet; the command above writes the tables."

STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "partial": {"name": "partial", "last_blocks": 2},
    "gradual": {"name": "gradual"},
    "probe_then_tune": {"name": "probe_then_tune"},
    "lora": {"name": "lora"},
    "dora": {"name": "lora", "use_dora": True},
    "bottleneck": {"name": "bottleneck", "reduction_factor": 8},
    "prefix": {"name": "prefix", "num_virtual_tokens": 16},
    "ia3": {"name": "ia3"},
}
RATES = {
    **dict.fromkeys(("full", "gradual", "probe_then_tune"), 1e-4),
    "partial": 2e-4,
    **dict.fromkeys(("lora", "dora", "bottleneck"), 1e-3),
    **dict.fromkeys(("prefix", "ia3"), 1e-2),
}
"""Learning rates for a few dozen steps; the defaults of recipes are for longer runs. From scratch it is the default, 5e-4."""
HEAD_RATE = 1e-3
"""Learning rate of new heads, the same in each row."""


@dataclass(frozen=True, slots=True)
class Proof:
    """One task with a model.

    Attributes:
        title: What the model learns from which data.
        model: A key of ``MODELS``.
        task: The task of the recipe.
        rows: Makes rows, given the number for training and for evaluation.
        sizes: These numbers.
        steps: Number of optimiser steps.
        training: Other keys of ``training``.
        measure: What the quality is.
        blocks_per_stage: For gradual unfreezing.
        has_head: Whether the task adds a head to the model. Without one there is nothing to probe.
    """

    title: str
    model: str
    task: dict[str, Any]
    rows: Callable[[int, int], strategy_data.Rows]
    sizes: tuple[int, int]
    steps: int
    training: dict[str, Any]
    measure: str
    blocks_per_stage: int
    has_head: bool = False


PROOFS = {
    "records": Proof(
        "SmolLM2-135M-Instruct: requests to JSON records (generated)",
        *("smollm2", {"name": "sft"}, strategy_data.requests, (480, 50), 40),
        {"batch_size": 4, "seq_len": 160},
        "records that are right as a whole",
        blocks_per_stage=6,
    ),
    "reference": Proof(
        "SmolLM2-135M-Instruct: continued pretraining on Python's language reference",
        *("smollm2", {"name": "causal_lm", "packing": True}, strategy_data.reference, (60, 15), 30),
        {"batch_size": 2, "seq_len": 128, "best_metric": "loss"},
        "loss of held-out topics",
        blocks_per_stage=6,
    ),
    "docstrings": Proof(
        "MiniLM-L6: the package that a docstring is from",
        *("minilm", {"name": "text_classification"}, strategy_data.docstrings, (960, 320), 100),
        {"batch_size": 16, "seq_len": 96},
        "accuracy, eight classes",
        *(1, True),
    ),
    "roles": Proof(
        "MiniLM-L6: the roles of names in functions of Python's standard library",
        *("minilm", {"name": "token_classification"}, strategy_data.names_in_code, (640, 160), 80),
        {"batch_size": 8, "seq_len": 128},
        "F1 of names",
        *(1, True),
    ),
    "descriptions": Proof(
        "MiniLM-L6: descriptions and signatures of functions of Python's standard library",
        *("minilm", {"name": "embeddings"}, strategy_data.descriptions, (640, 160), 60),
        {"batch_size": 32, "seq_len": 48},
        "mean reciprocal rank in batches of 32",
        blocks_per_stage=1,
    ),
    "digits": Proof(
        "a small ViT, pretrained on digits without labels: handwritten digits from 200 labels",
        *("digits", {"name": "image_classification"}, strategy_data.digits, (200, 360), 150),
        {"batch_size": 32},
        "accuracy, ten classes",
        *(1, True),
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--tasks", nargs="+", choices=PROOFS, default=list(PROOFS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--steps", type=int, help="of every task; default: 30 to 150")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep the tasks of the saved result")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument("--out", type=Path, help="the file of the result")


def run(arguments: argparse.Namespace) -> None:
    """Compare the strategies on every task, each in a process of its own; save the result after each and print the tables."""
    out = arguments.out or (None if arguments.smoke else RESULT)
    settings = {name: getattr(arguments, name) for name in ("strategies", "steps", "seed", "smoke")}
    found = environment() | {"python": platform.python_version()}
    result: dict[str, Any] = {"environment": found, **settings, "tasks": {}}
    if arguments.resume and out is not None and out.is_file():
        earlier = json.loads(out.read_text())
        differs = [key for key in ("environment", *settings) if earlier[key] != result[key]]
        if differs:
            raise SystemExit(f"--resume: {out} has another {differs[0]}; leave --resume out")
        result = earlier
    for name in arguments.tasks:
        if name in result["tasks"]:
            continue
        print(f"strategies: {name}", file=sys.stderr, flush=True)
        result["tasks"][name] = _in_process(name, settings)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = out.with_suffix(".tmp")
            temporary.write_text(json.dumps(result, indent=1) + "\n")
            temporary.replace(out)
    print(table(result))


def _in_process(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The result of one task; the progress of its process is shown."""
    command = [sys.executable, str(HERE / "strategies.py"), name, json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"strategies: {name} failed; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """The qualities of all tasks as one Markdown table, then a table of each task, and where a strategy loses to something simpler."""
    tasks = result["tasks"]
    names = list(dict.fromkeys(row["name"] for task in tasks.values() for row in task["rows"]))
    by_name = {key: {row["name"]: row for row in task["rows"]} for key, task in tasks.items()}
    lines = [
        f"**quality** ({machine(result['environment'])})",
        "",
        f"| | {' | '.join(map(_heading, tasks))} |",
        f"|---|{'---|' * len(tasks)}",
    ]
    for name in names:
        cells = [_number(by_name[key].get(name, {}).get("quality")) for key in tasks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for key, task in tasks.items():
        proof = PROOFS[key]
        lines += [
            "",
            f"**{key}**: {proof.title}. {task['steps']} steps, batches of {proof.training['batch_size']}; quality: {proof.measure}",
            "",
            "| | quality | loss | rate | seconds | memory (MiB) | trained numbers |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in task["rows"]:
            rate = "" if row["rate"] is None else f"{row['rate']:g}"
            lines.append(
                f"| {row['name']} | {_number(row['quality'])} | {_number(row['loss'])} | {rate} | {row['seconds']:.0f} | "
                f"{row['peak_mib']:.0f} | {row['trained']:,} |"
            )
        lines += ["", *(f"- {warning}" for warning in task["warnings"])] if task["warnings"] else []
    return "\n".join(lines)


def stored_table() -> str:
    """The tables of the stored result, or a sentence if nothing was measured."""
    return table(json.loads(RESULT.read_text())) if RESULT.is_file() else NOT_MEASURED


def _heading(name: str) -> str:
    return f"{name} ({'lower' if PROOFS[name].training.get('best_metric') == 'loss' else 'higher'} is better)"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main() -> None:
    """Run one task and print its result as JSON."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=PROOFS)
    parser.add_argument("settings", type=json.loads, help="a JSON document")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(prove(arguments.task, arguments.settings, Path(folder))))


def prove(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compare the strategies on one task.

    Args:
        name: A key of ``PROOFS``.
        settings: ``strategies``, ``steps`` (``None``: those of the task), ``seed`` and ``smoke``.
        folder: An empty folder for the model and the runs.

    Returns:
        ``steps``; ``rows`` with ``name``, ``quality``, ``loss``, ``rate``, ``seconds``, ``peak_mib`` and ``trained``; ``warnings``.
    """
    import strategy_models

    import peftkit

    proof = PROOFS[name]
    smoke = settings["smoke"]
    steps = settings["steps"] or (4 if smoke else proof.steps)
    train, held_out = proof.rows(*((32, 8) if smoke else proof.sizes))
    model = strategy_models.prepare(proof.model, folder / "model", smoke)
    chosen = [n for n in settings["strategies"] if proof.has_head or n != "probe_then_tune"]
    recipe = {
        "model": str(model),
        "task": proof.task,
        "data": {"train": train, "eval": held_out, "preview": 0},
        "training": {
            **proof.training,
            **({"head_lr": HEAD_RATE} if proof.has_head else {}),
            **({"batch_size": 4} if smoke else {}),
            "max_steps": steps,
            "checkpoint_every": steps,
            "samples": 0,
            "seed": settings["seed"],
        },
        "out": str(folder / "runs"),
    }
    own = {"gradual": {"blocks_per_stage": 1 if smoke else proof.blocks_per_stage}}
    if proof.model == "digits":  # PEFT has no default for this model
        own["ia3"] = strategy_models.IA3_OF_VIT
    given = [{**STRATEGIES[n], **own.get(n, {}), "lr": RATES[n]} for n in chosen]
    found = peftkit.compare(
        recipe, given, say=lambda line: print(f"  {line}", file=sys.stderr, flush=True)
    )
    rows = []
    baselines = len(found.rows) - len(chosen)
    for row, label in zip(
        found.rows, [*(r.name for r in found.rows[:baselines]), *chosen], strict=True
    ):
        run_folder = folder / "runs" / row.name
        quality = row.quality
        if name == "records":
            run_or_base = model if row.kind == "pretrained" else run_folder
            quality = strategy_models.exact_matches(run_or_base, model, held_out)
        rows.append(
            {
                "name": label,
                "quality": quality,
                "loss": row.metrics.get("eval_loss"),
                "rate": HEAD_RATE if row.kind == "probe" else _rate(run_folder),
                "seconds": row.seconds,
                "peak_mib": row.peak_mib,
                "trained": row.trained,
            }
        )
    renamed = {row.name: label for row, label in zip(found.rows[baselines:], chosen, strict=True)}
    return {
        "steps": steps,
        "rows": rows,
        "warnings": [_warning(w, renamed) for w in found.warnings],
    }


def _rate(run_folder: Path) -> float | None:
    """The learning rate of a run; ``None`` if nothing was trained."""
    import yaml

    file = run_folder / "recipe.yaml"
    return yaml.safe_load(file.read_text())["training"]["lr"] if file.is_file() else None


def _warning(text: str, renamed: dict[str, str]) -> str:
    """A warning of the comparison without its advice, with the names of this table."""
    name, _, rest = text.split(". ")[0].partition(" ")
    return f"{renamed.get(name, name)} {rest}"


if __name__ == "__main__":
    main()
