"""How the Trainer writes and reads checkpoints: a checkpoint counts once it is complete, and what is loaded is what was saved."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from peftkit.errors import ContractError, count, listing
from peftkit.find.modules import storage_of
from peftkit.finetune.checkpoints import (
    best_of,
    checkpoint_of,
    checkpoints_in,
    is_whole,
    mark_whole,
    remove,
    remove_old,
    require_best,
    require_digests,
    write_digests,
)
from peftkit.finetune.divided import (
    is_divided,
    load_optimizer,
    load_weights,
    whole_optimizer,
    whole_weights,
)
from peftkit.finetune.outcome import digests
from peftkit.finetune.processes import from_all, on_main

_TORCH_WRITES = ("inline_container", "PytorchStreamWriter", "file write failed")
"""Parts of the messages of torch's RuntimeError when a file cannot be written."""


class _Whole(NamedTuple):
    """What a checkpoint has of a model of which this process has a part: the states of the model and of the optimiser."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


class CheckedCheckpoints(Trainer):
    """A Trainer whose checkpoints are complete or do not count.

    Attributes:
        keep_checkpoints: Number of complete checkpoints to keep, besides the best one.
        stops_early: Whether the training stops without a better evaluation.
    """

    keep_checkpoints: int
    stops_early: bool
    _whole: _Whole | None = None
    """While a checkpoint is saved: the weights, if this process has only parts of them."""

    @property
    def has_no_best(self) -> bool:
        """Whether the best checkpoint should be chosen, and no evaluation could say which it is."""
        wanted = self.args.load_best_model_at_end and self.state.best_global_step is None
        return wanted and any(self.args.metric_for_best_model in e for e in self.state.log_history)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, mark it as complete, and only then remove older ones.

        Raises:
            ContractError: A file cannot be written. Older checkpoints are left as they are.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint = checkpoint_of(folder, self.state.global_step)
        with _explained(checkpoint):
            on_main(lambda: remove(checkpoint))  # what a process that was killed has left
            if isinstance(self.model, FSDPModule):
                # Only the process that writes would free its whole weights, and the others not gather them again.
                self.model.reshard()
            with self._gathered():
                super()._save_checkpoint(model, trial)
            from_all(None)  # waits for the files of all processes
            on_main(lambda: self._complete(checkpoint))

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """A context in which the process that writes has the whole weights of a model that is divided."""
        if is_divided(self.model):
            self._whole = _Whole(whole_weights(self.model), whole_optimizer(self.optimizer))
        try:
            yield
        finally:
            self._whole = None

    def _complete(self, checkpoint: Path) -> None:
        if isinstance(self.model, PeftModel):
            write_digests(checkpoint, digests(self.model))
        mark_whole(checkpoint)
        remove_old(checkpoint.parent, self.keep_checkpoints)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save a checkpoint under the names that weights have in memory.

        transformers saves some models under other names, such as ViT under those of older versions, but the Trainer reads checkpoints
        without renaming. It would leave weights as they were before training, with a warning only.
        """
        if self._whole is not None:
            state_dict = self._whole.weights
        if not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        own = vars(self.model)
        own["save_pretrained"] = partial(self.model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del own["save_pretrained"]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the states of optimiser and scheduler."""
        if self._whole is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(self._whole.optimizer, Path(output_dir) / OPTIMIZER_NAME)
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimiser and scheduler."""
        if checkpoint is None or not is_divided(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint and compare the tensors in memory with those that were saved."""
        if is_divided(self.model):
            self._issue_warnings_after_load(load_weights(self.model, Path(resume_from_checkpoint)))
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        require_digests(Path(resume_from_checkpoint), digests(self.model))

    def _load_best_model(self) -> None:
        """Load the best checkpoint. If it is lost or damaged the Trainer would keep the last weights, with a warning at most."""
        best = Path(str(self.state.best_model_checkpoint))
        on_main(lambda: require_best(best, self.stops_early))
        self._load_from_checkpoint(str(best))

    def load_finished(self, checkpoint: Path) -> bool:
        """Load the result of a training whose last step was done before the run ended; the Trainer would do one step more.

        Returns:
            False if there are steps left. Then nothing is loaded.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        callbacks: Any = state.stateful_callbacks  # a dictionary by name, once it was saved
        stopping = callbacks.get("EarlyStoppingCallback")
        early = isinstance(stopping, dict) and (
            stopping["attributes"]["early_stopping_patience_counter"]
            >= stopping["args"]["early_stopping_patience"]
        )
        if state.global_step < state.max_steps and not early:
            return False
        self.state = state
        best = best_of(checkpoint) if self.args.load_best_model_at_end else None
        if best is not None:
            require_best(best, self.stops_early)
            state.best_model_checkpoint = str(best)
        self._load_from_checkpoint(str(best or checkpoint))
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise ``ContractError`` if a checkpoint does not have every weight of the model. Tied weights are in it once."""
        state = self.model.state_dict()
        missing = set(load_result.missing_keys)
        stored = {storage_of(tensor) for name, tensor in state.items() if name not in missing}
        lost = [name for name in sorted(missing) if storage_of(state[name]) not in stored]
        left = sorted(load_result.unexpected_keys)
        if lost or left:
            raise ContractError(
                f"a checkpoint in {self.args.output_dir} does not fit {type(self.model).__name__}: {count(len(lost), 'weight')} missing, "
                f"{len(left)} left over:\n{listing([*lost, *left])}\nStart a new run in another folder."
            )


@contextmanager
def _explained(checkpoint: Path) -> Iterator[None]:
    """Raise ``ContractError`` if a checkpoint could not be written, and remove what there is of it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in _TORCH_WRITES):
            raise
        left = ""
        try:
            if not is_whole(checkpoint):
                remove(checkpoint)
        except OSError as second:
            left = f", and what there is of it cannot be removed ({second.strerror})"
        older = [path.name for path in checkpoints_in(checkpoint.parent) if is_whole(path)]
        way_out = (
            f"{older[-1]} is complete: continue with resume=true"
            if older
            else "there is no complete checkpoint yet: start again with resume=true"
        )
        raise ContractError(
            f"{checkpoint} could not be written{left}: {_reason(error, checkpoint.parent)}. Make room or correct the cause; {way_out}"
        ) from error


def _reason(error: Exception, folder: Path) -> str:
    """Why a file could not be written. torch and safetensors hide or rename the system's error."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        full = error.errno == errno.ENOSPC
    else:
        reason = " ".join(str(error).split())
        full = os.strerror(errno.ENOSPC) in reason
    free = shutil.disk_usage(folder).free / 2**20
    return reason if full else f"{reason} ({free:,.0f} MiB are free)"
