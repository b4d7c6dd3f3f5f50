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

from demo import compare as comparison
from demo.files import read_json, replacing, write_json
from demo.generator import Example, make_examples
from demo.interrupt import GracefulInterrupt, Interrupted
from demo.model import load_model, load_tokenizer, prepare_base, quiet_upstream
from demo.progress import Display
from demo.report import print_report, write_report
from demo.settings import Folder, Settings
from peftkit.environment import describe_environment

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_phases(
    folder: Folder,
    settings: Settings,
    console: Console,
    *,
    compare: bool,
    json_path: Path | None,
    began: float,
) -> int:
    """Run the unfinished phases of the run in ``folder``, then write and print the report.

    Returns:
        The exit status: 0, or 1 if plain PEFT or the merged model disagrees.

    Raises:
        Interrupted: Ctrl-C was pressed during training. A checkpoint of the last step has been written.
        KeyboardInterrupt: Ctrl-C was pressed in another phase. Finished phases are kept.
    """
    startup_seconds = time.perf_counter() - began
    with quiet_upstream(), Display(console) as display:
        run = _Run(folder, settings, display)
        run.all_phases()
        if compare:
            for method in comparison.METHODS:
                if not folder.phase(f"run-{method}").is_file():
                    display.phase(f"comparing: {method}", 1)
                    comparison.measure_in_process(method, folder)
    report = _collect(folder, settings, run.held_out, startup_seconds)
    write_report(report, folder.path)
    write_json(folder.path / "report.json", report)
    if json_path is not None:
        write_json(json_path, report)
    print_report(report, console, folder.path)
    return 0 if report["plain_peft_agrees"] and report["merged_agrees"] else 1


class _Run:
    """The phases that share a loaded model: evaluation of the base model, training, evaluation of the tuned model, proof."""

    def __init__(self, folder: Folder, settings: Settings, display: Display):
        self._folder, self._settings, self._display = folder, settings, display
        self.held_out = make_examples("held_out", settings.held_out_pairs, settings.seed)
        self._base: PreTrainedModel | None = None
        self._tuned: PeftModel | None = None
        self._interrupted = False

    def all_phases(self) -> None:
        """Run the unfinished phases."""
        self._phase("unpack", self._unpack)
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
        if self._interrupted:
            raise Interrupted(f"stopped after the phase {name!r}")

    def _unpack(self) -> dict[str, Any]:
        if not self._folder.base.is_dir():
            self._display.phase("unpacking the weights", 1)
            prepare_base(self._folder.base)
        return {}

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._folder.base)

    @cached_property
    def _max_new_tokens(self) -> int:
        from demo.evaluate import longest_answer

        return longest_answer(self.held_out, self._tokenizer)

    def _load_base(self) -> PreTrainedModel:
        if self._base is None:
            self._display.phase("loading the model", 1)
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
        return self._evaluate("evaluating the base model", self._load_base())

    def _evaluate_tuned(self) -> dict[str, Any]:
        return self._evaluate("evaluating the tuned model", self._load_tuned())

    def _evaluate(self, title: str, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
        from demo.evaluate import decode, score

        self._display.phase(title, len(self.held_out))
        predictions = decode(
            model,
            self._tokenizer,
            [example.request for example in self.held_out],
            max_new_tokens=self._max_new_tokens,
            batch_size=self._settings.decode_batch_size,
            on_progress=self._display.advance_to,
        )
        return {"score": asdict(score(self.held_out, predictions)), "predictions": predictions}

    def _train(self) -> dict[str, Any]:
        """Train and save the adapter. After Ctrl-C, training stops at the end of the step and writes a checkpoint."""
        import torch

        from demo.train import train, training_rows
        from peftkit import explain

        settings = self._settings
        with GracefulInterrupt() as interrupt:
            base, self._base = self._load_base(), None
            examples = make_examples("train", settings.train_pairs, settings.seed)
            rows = training_rows(examples, self._tokenizer, settings)
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
        from demo.proof import prove

        model = self._load_tuned()
        self._display.phase("checking that plain PEFT agrees", 1)
        return prove(
            model,
            self._tokenizer,
            self.held_out[: self._settings.proof_prompts],
            self._folder,
            max_new_tokens=self._max_new_tokens,
        )


def _collect(
    folder: Folder, settings: Settings, held_out: list[Example], startup_seconds: float
) -> dict[str, Any]:
    """Return the content of the report as data."""
    names = ("unpack", "base", "training", "tuned", "proof")
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
    scores = {which: done[which]["score"] for which in ("base", "tuned")}
    return {
        "exact_match": {which: score["exact_match"] for which, score in scores.items()},
        "seconds": sum(seconds.values()),
        "plain_peft_agrees": proof.pop("plain_peft_agrees"),
        "merged_agrees": proof.pop("merged_agrees"),
        "runs": runs,
        "environment": describe_environment(),
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
