"""Which fused op ran for which module, and for which one PEFT's own forward did."""

import functools
import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_OPS = {
    "lora_linear": "lora_linear",
    "lora_qkv": "lora_qkv",
    "lora_swiglu_mlp": "lora_swiglu_mlp",
    "dora_scale": "dora_scale",
    "grouped_lora": "grouped_lora",
    "frozen_rms_norm": "frozen_norm",
    "frozen_layer_norm": "frozen_norm",
    "linear_cross_entropy": "linear_cross_entropy",
    "attention": "attention",
}
"""The public function of each op and the package that has it."""


@functools.cache
def bindings() -> list[tuple[Any, str, str]]:
    """Every place in peftkit from which an op is called: module, attribute, op."""
    import peftkit.fuse

    for found in pkgutil.walk_packages(peftkit.fuse.__path__, "peftkit.fuse."):
        importlib.import_module(found.name)
    ops = {}
    for op, home in _OPS.items():
        package = importlib.import_module(f"peftkit_kernels.ops.{home}")
        ops[id(getattr(package, op))] = op
    return [
        (module, attribute, ops[id(value)])
        for name, module in list(sys.modules.items())
        if name.startswith("peftkit.fuse")
        for attribute, value in list(vars(module).items())
        if id(value) in ops and callable(value)
    ]


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[tuple[str, str]]]:
    """Count calls as ``(module's name, op)``; PEFT's own forward of a linear is the op ``"peft"``."""
    names = {id(module): name for name, module in model.named_modules()}
    calls: Counter[tuple[str, str]] = Counter()

    def counting(op: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[_caller(names), op] += 1
            return original(*args, **kwargs)

        return call

    def stock(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[names.get(id(self), "?"), "peft"] += 1
        return forward(self, *args, **kwargs)

    forward = Linear.forward
    with ExitStack() as patches:
        for module, attribute, op in bindings():
            original = getattr(module, attribute)
            patches.enter_context(mock.patch.object(module, attribute, counting(op, original)))
        patches.enter_context(mock.patch.object(Linear, "forward", stock))
        yield calls


def _caller(names: dict[int, str]) -> str:
    """The name of the innermost module of the model whose code is running."""
    frame = sys._getframe(2)
    while frame is not None:
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None:
            return name
        frame = frame.f_back
    return "?"


@contextmanager
def called(model: nn.Module) -> Iterator[set[str]]:
    """The names of the modules that are called."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: set[str] = set()

    def note(module: nn.Module, args: Any) -> None:
        seen.add(names.get(id(module), "?"))

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def disagreements(report: Any, ran: Counter[tuple[str, str]], seen: set[str]) -> list[str]:
    """Sentences about rows of a report that do not describe what ran.

    Args:
        report: Of ``explain``, in the state in which the forward ran.
        ran: What ``counted`` gave for the fused model.
        seen: The modules that the stock model called.
    """
    wrong = []
    for row in report.layers:
        if row.name not in seen:
            continue
        ops = {op: n for (name, op), n in ran.items() if name == row.name and op != "peft"}
        stock = ran[row.name, "peft"]
        fused = row.path.startswith("fused")
        if row.is_adapter and fused and stock:
            wrong.append(f"{row.name} is reported {row.path}, but PEFT's own forward ran")
        elif not row.is_adapter and fused and not ops and row.method != "shared-input linears":
            wrong.append(f"{row.method} {row.name} is reported {row.path}, but no fused op ran")
        elif row.path == "peft" and ops:
            wrong.append(
                f"{row.method} {row.name} is reported {row.path} ({row.reason}), but {ops} ran"
            )
    rows = {row.name for row in report.layers}
    for name in seen - rows:
        children = {other.rpartition(".")[2] for other in seen if other.rpartition(".")[0] == name}
        if {"up_proj", "down_proj"} <= children and {"gate_proj"} <= children:
            wrong.append(f"the gated MLP {name} has no row and no reason")
    return wrong


def loss_disagreement(report: Any, ran: Counter[tuple[str, str]], labelled: bool) -> str | None:
    """A sentence if the loss without logits ran and the report denies it, or the other way round."""
    times = sum(n for (_, op), n in ran.items() if op == "linear_cross_entropy")
    if bool(times) is (report.logit_free and labelled):
        return None
    return f"loss without logits: {report.logit_free} in the report, {times} calls"
