"""``plan``: the memory of a training step, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftkit.base.keep import require_keep
from peftkit.base.kinds import Base
from peftkit.errors import ContractError, short
from peftkit.planning import layers
from peftkit.planning.batches import batch_of
from peftkit.planning.cards import Card, default_card, find_card
from peftkit.planning.models import adapted, build, config_of
from peftkit.planning.optimizers import Optimizer, require_optimizer
from peftkit.planning.reserved import reserved_bytes
from peftkit.planning.result import MemoryPlan
from peftkit.planning.sections import extended, largest, plain_name, sections
from peftkit.planning.step import STEPS, Recorded, record

if TYPE_CHECKING:
    from peft import PeftConfig

_WHOLE = 3
"""Periods beyond the ends of a model from which two short models are planned instead."""


def plan(
    model: Any,
    *configs: PeftConfig | str,
    base: Base = "auto",
    batch_size: int = 1,
    seq_len: int = 1024,
    optimizer: Optimizer = "adamw",
    checkpointing: bool = False,
    device: str | None = None,
    keep: Sequence[str] = (),
    auto_class: Any = None,
    batch: Mapping[str, Any] | None = None,
    **options: Any,
) -> MemoryPlan:
    """Tell how much memory a training step needs, before anything is loaded.

    A model without values runs two training steps (forward, loss, backward, step of the optimiser) on tensors without memory. It runs
    the code of a real step, so what a real step allocates is followed allocation by allocation. Quantised layers have the tensors
    of bitsandbytes without their values. A model of many equal layers is built twice with few layers, and the numbers are extended:
    each is linear in the number of layers.

    Labels and texts have no padding. Data-dependent sizes are those of even routing in mixtures of experts.

    Args:
        model: The id of a model on the Hub or a folder (only the config is read), a config, or a model. A model is not changed, and
            its weights are not copied.
        configs: As for ``wrap``; or ``"full"`` (every weight is trained), or ``"partial"`` (what requires a gradient in the model
            that was passed). Without configs, the adapters of a ``PeftModel``, and for others ``wrap``'s default.
        base: How the base model is stored, as for ``load_base``.
        batch_size: Rows of a batch.
        seq_len: Tokens of each row; samples for sound. Images have the size that the config says, or 224 x 224 pixels if it says none.
        optimizer: ``"adamw"`` (torch's default: a loop on the CPU, lists of tensors on a GPU), ``"adamw_fused"`` (Trainer's default),
            ``"adamw_8bit"`` (by the formula of bitsandbytes), ``"adafactor"``, ``"sgd"``.
        checkpointing: Whether activations inside each layer are computed again in the backward.
        device: ``"cpu"``, ``"cuda"`` or the name of a card (``"H100"``). Default: ``"cuda"`` if there is one, else ``"cpu"``. What
            runs on the CPU depends on this machine's processor.
        keep: As for ``load_base``.
        auto_class: As for ``load_base``.
        batch: Arguments of the model's forward instead of those made from ``batch_size`` and ``seq_len``.
        options: Other arguments of ``wrap``: ``logit_free``, ``int8_mode``, ``merge_into``.

    Returns:
        The plan. On a GPU it is a prediction: buffers inside cuBLAS, cuDNN and kernels of other packages are not seen.

    Raises:
        ContractError: An argument is unknown, does not fit the others, or the model has no training step.
    """
    require_optimizer(optimizer)
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if not isinstance(value, int) or value < 1:
            raise ContractError(f"{name}={short(value)} must be a whole number of at least 1")
    kind, card = device_of(device)

    def run(source: Any) -> Recorded:
        try:
            return record(
                lambda: adapted(
                    build(source, base, require_keep(keep), auto_class), configs, options
                ),
                lambda made: batch or batch_of(_plain(made), batch_size, seq_len),
                optimizer,
                checkpointing,
                card if kind == "cuda" else None,
            )
        except ContractError:
            raise
        except Exception as error:
            if batch is not None:
                raise
            raise ContractError(
                f"{_name_of(model)}: no training step runs on inputs made from its config ({type(error).__name__}: {short(str(error))}); pass another seq_len, or batch="
            ) from error

    source = model if isinstance(model, nn.Module) else config_of(model)
    settings = {
        "model": _name_of(model),
        "method": _method(configs, model),
        "base": base,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "optimizer": optimizer,
        "checkpointing": checkpointing,
        "device": kind if card is None else card.name,
    }
    basis = "CPU" if kind == "cpu" else "predicted"
    period = 0 if isinstance(source, nn.Module) else layers.period_of(source)
    count = getattr(source, "num_hidden_layers", 0)
    ends = period + 1
    first = 2 * ends + (count - 2 * ends) % period if period else 0
    if not period or first + _WHOLE * period > count:
        return _of_whole(run(source), kind, settings, basis)
    few, more = (run(layers.shortened(source, n)) for n in (first, first + period))
    if len(few.events) == len(more.events):
        # the config counts something else, as EfficientNet's does
        return _of_whole(run(source), kind, settings, basis)
    parts = [
        sections(r.before, r.events, ends, n) for r, n in ((few, first), (more, first + period))
    ]
    times = (count - first) // period
    facts = [a + times * (b - a) for a, b in zip(_facts(few), _facts(more), strict=True)]
    overhead = _overhead(more, kind, largest(parts[1].values()).size)
    return _result(
        extended(*parts, times, count - first - period), facts, overhead, settings, basis
    )


def _of_whole(recorded: Recorded, kind: str, settings: dict[str, Any], basis: str) -> MemoryPlan:
    """The plan of a model that was run with all of its layers."""
    found = list(sections(recorded.before, recorded.events).values())
    overhead = _overhead(recorded, kind, largest(found).size)
    return _result(found, _facts(recorded), overhead, settings, basis)


def _facts(recorded: Recorded) -> list[int]:
    """Numbers that are linear in the layers: bytes loaded, and allocated in the last step; parameters trained, all, multiplied."""
    return [
        sum(block.size for block in recorded.before),
        sum(e.change * e.times for e in recorded.events if e.change > 0) // STEPS,
        recorded.trained,
        recorded.parameters,
        recorded.multiplied,
    ]


def _overhead(recorded: Recorded, kind: str, peak: int) -> float:
    """What the device's allocator takes, as a multiple of the peak."""
    if kind == "cpu":
        return 1.0
    return max(reserved_bytes(recorded.before, recorded.events) / peak, 1.0)


