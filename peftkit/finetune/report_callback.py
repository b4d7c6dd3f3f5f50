"""``ReportCallback``: a page about a training with transformers' Trainer or TRL's trainers."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from peftkit.checks.reach import undisturbed
from peftkit.errors import ContractError, short
from peftkit.finetune.generation import answer
from peftkit.finetune.run_page import Run, run_page
from peftkit.peak_memory import PeakMemory
from peftkit.planning.result import MemoryPlan
from peftkit.report import explain
from peftkit.report_page import write_page
from peftkit.report_page.machine import machine_facts

_WRITE_EVERY_S = 30.0
_SETTINGS = {
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "steps of warm-up",
    "per_device_train_batch_size": "batch size",
    "gradient_accumulation_steps": "batches of a step",
    "optim": "optimiser",
    "weight_decay": "weight decay",
    "max_grad_norm": "largest norm of gradients",
    "gradient_checkpointing": "gradient checkpointing",
    "bf16": "bf16",
    "fp16": "fp16",
    "seed": "seed",
}


class ReportCallback(TrainerCallback):
    """Writes a page about the training: curves, settings, time, memory, answers, machine. The page is one file and loads nothing.

        Trainer(..., callbacks=[ReportCallback("report.html", prompts=["Write 3 March 2024 as an ISO date."])])

    The page is written at evaluations, checkpoints, the end, and while losses are logged, at most every 30 seconds. In training with several
    processes the first one writes it. The callback changes neither the model nor the random numbers of the training.

    Args:
        path: The file to write. A missing folder is created.
        prompts: Texts, or chats as lists of messages, that the model answers before and after the training, greedily.
        max_new_tokens: Largest number of tokens of an answer.
        title: Title of the page.
        plan: What ``peftkit.plan`` returned for this training; the page shows it next to the measured memory.

    Raises:
        ContractError: ``prompts`` is a single text. At the start of the training: there are prompts, but the trainer has no tokenizer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "report.html",
        *,
        prompts: Sequence[Any] = (),
        max_new_tokens: int = 64,
        title: str | None = None,
        plan: MemoryPlan | None = None,
    ):
        if isinstance(prompts, str):
            raise ContractError(f"prompts={short(prompts)} is one text; pass a list of prompts")
        self.path, self.prompts = Path(path), list(prompts)
        self.max_new_tokens, self.title, self.plan = max_new_tokens, title, plan
        self._answers: dict[str, list[str]] = {}
        self._seconds: list[float] = []
        self._began = self._step_began = self._written = 0.0
        self._measured: int | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._answer("before", model, kwargs.get("processing_class"))
        self._seconds = []
        self._memory = PeakMemory(str(args.device))
        self._held = self._memory.reset()
        self._began = self._written = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds.append(time.perf_counter() - self._step_began)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._began and time.monotonic() - self._written >= _WRITE_EVERY_S:
            self._write(args, state, model)

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._write(args, state, model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self._began:  # an evaluation before any training has nothing to report
            self._write(args, state, model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._measured = self._memory.peak() - self._held
        self._answer("after", model, kwargs.get("processing_class"))
        self._write(args, state, model, finished=True)

    def _answer(self, when: str, model: Any, tokenizer: Any) -> None:
        if not self.prompts:
            return
        if tokenizer is None:
            raise ContractError(
                f"prompts={short(self.prompts)} need a tokenizer; pass processing_class=tokenizer to the trainer, or no prompts"
            )
        with undisturbed(model):
            self._answers[when] = [
                answer(model, tokenizer, _ids(prompt, tokenizer), self.max_new_tokens)
                for prompt in self.prompts
            ]

    def _write(self, args: Any, state: Any, model: Any, finished: bool = False) -> None:
        if not state.is_world_process_zero:
            return
        self._written = time.monotonic()
        found = explain(model)
        share = found.trainable / found.total if found.total else 0.0
        run = Run(
            title=self.title or f"Training of {found.model}",
            lead=f"{found.trainable:,} of {found.total:,} parameters are trained ({share:.2%}); step {state.global_step} of {state.max_steps}.",
            history=state.log_history,
            settings=_settings(args, state, model),
            machine=machine_facts(),
            samples=self._samples(),
            notes=[
                f"{found.fused_fraction:.0%} of the adapter layers are fused.",
                f"The loss is computed without the logits: {'yes' if found.logit_free else 'no'} ({found.logit_free_reason}).",
            ]
            if any(row.is_adapter for row in found.layers)
            else [],
            seconds=time.monotonic() - self._began,
            step_seconds=statistics.median(self._seconds) if self._seconds else None,
            measured_bytes=self._measured if finished else self._memory.peak() - self._held,
            plan=self.plan,
            finished=finished,
        )
        write_page(self.path, run_page(run))

    def _samples(self) -> list[dict[str, str]]:
        return [
            {"prompt": _text(prompt), **{when: texts[i] for when, texts in self._answers.items()}}
            for i, prompt in enumerate(self.prompts)
        ]


def _ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return found["input_ids"]


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _settings(args: Any, state: Any, model: Any) -> list[tuple[str, str]]:
    rows = [("steps", f"{state.max_steps:,}"), ("epochs", f"{state.num_train_epochs:g}")]
    for name, title in _SETTINGS.items():
        value = getattr(args, name, None)
        if value is not None:
            rows.append((title, str(getattr(value, "value", value))))
    for name, config in getattr(model, "peft_config", {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        numbers = {key: getattr(config, key, None) for key in ("r", "lora_alpha", "lora_dropout")}
        known = ", ".join(f"{key}={value}" for key, value in numbers.items() if value is not None)
        rows.append((f"adapter {name}", f"{kind} {known}".strip()))
    return rows
