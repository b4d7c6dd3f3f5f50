"""The phases of a run, in order. Each phase writes its result to the folder; finished phases are not run again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from demo import calibrate as calibration
from demo import compare as comparison
from demo.command import demo_command, peftkit_command
from demo.environment import environment
from demo.files import read_json, replacing, write_json
from demo.generator import Example, make_examples
from demo.interrupt import GracefulInterrupt, Interrupted
from demo.model import load_model, load_tokenizer, prepare_base, quiet_upstream
from demo.progress import Display, duration
from demo.report import PHASE_NAMES, print_report, shorter_text, write_report
from demo.settings import DEFAULT_MINUTES, DEFAULT_OUT, Folder, Settings, stored_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PHASES = 8
"""Number of phases that the display counts: unpack, calibrate, evaluate, train, evaluate, prove, compare, write the report."""


def run_phases(
    folder: Folder,
    settings: Settings,
    console: Console,
    *,
    compare: bool,
    json_path: Path | None,
    began: float,
    minutes: float,
) -> int:
    """Run the unfinished phases of the run in ``folder``, then write and print the report.

    Returns:
        The exit status: 0, or 1 if plain PEFT or the merged model disagrees.

    Raises:
        Interrupted: Ctrl-C was pressed during training. A checkpoint of the last step has been written.
        KeyboardInterrupt: Ctrl-C was pressed in another phase. Finished phases and answers are kept.
    """
    startup_seconds = time.perf_counter() - began
    phases = PHASES if compare else PHASES - 1
    with quiet_upstream(), Display(console, phases) as display:
        run = _Run(folder, settings, display, compare=compare, minutes=minutes)
        run.all_phases()
        if compare:
            _compare(folder, run.settings, display)
        display.phase("writing the report", 1, number=phases)
        report = _collect(folder, run.settings, run.held_out, startup_seconds)
        report["commands"] = _commands(folder, json_path, compare, minutes)
        write_report(report, folder.path)
        write_json(folder.path / "report.json", report)
        if json_path is not None:
            write_json(json_path, report)
        display.advance_to(1)
    print_report(report, console, folder.path)
    return 0 if report["plain_peft_agrees"] and report["merged_agrees"] else 1


def _compare(folder: Folder, settings: Settings, display: Display) -> None:
    """Measure the methods that were not measured yet, each in a process of its own."""
    steps = comparison.steps_of(settings) + 1  # the first unit is the start of the process
    methods = comparison.METHODS
    display.phase("comparing", steps * len(methods), unit="steps", number=PHASES - 1)
    for i, method in enumerate(methods):
        note = f"{comparison.TITLES[method]} ({i + 1} of {len(methods)})"
        display.advance_to(i * steps, note)
        if not folder.phase(f"run-{method}").is_file():
            comparison.measure_in_process(
                method,
                folder,
                lambda done, i=i, note=note: display.advance_to(i * steps + done, note),
            )
    display.advance_to(steps * len(methods))


class _Run:
    """The phases that share a loaded model: evaluation of the base model, training, evaluation of the tuned model, proof."""

    def __init__(
        self, folder: Folder, settings: Settings, display: Display, *, compare: bool, minutes: float
    ):
        self._folder, self._display = folder, display
        self._whole = self.settings = settings
        self._compare, self._minutes = compare, minutes
        self._base: PreTrainedModel | None = None
        self._tuned: PeftModel | None = None
        self._interrupted = False

    def all_phases(self) -> None:
        """Run the unfinished phases."""
        self._phase("unpack", self._unpack)
        self._phase("calibration", self._calibrate)
        self.settings = stored_settings(self._folder)
        self._announce()
        self._phase("base", self._evaluate_base)
        self._phase("training", self._train)
        self._phase("tuned", self._evaluate_tuned)
        self._phase("proof", self._prove)

    def _phase(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        path = self._folder.phase(name)
        if not path.is_file():
            began = time.perf_counter()
            result = work()
            elapsed = time.perf_counter() - began + result.pop("seconds_before", 0.0)
            write_json(path, {"seconds": elapsed, **result})
            self._folder.answers(name).unlink(missing_ok=True)
        if self._interrupted:
            raise Interrupted(f"stopped after the phase {name!r}")

    def _unpack(self) -> dict[str, Any]:
        if not self._folder.base.is_dir():
            prepare_base(self._folder.base, self._unpacked)
        return {}

    def _unpacked(self, done: int, total: int) -> None:
        if done == 1:
            self._display.phase("unpacking the weights", total, unit="tensors", number=1)
        self._display.advance_to(done)

    def _calibrate(self) -> dict[str, Any]:
        """Time this machine, estimate the time of the phases, and choose shorter settings if they would take too long."""
        display = self._display
        display.phase("timing this machine", calibration.STEPS, unit="parts", number=2)
        requests = [example.request for example in self.held_out]
        rows = self._rows()
        pace = calibration.calibrate(
            self._load_base(),
            self._tokenizer,
            requests,
            rows,
            self.settings,
            display.advance_to,
        )
        answers = [example.answer for example in self.held_out]
        todo = calibration.work(self._tokenizer, requests, answers, rows)
        chosen, seconds = calibration.fitted(
            pace, todo, self.settings, self._compare, self._minutes
        )
        before, after = asdict(self.settings), asdict(chosen)
        return {
            "pace": asdict(pace),
            "estimate": seconds,
            "shorter": {name: after[name] for name in after if after[name] != before[name]},
        }

    def _announce(self) -> None:
        """Say how long the phases that are left will take."""
        found = read_json(self._folder.phase("calibration"))
        left = {
            name: seconds
            for name, seconds in found["estimate"].items()
            if not self._folder.phase("run-full" if name == "comparison" else name).is_file()
        }
        if left:
            parts = ", ".join(f"{PHASE_NAMES[name]} {duration(s)}" for name, s in left.items())
            self._display.say(
                f"Estimated time left on this machine: about {duration(sum(left.values()))} ({parts}). Ctrl-C stops; what is done is kept."
            )
        if shorter := found["shorter"]:
            self._display.say(
                f"On this machine the demo is shorter: {shorter_text(shorter, self._whole)}. The option --minutes allows more time."
            )

    @property
    def held_out(self) -> list[Example]:
        """The held-out requests. A shorter run has the first of them."""
        return self._all_held_out[: self.settings.held_out_pairs]

    @cached_property
    def _all_held_out(self) -> list[Example]:
        return make_examples("held_out", self._whole.held_out_pairs, self._whole.seed)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._folder.base)

    @cached_property
    def _max_new_tokens(self) -> int:
        from demo.evaluate import longest_answer

        return longest_answer(self.held_out, self._tokenizer)

    def _rows(self) -> list[dict[str, list[int]]]:
        from demo.train import training_rows

        settings = self.settings
        examples = make_examples("train", settings.train_pairs, settings.seed)
        return training_rows(examples, self._tokenizer, settings)

    def _load_base(self) -> PreTrainedModel:
        if self._base is None:
            self._base = load_model(self._folder.base)
        return self._base

    def _load_tuned(self) -> PeftModel:
        """Return the model that was just trained, or load the saved adapter into a new base model."""
        if self._tuned is None:
            from peftkit import load_adapter

            base, self._base = self._load_base(), None  # the base model has an adapter from here on
            self._tuned = load_adapter(base, self._folder.adapter)
        return self._tuned

    def _evaluate_base(self) -> dict[str, Any]:
        return self._evaluate("base", "evaluating the base model", 3, self._load_base)

    def _evaluate_tuned(self) -> dict[str, Any]:
        return self._evaluate("tuned", "evaluating the tuned model", 5, self._load_tuned)

    def _evaluate(
        self,
        name: str,
        title: str,
        number: int,
        load: Callable[[], PreTrainedModel | PeftModel],
    ) -> dict[str, Any]:
        """Answer the held-out requests. Answers are kept as they come, so that a killed run continues with the next request."""
        from demo.answers import Answers
        from demo.evaluate import decode, score

        requests, longest = [e.request for e in self.held_out], self._max_new_tokens
        answers = Answers(self._folder.answers(name))
        known = len(answers.known) * longest
        self._display.phase(title, len(requests) * longest, known, "tokens", number)

        def show(tokens: int, answered: int) -> None:
            self._display.advance_to(tokens, f"{answered} of {len(requests)} answered")

        predictions = decode(
            load(),
            self._tokenizer,
            requests,
            max_new_tokens=longest,
            batch_size=self.settings.decode_batch_size,
            on_progress=show,
            answers=answers,
        )
        return {"score": asdict(score(self.held_out, predictions)), "predictions": predictions}

    def _train(self) -> dict[str, Any]:
        """Train and save the adapter. After Ctrl-C, training stops at the end of the step and writes a checkpoint."""
        import torch

        from demo.train import train
        from peftkit import explain

        settings = self.settings
        with GracefulInterrupt() as interrupt:
            base, self._base = self._load_base(), None
            rows = self._rows()
            torch.manual_seed(settings.seed)
            model = comparison.adapted(base, settings)
            report = explain(model)
            result = train(
                model, self._tokenizer, rows, self._folder, settings, self._display, interrupt
            )
            steps = result["steps"]
            if interrupt.requested:
                raise Interrupted(
                    f"stopped after step {len(steps)} of {settings.steps}, and saved a checkpoint"
                )
            with replacing(self._folder.adapter) as partial:
                model.save_pretrained(partial)
                self._tokenizer.save_pretrained(partial)
        self._tuned, self._interrupted = model, interrupt.requested
        before = steps[: result.pop("resumed_at")]
        return {
            **result,
            "seconds_before": sum(step["seconds"] for step in before),
            "trainable": report.trainable,
            "total": report.total,
            "fused_fraction": report.fused_fraction,
        }

    def _prove(self) -> dict[str, Any]:
        from demo.proof import PARTS, prove

        model = self._load_tuned()
        self._display.phase("checking that plain PEFT agrees", PARTS, unit="parts", number=6)
        return prove(
            model,
            self._tokenizer,
            self.held_out[: self.settings.proof_prompts],
            self._folder,
            max_new_tokens=self._max_new_tokens,
            on_part=self._display.advance_to,
        )


def _collect(
    folder: Folder, settings: Settings, held_out: list[Example], startup_seconds: float
) -> dict[str, Any]:
    """Return the content of the report as data."""
    names = ("unpack", "calibration", "base", "training", "tuned", "proof")
    done = {name: read_json(folder.phase(name)) for name in names}
    training, proof = done["training"], done["proof"]
    runs = {
        method: read_json(folder.phase(f"run-{method}"))
        for method in comparison.METHODS
        if folder.phase(f"run-{method}").is_file()
    }
    if "peftkit" not in runs:
        steps = training["steps"]
        runs["peftkit"] = {
            "step_seconds": statistics.median(step["seconds"] for step in steps),
            "tokens_per_second": statistics.median(s["tokens"] / s["seconds"] for s in steps),
            "peak_bytes": training["peak_bytes"],
            "trainable": training["trainable"],
        }
    seconds = {"startup": startup_seconds} | {name: done[name]["seconds"] for name in names}
    compared = [run["seconds"] for run in runs.values() if "seconds" in run]
    if compared:
        seconds["comparison"] = sum(compared)
    scores = {which: done[which]["score"] for which in ("base", "tuned")}
    return {
        "exact_match": {which: score["exact_match"] for which, score in scores.items()},
        "seconds": sum(seconds.values()),
        "plain_peft_agrees": proof.pop("plain_peft_agrees"),
        "merged_agrees": proof.pop("merged_agrees"),
        "runs": runs,
        "environment": environment(),
        "estimate": done["calibration"]["estimate"],
        "shorter": done["calibration"]["shorter"],
        "settings": asdict(settings),
        "seconds_by_phase": seconds,
        "scores": scores,
        "training": training,
        "proof": proof,
        "samples": [
            {
                "request": example.request,
                "wanted": example.answer,
                "base": done["base"]["predictions"][i],
                "tuned": done["tuned"]["predictions"][i],
            }
            for i, example in enumerate(held_out)
        ],
    }


def _commands(
    folder: Folder, json_path: Path | None, compare: bool, minutes: float
) -> dict[str, str]:
    """The commands of the report: to repeat the run, and to go on with other data."""
    options = [] if compare else ["--no-compare"]
    if minutes != DEFAULT_MINUTES:
        options.append(f"--minutes={minutes:g}")
    if folder.path != DEFAULT_OUT:
        options.append(f"--out={folder.path}")
    if json_path is not None:
        options.append(f"--json={json_path}")
    train = f"train recipe.yaml model={folder.base} data.train=my-data.jsonl out=runs/mine"
    return {
        "repeat": demo_command(options),
        "recipe": peftkit_command("train --init sft recipe.yaml"),
        "train": peftkit_command(train),
        "generate": peftkit_command('generate runs/mine "Write 3 March 2024 as an ISO date."'),
        "plan": peftkit_command("plan Qwen/Qwen3-8B --fit 24GiB"),
    }
