"""Run one forward and backward without changing the model, and check that loss and gradients are finite and not missing."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.checks.adapters import AdapterTensor
from peftkit.checks.diagnosis import first_non_finite_module, why_no_gradient
from peftkit.errors import ContractError, count, listing


def measure(
    model: nn.Module, batch: dict[str, Any], tensors: list[AdapterTensor]
) -> tuple[float, dict[str, float], list[str]]:
    """Run one forward and backward, and check the loss and the gradients.

    The first pass runs the model exactly as training does. If a result is wrong, a second pass with hooks, from the same random
    state, finds the reason.

    Args:
        model: A model with adapters.
        batch: A batch from ``checked_batch``.
        tensors: The adapter tensors of the model.

    Returns:
        The loss, the gradient norm of each trainable tensor by name, and notes on gradients that are zero for a good reason.

    Raises:
        ContractError: The loss or a gradient is not finite, or a trainable tensor gets no gradient.
    """
    batch = on_device_of(model, batch)
    with undisturbed(model):
        loss = loss_of(model, batch)
        if not bool(loss.isfinite()):
            value = loss.item()
        else:
            value = None
            _backward(model, loss)
            trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
            gradients = {n: p.grad for n, p in trainable.items()}
    if value is not None:
        with undisturbed(model):
            culprit = first_non_finite_module(model, lambda: loss_of(model, batch))
        raise ContractError(f"the loss of this batch is {value}; {culprit}")

    broken = [
        n for n, g in gradients.items() if g is not None and not bool(_values(g).isfinite().all())
    ]
    if broken:
        raise ContractError(
            f"{len(broken)} of {count(len(gradients), 'gradient')} {'is' if len(broken) == 1 else 'are'} not finite although "
            f"the loss is ({loss.item():.6g}):\n{listing(broken)}\nLook for overflow in the backward: a loss scale that is too "
            "large, float16, or a division by zero or the logarithm of zero in the model's own code."
        )
    notes = _judge(model, batch, tensors, gradients)
    norms = {
        n: torch.linalg.vector_norm(_values(g).float()).item()
        for n, g in gradients.items()
        if g is not None
    }
    return loss.item(), norms, notes


def _judge(
    model: nn.Module,
    batch: Mapping[str, Any],
    tensors: list[AdapterTensor],
    gradients: dict[str, Tensor | None],
) -> list[str]:
    """Raise for each missing gradient, and for each zero gradient that has no good reason."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {names[id(t.tensor)]: t for t in tensors if t.tensor.requires_grad}
    missing = {n for n, g in gradients.items() if g is None}
    zero = {n for n in own if (g := gradients[n]) is not None and not bool(_values(g).any())}
    factors = _Factors(tensors)
    doubtful = {
        n: own[n] for n in own if n in missing or (n in zero and not factors.explain(own[n]))
    }
    noise = _noise(batch, own, gradients)
    others = [f"{n}: it does not take part in the loss" for n in sorted(missing - own.keys())]
    if not doubtful and not others and not noise:
        return []
    with undisturbed(model):
        verdict = why_no_gradient(
            model, doubtful | noise, missing, lambda: _backward(model, loss_of(model, batch))
        )
    # tensors whose gradient only looks like noise do have a gradient, so they are no faults
    faults = [f for n, f in verdict.faults.items() if n not in noise] + others
    if faults:
        advice = list(dict.fromkeys(verdict.advice[n] for n in verdict.faults if n not in noise))
        if others:
            advice.append(
                "Freeze parameters that the loss does not depend on (requires_grad_(False)), or remove them from "
                "modules_to_save."
            )
        if _checkpointing(model):
            advice.append(f"The model uses gradient checkpointing: {_CHECKPOINTING}.")
        raise ContractError(
            f"{len(faults)} of {count(len(gradients), 'trainable tensor')} {'gets' if len(faults) == 1 else 'get'} no gradient "
            f"from this batch:\n{listing(faults)}\n" + "\n".join(advice)
        )
    return verdict.notes


