"""Run one row of a comparison in a process of its own, so that its memory can be measured."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from peftkit.errors import ContractError
from peftkit.finetune.comparison.entries import Entry

_PRELOAD = ["peftkit.finetune.training", "peftkit.finetune.trainer", "peftkit.finetune.setup"]
_MIB = 2**20


def measure(entry: Entry, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """Run an entry in a new process.

    Args:
        entry: What is run.
        source: The recipe of the source data, or ``None``.

    Returns:
        ``metrics``, ``seconds`` of the training, ``peak_mib`` (memory above that before the model was loaded; of the GPU if there is one),
        ``trained``, ``problems``, ``source_before``, ``source_after``. ``new_head`` alone if the pretrained model has none for the task.

    Raises:
        ContractError: The run failed; the message is that of the run.
    """
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, entry, source))
    process.start()
    theirs.close()
    try:
        kind, found = ours.recv()
    except EOFError:
        process.join()
        killed = process.exitcode is not None and process.exitcode < 0
        why = "it may have run out of memory" if killed else "its error is printed above"
        raise ContractError(
            f"{entry.name}: the process ended with code {process.exitcode} before its run was finished; {why}"
        ) from None
    process.join()
    if kind == "error":
        raise ContractError(f"{entry.name}: {found}")
    return found


def _child(pipe: Any, entry: Entry, source: Mapping[str, Any] | None) -> None:
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        pipe.send(("done", run_entry(entry, source)))
    except ContractError as error:
        pipe.send(("error", str(error)))


def run_entry(entry: Entry, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """Run an entry in this process; as for ``measure``."""
    import torch

    from peftkit.finetune.comparison.source import source_losses
    from peftkit.finetune.reading import build_recipe
    from peftkit.finetune.training import train
    from peftkit.peak_memory import PeakMemory

    memory = PeakMemory("cuda" if torch.cuda.is_available() else "cpu")
    held = memory.reset()
    begin = time.perf_counter()
    recipe = build_recipe(entry.values)
    if entry.kind == "pretrained":
        found = _pretrained(recipe)
        if "new_head" in found:
            return found
    else:
        result = train(recipe)
        if result.status != "finished":
            raise ContractError(f"the run was {result.status}")
        found = {
            "metrics": result.metrics,
            "trained": result.trained,
            "problems": result.problems,
            "seconds": time.perf_counter() - begin,
        }
    found["peak_mib"] = (memory.peak() - held) / _MIB
    if source is not None and entry.kind != "scratch":
        trained = None if entry.kind == "pretrained" else recipe
        # a model that was trained itself does not fit a quantised one
        found |= source_losses({**source, "base": entry.values.get("base", "auto")}, trained)
    return found


def _pretrained(recipe: Any) -> dict[str, Any]:
    """Evaluate the model as it was loaded, unless its head is new."""
    from transformers import set_seed

    from peftkit.find.heads import find_heads
    from peftkit.finetune.model import load_model
    from peftkit.finetune.setup import prepare_data, resolved
    from peftkit.finetune.trainer import make_trainer
    from peftkit.finetune.using import metrics_of

    set_seed(recipe.training.seed)
    task, _, evaluation = prepare_data(recipe, lambda line: None)
    recipe = resolved(recipe, task)
    model = load_model(recipe, task, is_adapter=True)
    heads = find_heads(model)
    new = [
        name
        for name, parameter in model.named_parameters()
        if any(name.startswith(f"{head}.") for head in (*heads.names, *heads.out_of_reach))
        and getattr(parameter, "_is_hf_initialized", False) is not True
    ]
    if new:
        return {"new_head": new}
    task.setting.config = model.config
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            recipe, task, model, None, evaluation and evaluation.dataset, scratch
        )
        metrics = {f"eval_{name}": value for name, value in metrics_of(trainer.evaluate()).items()}
    return {"metrics": metrics, "trained": 0, "problems": [], "seconds": 0.0}
