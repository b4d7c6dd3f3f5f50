"""How a model is called, and what of the result is compared."""

import math
from typing import Any

import torch
from fuzz.batches import batch_of
from fuzz.build import Case, Unbuildable
from torch import Tensor, nn

Values = dict[str, Tensor]


def perform(case: Case, role: str, model: Any, base: Any) -> Values:
    """Forward and backward in the way the case says.

    Returns:
        ``loss``, ``logits`` if they are read, and ``grad <name>`` of every parameter that has one.
    """
    kind = case.get("call", "plain")
    if kind == "functional":
        return _functional(case, role, model, base)
    if kind == "trace":
        return _traced(case, role, model, base)
    for number in range(case.get("steps", 0)):
        _step(case, role, model, base, number + 1)
    if case.get("adapters") == "switched":
        with torch.no_grad():
            objective(case, model, batch_for(case, role, base))
        model.set_adapter("default")
    return _plain(case, role, model, base)


def _plain(case: Case, role: str, model: Any, base: Any) -> Values:
    values: Values = {}
    batch = batch_for(case, role, base)
    total, logits, output = objective(case, model, batch)
    if case.get("twice"):
        total = total + objective(case, model, batch_for(case, role, base, 1))[0]
    values |= output
    reading = case.get("logits")
    if reading in ("retained", "hooked", "differentiated"):
        return values | _logits_gradient(reading, total, logits)
    if total.grad_fn is not None:
        model.zero_grad()
        total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            values[f"grad {name}"] = parameter.grad.detach().clone()
    for name, tensor in batch.items():
        if isinstance(tensor, Tensor) and tensor.grad is not None:
            values[f"grad {name}"] = tensor.grad.detach().clone()
    if reading == "merged":
        model.merge_adapter()
    elif reading == "data":
        _change_data(model)
    if reading and logits is not None:
        values["logits"] = logits.detach() + 0
    return values


def batch_for(case: Case, role: str, base: Any, number: int = 0) -> dict[str, Any]:
    """The batch of this number, in float64 for the roles that compute in it."""
    batch = batch_of(case, base, number)
    if role not in ("exact", "nudged"):
        return batch
    return {name: _double(value) for name, value in batch.items()}


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def objective(case: Case, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Any, Values]:
    """The number that is differentiated, the logits if the output has them, and what of it is compared.

    That is the model's loss; without one its output, not a weighted sum of it: terms that cancel leave only roundings.
    """
    factor = case.get("cotangent", 1.0)
    output = model(**batch)
    if isinstance(output, Tensor):
        return weighted(output) * factor, None, {"output": output.detach().clone()}
    logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
    if loss is None:
        first = logits if logits is not None else output[0]
        return weighted(first) * factor, logits, {"output": first.detach() + 0}
    value = {"loss": loss.detach().clone()}
    if case.get("logits") == "in the loss":
        loss = loss + weighted(logits)
    return loss * factor, logits, value


def weighted(tensor: Tensor) -> Tensor:
    """A sum of the elements with fixed weights of either sign that every dtype has, in at least float32."""
    count = tensor.numel()
    weights = (torch.arange(count, dtype=torch.float64) * 7 % 17 - 8).view(tensor.shape)
    weights *= 2.0 ** -(3 + round(math.log2(count) / 2))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * weights.to(wide)).sum()


def loss_of(case: Case, role: str, model: Any, base: Any, number: int) -> Tensor:
    """The objective of one batch."""
    return objective(case, model, batch_for(case, role, base, number))[0]


def _step(case: Case, role: str, model: Any, base: Any, number: int) -> None:
    """One step of gradient descent."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    objective(case, model, batch_for(case, role, base, number))[0].backward()
    torch.optim.SGD(trained, lr=1e-2).step()
    model.zero_grad()


def _change_data(model: Any) -> None:
    """Change the trained parameters in a way that autograd does not notice."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)


def _logits_gradient(reading: str, total: Tensor, logits: Any) -> Values:
    """The gradient at the logits, read in one of three ways."""
    if logits is None or not total.requires_grad:
        raise Unbuildable("there are no logits with a gradient")
    if reading == "differentiated":
        return {"grad logits": torch.autograd.grad(total, logits)[0].detach()}
    seen: list[Tensor] = []
    if reading == "hooked":
        logits.register_hook(lambda grad: seen.append(grad.detach().clone()))
        total.backward()
        return {"grad logits": seen[0]} if seen else {}
    logits.retain_grad()
    total.backward()
    return {"grad logits": logits.grad.detach()} if logits.grad is not None else {}


def _functional(case: Case, role: str, model: Any, base: Any) -> Values:
    """Gradients by ``torch.func``."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    batch = batch_for(case, role, base)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return objective(case, self.model, batch)[0]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        named = {f"model.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(Loss(), named, ())

    return {f"grad {n}": g.detach() for n, g in torch.func.grad(loss)(trained).items()}


def _traced(case: Case, role: str, model: Any, base: Any) -> Values:
    """The output of the model's graph as ``torch.jit.trace`` records it."""
    batch = batch_for(case, role, base)
    batch.pop("labels", None)
    names = [name for name, value in batch.items() if isinstance(value, Tensor)]

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor) -> Tensor:
            output = self.model(**dict(zip(names, tensors, strict=True)))
            return output if isinstance(output, Tensor) else output[0]

    inputs = tuple(batch[name] for name in names)
    with torch.no_grad():
        graph = torch.jit.trace(Logits(), inputs, check_trace=False)
        return {"logits": graph(*inputs)}
