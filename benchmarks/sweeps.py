"""The time of a sweep of four adapters on one frozen model against that of four runs one after the other, on SmolLM2.

    python benchmarks/run.py sweep
    python benchmarks/run.py sweep --keep-best 1                         # the losers are dropped after 30 % of the steps
    python benchmarks/run.py sweep --joint                               # steps of all adapters in one batch, on a CPU too
    python benchmarks/run.py sweep --model DIR --steps 3 --length 32 --rounds 1      # a smoke run
    python benchmarks/sweeps.py --model DIR --adapter 0                  # one run alone; without --adapter the sweep; prints a JSON document

The sweep and each run are processes of their own, which import, load the model and the rows, train and evaluate. They take turns. A ratio is
printed only if the machine was quiet and each adapter of the sweep ends with the evaluation loss of its own run. ``DIR`` is the folder of a causal language model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from guard import Guard
from report import environment, machine, run_script, save

HELP = "one sweep of four adapters against four runs"
BAR = 0.5
"""The ratio that the sweep should reach."""

OVER = {"strategy.r": [8, 16], "training.lr": [2e-4, 5e-4]}
STEPS, BATCH, LENGTH, ROUNDS = 40, 2, 128, 3
AGREES = 1e-3
"""Relative difference of two evaluation losses that rounding may explain after some steps in float32."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of each adapter in a step")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--joint", action="store_true", help="joint steps, on a CPU too")
    parser.add_argument("--keep-best", type=int, help="as for peftkit sweep; default: all")
    parser.add_argument("--base", choices=("fp32", "bf16", "nf4", "int8"), default="fp32")


