"""Joint passes: the shared part of a model computes the batches of several trainings at once.

The part is the backbone of the model, or its encoder and decoder. What is before and after it, such as the head and the loss, runs for
each training by itself, so each loss is that of its own rows. The losses are added and go backward together; no gradient of one training
depends on the loss of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError
from peftkit.find.statistics import hold_statistics, norms_with_statistics
from peftkit.finetune.together.conductor import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    Conductor,
    current,
)
from peftkit.finetune.together.places import Places
from peftkit.finetune.together.rows import Call, batch_rows, divided, stacked
from peftkit_kernels.core.checks import autocast_dtype

JOINT_DEVICES = ("cuda", "xpu")
"""Kinds of devices on which steps are computed jointly: a small batch leaves most of such a device idle. On a CPU the products of a step
keep every core busy, and joint steps take as long as those one after the other or longer (``benchmarks/run.py sweep --joint``)."""

JOINT_TOKENS = 1024
"""Tokens in a batch of one training up to which steps are computed jointly. Predicted, not measured: an H100 does about 220 operations in
bfloat16 while it reads a byte, so the frozen products of some hundred tokens keep it busy. With more tokens there is little to gain, and the
activations of all trainings would have to be in memory at once."""


def pays(device: str, tokens: int | None) -> bool:
    """Whether joint steps are worth while.

    Args:
        device: The kind of the model's device.
        tokens: The largest number of tokens in a batch of one training; ``None`` if its rows are images or recordings, which are long.
    """
    return device in JOINT_DEVICES and tokens is not None and tokens <= JOINT_TOKENS


class JointPasses:
    """Lets the shared parts of a model compute for all trainings that call them.

    Args:
        conductor: Brings the calls together.
        places: The places of the adapters.

    Attributes:
        sizes: Number of trainings in each joint pass so far, as a count by size.
    """

    def __init__(self, conductor: Conductor, places: Places):
        self.conductor, self.places = conductor, places
        self.sizes: dict[int, int] = {}
        self._parts: dict[int, _Part] = {}
        self._inside: set[int] = set()

    def share(self, model: Any) -> None:
        """Compute the shared parts of a training's model together from now on.

        Args:
            model: The ``PeftModel`` of a training, of which ``places`` knows the places.
        """
        for module in shared_parts(model.get_base_model()):
            if id(module) not in self._parts:
                self._parts[id(module)] = _Part(module)
                vars(module)["forward"] = partial(self._forward, self._parts[id(module)])
                self._inside |= {id(inner) for inner in module.modules()}

    def release(self) -> None:
        """Give the shared parts their own forwards back."""
        for part in self._parts.values():
            vars(part.module).pop("forward", None)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Compute the gradients of the losses of all trainings that ask for it."""
        strand = current()
        if strand is None or not strand.joined:
            loss.backward(**kwargs)
            return
        self.conductor.ask(BACKWARD, None, loss, self._all_backward)

    def _all_backward(self, losses: list[Tensor]) -> list[None]:
        # A recomputation under checkpointing runs the layers again.
        self.places.show_routed(self._inside)
        self.places.route.loosen()
        sum(losses[1:], losses[0]).backward()
        self.places.route.set(())
        return [None] * len(losses)

    def _forward(self, part: _Part, *args: Any, **kwargs: Any) -> Any:
        strand = current()
        if strand is None or not strand.joined:
            return part.forward(*args, **kwargs)
        training, grad = part.module.training, torch.is_grad_enabled()
        call = (args, part.arguments(kwargs))
        device = next(part.module.parameters()).device
        key = (id(part), training, grad, autocast_dtype(torch.empty(0, device=device)))
        return self.conductor.ask(
            FORWARD if grad else EVALUATION,
            key,
            (strand.number, call),
            partial(self._all, part, training),
        )

    def _all(self, part: _Part, training: bool, given: list[tuple[int, Call]]) -> list[Any]:
        numbers, calls = [number for number, _ in given], [call for _, call in given]
        rows = [batch_rows(call, part.name) for call in calls]
        lengths = _lengths(calls)
        if len(set(lengths)) > 1:
            _require_mask(calls, part.name)
        args, kwargs = stacked(calls, rows, part.name)
        self.places.show_routed(self._inside)
        self.places.route.set(list(zip(numbers, rows, strict=True)))
        part.set_mode(training)
        outputs = part.forward(*args, **kwargs)
        self.sizes[len(given)] = self.sizes.get(len(given), 0) + 1
        longest = max((n for n in lengths if n is not None), default=None)
        own = [None if length == longest else length for length in lengths]
        return divided(outputs, rows, own, part.name)


class _Part:
    """A module that computes for all trainings."""

    def __init__(self, module: nn.Module):
        import inspect

        self.module, self.name = module, type(module).__name__
        self.forward: Callable[..., Any] = module.forward
        self.norms = norms_with_statistics(module)
        parameters = inspect.signature(type(module).forward).parameters
        self.defaults = {name: parameter.default for name, parameter in parameters.items()}
        self.takes_cache = "use_cache" in parameters

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments without a cache, which has rows of its own, and without the number of labels, which is for the loss alone."""
        if kwargs.get("past_key_values") is not None:
            raise ContractError(
                f"{self.name} is called with a cache, which cannot be divided among adapters; train them separately"
            )
        # Classes with different heads name different arguments that are None.
        kept = {
            name: value
            for name, value in kwargs.items()
            if name != "num_items_in_batch"
            and (value is not None or self.defaults.get(name) is not None)
        }
        return kept | {"use_cache": False} if self.takes_cache or "use_cache" in kept else kept

    def set_mode(self, training: bool) -> None:
        """Training or evaluation, as the trainings have it that asked; another one may have changed it since."""
        if self.module.training != training:
            self.module.train(training)
            hold_statistics(self.norms)


def shared_parts(model: Any) -> list[nn.Module]:
    """The parts of a model that compute joint batches: the backbone, or else each child that has adapters below it.

    Args:
        model: A model of transformers with the adapter of one training in it.
    """
    backbone = getattr(model, "base_model", model)
    if backbone is not model:
        return [backbone]
    return [child for child in model.children() if _has_adapters(child)]


def _has_adapters(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, (BaseTunerLayer, nn.ModuleList, nn.ModuleDict)):
        return False
    return any(isinstance(inner, BaseTunerLayer) for inner in module.modules())


def _lengths(calls: Sequence[Call]) -> list[int | None]:
    """The number of tokens of each call; ``None`` if its rows have no tokens."""
    found: list[int | None] = []
    for args, kwargs in calls:
        ids = next(
            (
                v
                for n, v in kwargs.items()
                if n.endswith(("input_ids", "inputs_embeds")) and v is not None
            ),
            args[0]
            if args and isinstance(args[0], Tensor) and args[0].dtype is torch.int64
            else None,
        )
        found.append(ids.shape[1] if isinstance(ids, Tensor) and ids.ndim > 1 else None)
    return found


def _require_mask(calls: Sequence[Call], what: str) -> None:
    """Raise unless padding behind the rows is masked, or the rows have positions by which packs are kept apart."""
    for _, kwargs in calls:
        if kwargs.get("attention_mask") is None and kwargs.get("position_ids") is None:
            raise ContractError(
                f"{what} gets rows of different lengths without an attention mask, so they cannot be padded; train the adapters separately"
            )
