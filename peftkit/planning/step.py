"""Run training steps without computing, and record the memory."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from peftkit.errors import ContractError
from peftkit.find.stacks import PackedStack, packed_stacks
from peftkit.planning.cards import Card
from peftkit.planning.dry import DryRun
from peftkit.planning.gpu_functions import GPUFunctions
from peftkit.planning.ledger import Block, Event, Ledger
from peftkit.planning.optimizers import make_optimizer
from peftkit_kernels.core.launch import Target, counting

STEPS = 2
"""The first step makes the optimiser's state and what torch and peftkit keep; the second is like all that follow."""


class NoCheckpointing(ContractError):
    """The model cannot compute activations again."""


@dataclass(frozen=True)
class Recorded:
    """What a dry run recorded.

    Attributes:
        before: The memory in use before the first step.
        events: Allocations and their ends from then on.
        trained: Number of trained parameters.
        parameters: Number of all parameters.
        multiplied: Number of parameters by which each token is multiplied: matrices but for embeddings, and of experts the share
            that a token is routed to.
    """

    before: list[Block]
    events: list[Event]
    trained: int
    parameters: int
    multiplied: int


def record(
    make_model: Callable[[], Any],
    make_batch: Callable[[Any], Mapping[str, Any]],
    optimizer: str,
    checkpointing: bool,
    card: Card | None = None,
) -> Recorded:
    """Record training steps: forward, backward, step of the optimiser.

    Args:
        make_model: Builds the model inside the dry run.
        make_batch: Makes the arguments of the model's forward.
        optimizer: One of ``optimizers.Optimizer``.
        checkpointing: Whether activations of each layer are computed again in the backward.
        card: The GPU on which the step would run; ``None`` for the CPU.
    """
    ledger = Ledger()
    with (
        _quick_collection(),
        DryRun(ledger.watch),
        warnings.catch_warnings(),
        _as_on(card) as place,
    ):
        warnings.simplefilter(
            "ignore"
        )  # of transformers and PEFT, about a run that does not take place
        with place:
            model = make_model()
        if checkpointing:
            _checkpoint(model)
        model.train()
        batch = make_batch(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        stepper = make_optimizer(optimizer, trained, on_gpu=trained[0].is_meta)
        gc.collect()
        _label_weights(ledger, model)
        for block in map(ledger.block_of, _tensors(batch)):
            block.label = "batch"
        before, start = ledger.blocks(), len(ledger.events)
        if card is not None:
            before.append(Block(card.workspace_bytes, "", "", "workspaces of cuBLAS"))
        ledger.follow(model)
        handles = [p.register_post_accumulate_grad_hook(_labeller(ledger)) for p in trained]
        for _ in range(STEPS):
            _step(model, stepper, batch, ledger)
            _label_weights(ledger, model)  # peftkit moves some into a shared buffer
            for state in stepper.state.values():
                for value in _tensors(state):
                    ledger.block_of(value).label = "optimizer state"
        for handle in handles:
            handle.remove()
        stacks = _stacks(model)
        counts = [_count(trained, stacks), _count(model.parameters(), stacks)]
        counts.append(_multiplied(model, stacks))
        return Recorded(before, ledger.events[start:], *counts)


@contextmanager
def _quick_collection() -> Iterator[None]:
    """A context in which the garbage collector looks at new objects only; those of the imported libraries would take it 0.2 s."""
    if gc.get_freeze_count():  # the caller's, which unfreeze would thaw
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _as_on(card: Card | None) -> Iterator[Any]:
    """A context in which code for the CPU or a GPU is chosen; its value is the place for new tensors."""
    if card is None:
        yield torch.device("cpu")
        return
    with counting(Target(card.arch, card.sms)), GPUFunctions():
        yield torch.device("meta")


def _count(parameters: Iterable[Any], stacks: Mapping[int, PackedStack]) -> int:
    """The number of values; a packed 4-bit weight or stack has those that it was quantised from."""
    total = 0
    for p in parameters:
        state = stacks[id(p)].state if id(p) in stacks else getattr(p, "quant_state", None)
        total += math.prod(getattr(state, "shape", p.shape))
    return total


def _stacks(model: nn.Module) -> dict[int, PackedStack]:
    """The stacks of experts in 4 bits, by the ids of their parameters."""
    found = (stack for module in model.modules() for stack in packed_stacks(module).values())
    return {id(stack.packed): stack for stack in found}


def _multiplied(model: Any, stacks: Mapping[int, PackedStack]) -> int:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = (
        base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    )
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
    embeddings = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    tied = head is not None and id(getattr(head, "weight", None)) in embeddings
    total = _count([head.weight], stacks) if tied else 0
    for name, p in model.named_parameters():
        size = _count([p], stacks)
        if size > max(p.shape, default=1) and id(p) not in embeddings:
            total += round(size * share) if ".experts." in name else size
    return total


def _step(model: Any, stepper: Any, batch: Mapping[str, Any], ledger: Ledger) -> None:
    ledger.phase = "forward"
    loss = model(**batch).loss
    ledger.phase = "backward"
    # what Tensor.backward does, without suspending modes such as GPUFunctions
    ones = torch.ones_like(loss)
    _engine_run_backward(
        (loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    ledger.phase = "optimizer"
    stepper.step()
    stepper.zero_grad()


def _checkpoint(model: Any) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "supports_gradient_checkpointing", True):
        raise NoCheckpointing(
            f"checkpointing=True: {type(base).__name__} does not support gradient checkpointing; use checkpointing=False"
        )
    base.gradient_checkpointing_enable({"use_reentrant": False})


def _label_weights(ledger: Ledger, model: nn.Module) -> None:
    for tensor in (*model.buffers(), *model.parameters(), *_of_quantised(model)):
        label = "trained weights" if tensor.requires_grad else "frozen weights"
        ledger.block_of(tensor).label = label


def _of_quantised(model: nn.Module) -> list[Tensor]:
    """The tensors that belong to bitsandbytes' weights and are no parameters."""
    found: list[Any] = []
    stacks = _stacks(model)
    for parameter in model.parameters():
        found.append(getattr(parameter, "SCB", None))
        is_stack = id(parameter) in stacks
        state: Any = stacks[id(parameter)].state if is_stack else None
        state = state or getattr(parameter, "quant_state", None)
        while state is not None:
            found += [state.absmax, state.code, state.offset]
            state = state.state2
    return [value for value in found if isinstance(value, Tensor)]


def _tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]


def _labeller(ledger: Ledger) -> Callable[[Any], None]:
    def label(parameter: Any) -> None:
        ledger.block_of(parameter.grad).label = "gradients"

    return label