def run(arguments: argparse.Namespace) -> None:
    """Measure in turn, save the result after each round, and print the table."""
    result: dict[str, Any] = {
        "environment": environment(),
        "steps": arguments.steps,
        "batch": arguments.batch,
        "length": arguments.length,
        "base": arguments.base,
        "keep_best": arguments.keep_best,
        "joint": arguments.joint,
        "rounds": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            from learning import model_folder

            model = model_folder("records", Path(folder))
        options = ["--model", str(model), "--base", arguments.base]
        sweep_options = ["--keep-best", str(arguments.keep_best)] if arguments.keep_best else []
        sweep_options += ["--joint"] * arguments.joint
        for name in ("steps", "batch", "length"):
            options += [f"--{name}", str(getattr(arguments, name))]
        guard = Guard()
        for number in range(arguments.rounds):
            print(f"sweep: round {number + 1}", file=sys.stderr, flush=True)
            found = {
                "sweep": guard.run(lambda: _timed([*options, *sweep_options])),
                "runs": guard.run(lambda: _in_turn(options)),
            }
            found["disturbed"] = guard.disturbed(found["sweep"]) or guard.disturbed(found["runs"])
            result["rounds"].append(found)
            kind = "-halving" * bool(arguments.keep_best) + "-joint" * arguments.joint
            save(result, f"sweep{kind}")
    print(table(result))


def _timed(options: list[str]) -> dict[str, Any]:
    """One process and its seconds."""
    begin = time.perf_counter()
    found = run_script("sweeps.py", *options)
    return found | {"seconds": time.perf_counter() - begin}


def _in_turn(options: list[str]) -> dict[str, Any]:
    """The runs one after the other, with the sums of their seconds."""
    runs = [
        _timed([*options, "--adapter", str(i)])
        for i in range(len(list(itertools.product(*OVER.values()))))
    ]
    losses = {name: loss for run in runs for name, loss in run["losses"].items()}
    return {"losses": losses} | {n: sum(run[n] for run in runs) for n in ("seconds", "training")}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with the ratio if the losses agree."""
    rounds = result["rounds"]
    seconds = {
        kind: [
            statistics.median(one[kind][name] for one in rounds) for name in ("seconds", "training")
        ]
        for kind in ("sweep", "runs")
    }
    worst = max(
        abs(loss / one["runs"]["losses"][name] - 1)
        for one in rounds
        for name, loss in one["sweep"]["losses"].items()
    )
    kept = result.get("keep_best")
    lines = [
        f"**sweep** ({machine(result['environment'])}): {len(rounds[0]['runs']['losses'])} adapters, {result['steps']} steps, "
        f"{result['batch']} x {result['length']} tokens each, base {result['base']}"
        + (f", {kept} kept after 30 % of the steps" if kept else "")
        + (", joint steps" if result.get("joint") else ""),
        "",
        "| | whole (s) | training (s) |",
        "|---|---|---|",
        *(
            f"| {kind} | {whole:.1f} | {training:.1f} |"
            for kind, (whole, training) in seconds.items()
        ),
        "",
    ]
    if not worst <= AGREES:
        return "\n".join([*lines, f"The losses differ by {worst:.2g}, so there is no ratio."])
    busy = [one["disturbed"] for one in rounds if one["disturbed"]]
    if busy:
        return "\n".join([*lines, f"There is no ratio: {busy[0]}"])
    ratio = seconds["sweep"][0] / seconds["runs"][0]
    inner = seconds["sweep"][1] / seconds["runs"][1]
    verdict = "within" if ratio <= BAR else "above"
    return "\n".join(
        [
            *lines,
            f"The sweep takes {ratio:.2f} of the time of the runs ({inner:.2f} in training), {verdict} the bar of {BAR}. Losses differ by at "
            f"most {worst:.1g}.",
        ]
    )


def main() -> None:
    """Measure the sweep, or one of the runs, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=int, help="number of the run; default: the sweep")
    add_options(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        json.dump(measure(arguments, Path(folder)), sys.stdout)
    print()


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The seconds of the training, and the evaluation loss of each adapter by its name."""
    rows, held_out = _texts(folder)
    recipe = {
        "model": str(arguments.model),
        "base": arguments.base,
        "task": "causal_lm",
        "strategy": "lora",
        "data": {"train": str(rows), "eval": str(held_out), "max_rows": 400},
        "training": {
            "max_steps": arguments.steps,
            "batch_size": arguments.batch,
            "seq_len": arguments.length,
            "checkpoint_every": arguments.steps,
            "samples": 0,
        },
        "out": str(folder / "out"),
    }
    import peftkit
    from peftkit.finetune.together.over import read_over, variants

    if arguments.joint:
        from peftkit.finetune.together import passes

        passes.JOINT_DEVICES, passes.JOINT_TOKENS = ("cpu", *passes.JOINT_DEVICES), sys.maxsize
    with _Training() as training:
        if arguments.adapter is None:
            rows_of_all = peftkit.sweep(recipe, OVER, keep_best=arguments.keep_best).rows
            ended = [row for row in rows_of_all if row.status == "finished"]
            losses = {row.name: row.metrics["eval_loss"] for row in ended}
        else:
            variant = variants(recipe, read_over(OVER))[arguments.adapter]
            losses = {variant.name: peftkit.train(variant.recipe).metrics["eval_loss"]}
    return {"training": training.seconds, "losses": losses}


def _texts(folder: Path) -> tuple[Path, Path]:
    """Python's topics as lines of JSON: for training, and every fifth held out."""
    from pydoc_data.topics import topics

    files = folder / "train.jsonl", folder / "eval.jsonl"
    for number, file in enumerate(files):
        names = [n for i, n in enumerate(sorted(topics)) if (i % 5 == 4) == bool(number)]
        names = names[:4] if number else names
        file.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in names))
    return files


class _Training:
    """Measures the time in which at least one training runs."""

    def __enter__(self) -> _Training:
        from transformers import Trainer

        self.seconds, self._running, self._train = 0.0, 0, Trainer.train

        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._running:
                self._begin = time.perf_counter()
            self._running += 1
            try:
                return self._train(trainer, *args, **kwargs)
            finally:
                self._running -= 1
                if not self._running:
                    self.seconds += time.perf_counter() - self._begin

        Trainer.train = train
        return self

    def __exit__(self, *error: object) -> None:
        from transformers import Trainer

        Trainer.train = self._train


if __name__ == "__main__":
    main()
