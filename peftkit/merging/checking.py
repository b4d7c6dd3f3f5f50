"""Run the four models that the certificate compares: base, tuned, the written files, and the rounded base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, listing
from peftkit.find.stacks import packed_stacks
from peftkit.merging.arithmetic import Change, float32_copy
from peftkit.merging.certificate import Outputs
from peftkit.merging.mapped import files_of, load_mapped
from peftkit.merging.probe import Batch, outputs_of
from peftkit.merging.units import set_enabled


def base_outputs(base: Any, batch: Batch, change: Change | None = None) -> Outputs:
    """Return the outputs of a model without its adapters, with changed weights if ``change`` is given."""
    copied = float32_copy(base, change)
    set_enabled(copied, False)
    return batch.measured(outputs_of(copied, batch))


def written_outputs(folder: Path, base: Any, architecture: Any, batch: Batch) -> Outputs:
    """Load the files that were written, as a user would, and return the outputs.

    If the base model reads its weights from files, or has experts in four bits and is not on a GPU, the loaded model reads its weights from
    the files one layer at a time.

    Raises:
        ContractError: transformers misses tensors in the files, or does not use some of them.
    """
    packed = base.device.type == "cpu" and any(packed_stacks(m) for m in base.modules())
    if packed or files_of(base).mapped:
        with _quiet():
            loaded = load_mapped(
                str(folder),
                architecture,
                strict=True,
                attn_implementation=_attentions(base.config),
                local_files_only=True,
            )
        return batch.measured(outputs_of(float32_copy(loaded), batch))
    with _quiet():
        loaded, info = architecture.from_pretrained(
            folder,
            dtype="auto",
            device_map=None if base.device.type == "cpu" else {"": base.device},
            attn_implementation=_attentions(base.config),
            local_files_only=True,
            output_loading_info=True,
        )
    problems = {
        "missing": info.get("missing_keys"),
        "unexpected": info.get("unexpected_keys"),
        "of another shape": [key[0] for key in info.get("mismatched_keys") or []],
    }
    for problem, keys in problems.items():
        if keys:
            raise ContractError(
                f"transformers cannot load the merged files: {len(keys)} tensors are {problem}:\n{listing(sorted(keys))}\n"
                "The model in memory differs from what its config describes; correct model.config first."
            )
    return batch.measured(outputs_of(float32_copy(loaded), batch))


def _attentions(config: Any) -> Any:
    """The attention functions of a model and of its parts, as ``from_pretrained`` takes them. Not every part has that of the whole."""
    parts = {
        name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()
    }
    found = {
        name: part._attn_implementation
        for name, part in parts.items()
        if getattr(part, "_attn_implementation", None) is not None
    }
    return {"": config._attn_implementation, **found} if found else config._attn_implementation


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