def _noise(
    batch: Mapping[str, Any],
    own: dict[str, AdapterTensor],
    gradients: dict[str, Tensor | None],
) -> dict[str, AdapterTensor]:
    """Return the tensors whose gradients are rounding errors instead of zeros, as in attention over a single position.

    In that case attention subtracts two equal sums of at most N products, where N is the number of outputs of the layer. The
    error is therefore below ``2 N eps`` times the largest gradient.
    """
    if not any(
        isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == 1
        for value in batch.values()
    ):
        return {}
    norms = {n: _values(g).float().norm().item() for n in own if (g := gradients[n]) is not None}
    largest = max(norms.values(), default=0.0)
    return {
        name: own[name]
        for name, norm in norms.items()
        if 0
        < norm
        < 2 * own[name].tensor.shape[0] * torch.finfo(own[name].tensor.dtype).eps * largest
    }


_CHECKPOINTING = (
    "with reentrant gradient checkpointing the inputs must require gradients: call model.enable_input_require_grads(), or "
    "pass use_reentrant=False"
)


class _Factors:
    """Finds zero factors of a product. If one factor is zero, so are the gradients of the others (lora_A while lora_B is 0)."""

    def __init__(self, tensors: list[AdapterTensor]):
        self._zeros: dict[tuple[str, str], set[int]] = {}
        for t in tensors:
            if not bool(t.tensor.any()):
                self._zeros.setdefault((t.layer, t.adapter), set()).add(id(t.tensor))

    def explain(self, t: AdapterTensor) -> bool:
        """Whether another factor of the same layer is zero."""
        return bool(self._zeros.get((t.layer, t.adapter), set()) - {id(t.tensor)})


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a model computes for a batch.

    Raises:
        ContractError: The output has no loss, or the model does not accept the batch.
    """
    try:
        output = model(**batch)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise ContractError(
                f"{type(model).__name__} does not take this batch of {', '.join(sorted(map(str, batch)))} ({error}); remove "
                "the columns that its forward does not have"
            ) from error
        raise
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output and output[0].ndim == 0:
        loss = output[0]
    if loss is None:
        raise ContractError(
            f"the model returned no loss for a batch of {', '.join(sorted(map(str, batch)))}; add labels to the batch"
        )
    return loss.mean()


def _backward(model: nn.Module, loss: Tensor) -> None:
    if not loss.requires_grad:
        way_out = (
            _CHECKPOINTING
            if _checkpointing(model)
            else "look for torch.no_grad() or detach() in the forward"
        )
        raise ContractError(f"the loss does not depend on any trainable tensor; {way_out}")
    loss.backward()


def _checkpointing(model: nn.Module) -> bool:
    return any(
        getattr(module, "gradient_checkpointing", False) is True for module in model.modules()
    )


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose tensors are on the device of a model."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    return {name: _on_device(value, device) for name, value in batch.items()}


def _on_device(value: Any, device: torch.device) -> Any:
    """Move tensors to a device, also those in lists and dictionaries, such as the boxes of object detection."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on_device(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_device(item, device) for item in value)
    return value


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers, modes and random states at the end, and disable hooks on gradients in between."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    contents = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    # Optimisers that step during the backward use these hooks. autograd holds the dictionary itself, so it is emptied.
    hooks = [(h, dict(h)) for p in model.parameters() if (h := p._post_accumulate_grad_hooks)]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            for registered, _ in hooks:
                registered.clear()
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for registered, saved in hooks:
                registered.update(saved)
            for module, saved in buffers:
                module._buffers.clear()
                module._buffers.update(saved)
            with torch.no_grad():
                for buffer, content in contents:
                    # Batch norms change their statistics without a new version of the tensor.
                    if not torch.equal(buffer, content):
                        buffer.copy_(content)
            for module, mode in modes:
                module.training = mode
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
