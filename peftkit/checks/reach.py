"""One forward and backward that change nothing: are loss and gradients finite, and does gradient reach every adapter?"""

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
from peftkit.errors import ContractError, listing


def measure(
    model: nn.Module, batch: Mapping[str, Any], tensors: list[AdapterTensor]
) -> tuple[float, dict[str, float], list[str]]:
    """Run one forward and backward and judge what comes of it.

    The first pass runs the model exactly as training would. Only if it looks wrong, a second one with hooks, from the same
    random state, finds out why.

    Returns:
        The loss, the gradient norm of each trainable tensor by name, and notes on gradients that are zero for a reason.

    Raises:
        ContractError: The loss or a gradient is not finite, or does not reach a trainable tensor.
    """
    batch = _on_device(batch, _device(model))
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
        raise ContractError(f"the loss of this batch is {value}; {_all_ignored(batch) or culprit}")

    broken = [
        n for n, g in gradients.items() if g is not None and not bool(_values(g).isfinite().all())
    ]
    if broken:
        raise ContractError(
            f"{len(broken)} of {len(gradients)} gradients are not finite although the loss is ({loss.item():.6g}):\n"
            f"{listing(broken)}\nLook for overflow in the backward: a loss scale that is too large, float16, or a division "
            "or logarithm of zero in the model's own code."
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
    doubtful = {
        n: own[n] for n in own if n in missing or (n in zero and not _explained(own[n], tensors))
    }
    others = [f"{n}: it does not take part in the loss" for n in sorted(missing - own.keys())]
    if not doubtful and not others:
        return []
    with undisturbed(model):
        faults, notes = why_no_gradient(
            model, doubtful, missing, zero, lambda: _backward(model, loss_of(model, batch))
        )
    faults += others
    if faults:
        raise ContractError(
            f"{len(faults)} of {len(gradients)} trainable tensors get no gradient from this batch:\n{listing(faults)}\n"
            "Leave these modules out (exclude_modules) or repair the path to the loss"
            + ("." if not _checkpointing(model) else f"; {_CHECKPOINTING}.")
        )
    return notes


_CHECKPOINTING = (
    "with reentrant gradient checkpointing the inputs must require gradients: call model.enable_input_require_grads(), or "
    "pass use_reentrant=False"
)


def _explained(t: AdapterTensor, tensors: list[AdapterTensor]) -> bool:
    """Factors of a product: where one is zero, the gradients of the others are (lora_A while lora_B is still zero)."""
    return any(
        other.layer == t.layer
        and other.adapter == t.adapter
        and other.tensor is not t.tensor
        and not bool(other.tensor.any())
        for other in tensors
    )


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss a model computes for a batch.

    Raises:
        ContractError: The output holds none.
    """
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output and output[0].ndim == 0:
        loss = output[0]
    if loss is None:
        raise ContractError(
            f"the model returned no loss for a batch of {', '.join(sorted(batch))}; add labels to the batch"
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


def _all_ignored(batch: Mapping[str, Any]) -> str:
    labels = batch.get("labels")
    if (
        isinstance(labels, Tensor)
        and not labels.is_floating_point()
        and bool((labels == -100).all())
    ):
        return "every label of the batch is -100 (ignored), so it is the mean of nothing; check the collator"
    return ""


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _device(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters() if not p.is_meta)


def _on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers, modes and random states at the end, and keep hooks on gradients from firing."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    contents = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    # Optimisers that step inside the backward hang on these hooks; autograd keeps the dictionary itself, so empty it.
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
                for buffer, version, content in contents:
                    if buffer._version != version:
                        buffer.copy_(content)
            for module, mode in modes:
                module.training = mode
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
