"""What quantised bases and merges cost in quality: SmolLM2 is tuned on Python's language reference with each base, and then merged.

    python benchmarks/run.py tuning
    python benchmarks/tuning.py --tune nf4 --base DIR    # one run; prints a JSON document

The text is that of ``texts.py``. ``DIR`` is the model's folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from learning import model_folder
from report import environment, load, machine, run_script, save
from texts import text_blocks
from torch import Tensor

HELP = "loss on quantised bases after tuning, and what merges keep of it"
STEPS, BATCH, LENGTH, LEARNING_RATE = 200, 2, 128, 5e-4
LAST = 20
"""Steps of which the training loss is the mean."""


class Merge(NamedTuple):
    """One way to merge: the arguments of ``merge``, and the ``base`` with which the result is loaded."""

    dtype: str
    rounding: str
    base: str = "auto"


class Tune(NamedTuple):
    """How a model is tuned: the ``base`` of ``load_base``, the options of ``wrap``, and the merges that follow."""

    base: str
    options: dict[str, Any]
    merges: tuple[Merge, ...]


_QUANTISED = Merge("base", "nearest"), Merge("base", "outputs")
TUNES = {
    "float32": Tune("fp32", {}, (Merge("bf16", "outputs", "fp32"),)),
    "nf4": Tune("nf4", {}, (Merge("bf16", "outputs", "fp32"), *_QUANTISED)),
    "int8": Tune("int8", {"int8_mode": "weight-only"}, _QUANTISED),
    "int8-compute": Tune("int8", {"int8_mode": "compute"}, ()),
    "nf4, merge-aware": Tune("nf4", {"merge_into": "nf4"}, _QUANTISED[:1]),
    "int8, merge-aware": Tune("int8", {"merge_into": "int8"}, _QUANTISED[:1]),
    "float32, merge-aware": Tune("fp32", {"merge_into": "nf4"}, (Merge("fp32", "nearest", "nf4"),)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--tune", choices=TUNES, action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--resume", action="store_true", help="keep the tunes that the saved result already has"
    )


def run(arguments: argparse.Namespace) -> None:
    """Tune and merge with every base, save the result after each, and print the tables."""
    result = {"environment": environment(), "steps": arguments.steps, "runs": {}}
    if arguments.resume:
        earlier = load("tuning")
        if any(earlier[key] != result[key] for key in ("environment", "steps")):
            raise SystemExit(
                "--resume: the saved result has another environment or number of steps; leave it out"
            )
        result = earlier
    runs = result["runs"]
    with tempfile.TemporaryDirectory() as folder:
        base = str(model_folder("records", Path(folder)))
        for name in arguments.tune or TUNES:
            if arguments.resume and name in runs:
                continue
            print(f"tuning: {name}", file=sys.stderr, flush=True)
            options = ["--tune", name, "--base", base, "--steps", str(arguments.steps)]
            runs[name] = run_script("tuning.py", *options)
            save(result, "tuning")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The results as two Markdown tables: tunes and merges."""
    runs = result["runs"]
    plain = runs.get("float32")
    lines = [
        f"**tuning** ({machine(result['environment'])})",
        "",
        f"| base | training loss, last {LAST} steps | / float32 | held-out loss before | after |",
        "|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        over = f"{found['training_loss'] / plain['training_loss']:.4f}" if plain else ""
        lines.append(
            f"| {name} | {found['training_loss']:.4f} | {over} | {found['before']:.4f} | {found['after']:.4f} |"
        )
    lines += [
        "",
        "| tuned on | merged into | loaded as | rounding | held-out loss | share of the gain kept | recovery of the logits |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        for merge in found["merges"]:
            kept = (found["before"] - merge["loss"]) / (found["before"] - found["after"])
            lines.append(
                f"| {name} | {merge['dtype']} | {merge['base']} | {merge['rounding']} | {merge['loss']:.4f} | {kept:.3f} | {merge['recovery']:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run one tune with its merges and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", choices=TUNES, required=True)
    parser.add_argument("--base", type=Path, required=True, help="the model's folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    json.dump(tune(arguments.tune, arguments.base, arguments.steps), sys.stdout)
    print()


def tune(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Tune on the text and merge.

    Returns:
        ``before`` and ``after``: the loss on the held-out text; ``losses``: of each step; ``training_loss``: the mean of the last ones;
        ``merges``: ``dtype``, ``rounding``, ``loss`` and the certificate's ``recovery`` of each merge. Nothing is timed.
    """
    from transformers import AutoTokenizer

    from peftkit import load_base, wrap

    base, options, merges = TUNES[name]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    blocks, held_out = text_blocks(
        lambda text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id], LENGTH
    )
    torch.manual_seed(0)
    model = wrap(load_base(folder, base, dtype=torch.float32), **options)
    before = held_out_loss(model, held_out)
    losses = train(model, blocks, steps)
    result = {
        "before": before,
        "after": held_out_loss(model, held_out),
        "losses": losses,
        "training_loss": statistics.mean(losses[-LAST:]),
    }
    with tempfile.TemporaryDirectory() as out:
        result["merges"] = [
            merged(model, Path(out) / str(i), merge, blocks, held_out)
            for i, merge in enumerate(merges)
        ]
    return result


def train(model: Any, blocks: Tensor, steps: int) -> list[float]:
    """AdamW with a rate that falls linearly. Returns the loss of each step."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for step in range(steps):
        rows = [(step * BATCH + i) % len(blocks) for i in range(BATCH)]
        loss = model(input_ids=blocks[rows], labels=blocks[rows]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def held_out_loss(model: Any, held_out: Tensor, blocks: int = 48) -> float:
    """The mean loss of the first held-out blocks, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        losses = [
            model(input_ids=rows, labels=rows).loss.item() for rows in held_out[:blocks].split(4)
        ]
    return statistics.mean(losses)


def merged(model: Any, out: Path, how: Merge, blocks: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Merge into a folder, load it and measure its loss. The probe are blocks of the training text."""
    from peftkit import load_base, merge

    found = merge(
        model,
        out,
        how.dtype,  # type: ignore[arg-type]
        rounding=how.rounding,  # type: ignore[arg-type]
        min_recovery=None,
        probe=blocks[-16:],
    )
    loss = held_out_loss(load_base(out, how.base, dtype=torch.float32), held_out)
    return {**how._asdict(), "loss": loss, "recovery": found.recovery}


if __name__ == "__main__":
    main()
