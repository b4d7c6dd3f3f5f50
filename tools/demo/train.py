"""Train with transformers' Trainer: progress display, checkpoints that are either complete or absent, and Ctrl-C."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from demo.dataset import collate, encode, order_in_batches
from demo.files import recover, swap_in, writing
from demo.generator import Example
from demo.interrupt import GracefulInterrupt
from demo.model import device
from demo.progress import Display
from demo.settings import Folder, Settings
from peftkit.peak_memory import PeakMemory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_KEPT_CHECKPOINTS = 2
_PREFIX = "checkpoint-"  # Trainer's names of checkpoints


def training_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[dict[str, list[int]]]:
    """Return ``steps · batch_size`` tokenised examples, in the order of training.

    If this is more than one pass over the examples, each pass has another order.
    """
    rows = [encode(example, tokenizer) for example in examples]
    lengths = [len(row["input_ids"]) for row in rows]
    needed = settings.steps * settings.batch_size
    order: list[int] = []
    while len(order) < needed:
        order += order_in_batches(lengths, settings.batch_size, settings.seed + len(order))
    return [rows[i] for i in order[:needed]]


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    folder: Folder,
    settings: Settings,
    display: Display,
    interrupt: GracefulInterrupt,
) -> dict[str, Any]:
    """Train ``model`` until the last step or until ``interrupt.requested``. If there is a checkpoint, continue from it.

    Returns:
        ``steps``: ``loss``, ``seconds`` and ``tokens`` (without padding) of each step, including the steps before the
        checkpoint. ``resumed_at``: the number of steps before the checkpoint. ``peak_bytes``: the peak memory, relative to the
        memory at the time of the call.
    """
    memory = PeakMemory(device())
    checkpoint = last_checkpoint(folder)
    trainer = _CheckpointingTrainer(
        model=model,
        args=_arguments(folder, settings),
        train_dataset=rows,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
        callbacks=[_Watch(rows, settings, display, memory, interrupt)],
    )
    trainer.remove_callback(PrinterCallback)
    held = memory.reset()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = [
        {"loss": entry["loss"], "seconds": entry["seconds"], "tokens": entry["tokens"]}
        for entry in trainer.state.log_history
        if "seconds" in entry
    ]
    resumed_at = int(checkpoint.name.removeprefix(_PREFIX)) if checkpoint else 0
    return {"steps": steps, "resumed_at": resumed_at, "peak_bytes": memory.peak() - held}


def last_checkpoint(folder: Folder) -> Path | None:
    """Return the newest complete checkpoint of the run, or None."""
    for aside in folder.checkpoints.glob(f"{_PREFIX}*.old"):
        recover(aside.with_suffix(""))
    checkpoints = _checkpoints(folder.checkpoints)
    return checkpoints[-1] if checkpoints else None


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def _arguments(folder: Folder, settings: Settings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",  # training_rows has already ordered the examples
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_steps,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=settings.checkpoint_every,
        seed=settings.seed,
        use_cpu=device() == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


class _CheckpointingTrainer(Trainer):
    """Writes each checkpoint under a temporary name, and renames the complete checkpoint."""

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = Path(super()._get_output_dir(trial))
        staging = final / "partial"
        shutil.rmtree(staging, ignore_errors=True)
        self._staging = staging
        with writing(final):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            (complete,) = _checkpoints(staging)
            swap_in(complete, final / complete.name)
            shutil.rmtree(staging)
            for old in _checkpoints(final)[:-_KEPT_CHECKPOINTS]:
                shutil.rmtree(old)


class _Watch(TrainerCallback):
    """Adds time and tokens to each logged step, updates the display, and saves and stops after Ctrl-C."""

    def __init__(
        self,
        rows: Sequence[dict[str, list[int]]],
        settings: Settings,
        display: Display,
        memory: PeakMemory,
        interrupt: GracefulInterrupt,
    ):
        size = settings.batch_size
        self._tokens = [
            sum(len(row["input_ids"]) for row in rows[i : i + size])
            for i in range(0, len(rows), size)
        ]
        self._settings, self._display = settings, display
        self._memory, self._interrupt = memory, interrupt
        self._step_began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._display.phase("training", self._settings.steps, state.global_step, "steps", 4)

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds = time.perf_counter() - self._step_began
        if self._interrupt.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        tokens = self._tokens[state.global_step - 1]
        state.log_history[-1].update(seconds=self._seconds, tokens=tokens)
        note = (
            f"loss {logs['loss']:.3f}  {tokens / self._seconds:.0f} tokens/s  "
            f"{self._memory.now() / 2**20:.0f} MiB"
        )
        if self._interrupt.requested:
            note += "  stopping"
        self._display.advance_to(state.global_step, note)