def _result(
    found: Any, facts: Sequence[int], overhead: float, settings: dict[str, Any], basis: str
) -> MemoryPlan:
    peak = largest(found)
    loaded, allocated, trained, parameters, multiplied = facts
    return MemoryPlan(
        peak_bytes=peak.size,
        items=dict(sorted(peak.items.items(), key=lambda item: -item[1])),
        phase=peak.phase,
        module=plain_name(peak.module),
        loaded_bytes=loaded,
        peaks={
            phase: max(s.size for s in found if s.phase == phase)
            for phase in dict.fromkeys(s.phase for s in found)
        },
        reserved_bytes=round(overhead * peak.size),
        allocated_bytes=allocated,
        trained=trained,
        parameters=parameters,
        multiplied=multiplied,
        settings=settings,
        basis=basis,
    )


def device_of(device: str | None) -> tuple[str, Card | None]:
    """``"cpu"`` or ``"cuda"``, and the card.

    Raises:
        ContractError: There is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str):
        raise ContractError(f"device={short(device)} is no name; use 'cpu', 'cuda' or a card")
    if device == "cpu":
        return "cpu", None
    return "cuda", default_card() if device == "cuda" else find_card(device)


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name_of(model: Any) -> str:
    if isinstance(model, nn.Module):
        return type(_plain(model)).__name__
    return getattr(model, "name_or_path", "") or getattr(model, "model_type", str(model))


def _method(configs: Sequence[Any], model: Any) -> str:
    if not configs:
        return "adapters of the model" if hasattr(model, "peft_config") else "LoRA"
    return " + ".join(
        c if isinstance(c, str) else type(c).__name__.removesuffix("Config") for c in configs
    )
