"""What was adapted, which code path each part takes, and why: a ``Report`` that prints as a table and reads as data."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from peftkit.find.targets import (
    REWRITTEN,
    STACKED,
    all_linear,
    base_modules,
    is_linear_like,
    suffixes,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

Path = Literal["fused:triton", "fused:torch", "torch", "peft"]

NOT_TARGETED = "not targeted by any adapter"


@dataclass(frozen=True)
class LayerReport:
    """One adapter layer, or one module that is fused around adapters.

    Attributes:
        name: The module's name in the model.
        method: ``"LoRA"``, another PEFT method, ``"gated MLP"``, ``"shared-input linears"``, ``"frozen RMSNorm"`` ...
        path: Which code its forward runs; ``"peft"`` is the code it had before, ``"torch"`` that of our own prefix or
            bottleneck modules.
        reason: Why that path; empty where there is nothing to say.
        is_adapter: Whether it carries an adapter itself.
    """

    name: str
    method: str
    path: Path
    reason: str
    is_adapter: bool = True


@dataclass(frozen=True)
class Report:
    """What runs where and why.

    Attributes:
        model: Class name of the base model.
        layers: One entry an adapter layer or fused module, in the model's order.
        left_out: Reason by name, for the linear-like modules and expert parameters without an adapter.
        trainable: Number of trainable parameters.
        total: Number of parameters; tied ones count once, packed 4-bit ones by the numbers they stand for.
        logit_free: Whether the training loss is computed without forming the logits.
        logit_free_reason: Why, or why not.
    """

    model: str
    layers: tuple[LayerReport, ...]
    left_out: dict[str, str]
    trainable: int
    total: int
    logit_free: bool
    logit_free_reason: str

    @property
    def fused_fraction(self) -> float:
        """Share of PEFT's adapter layers whose forward is fused; 0 without any."""
        paths = [r.path for r in self.layers if r.is_adapter and r.path != "torch"]
        return sum(path != "peft" for path in paths) / len(paths) if paths else 0.0

    @property
    def blocks(self) -> dict[str, int]:
        """Number of fused modules that are no adapter layers, by method."""
        return dict(Counter(r.method for r in self.layers if not r.is_adapter and r.path != "peft"))

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data."""
        return {**asdict(self), "fused_fraction": self.fused_fraction, "blocks": self.blocks}

    def __rich__(self) -> RenderableType:
        """Print as tables, equal rows of different layers as one."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        share = 100 * self.trainable / self.total if self.total else 0.0
        table = Table(title=f"peftkit: {self.model}", title_justify="left", expand=False)
        for column in ("modules", "n", "method", "path", "reason"):
            table.add_column(column, justify="right" if column == "n" else "left", overflow="fold")
        rows = Counter((_pattern(r.name), r.method, r.path, r.reason) for r in self.layers)
        for (pattern, method, path, reason), count in rows.items():
            style = "" if path == "peft" else "green"
            table.add_row(Text(pattern), str(count), method, Text(path, style=style), Text(reason))
        lines: list[RenderableType] = [
            table,
            Text(f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.3g} %)"),
            Text(f"fused {100 * self.fused_fraction:.4g} % of the adapter layers"),
            Text(
                f"loss without logits: {'yes' if self.logit_free else 'no'} ({self.logit_free_reason})"
            ),
        ]
        if self.left_out:
            left = Table(title="left out", title_justify="left", expand=False)
            for column in ("modules", "n", "reason"):
                left.add_column(
                    column, justify="right" if column == "n" else "left", overflow="fold"
                )
            groups = Counter((_pattern(name), reason) for name, reason in self.left_out.items())
            for (pattern, reason), count in groups.items():
                left.add_row(Text(pattern), str(count), Text(reason))
            lines.append(left)
        return Group(*lines)

    def __str__(self) -> str:
        """The printed tables as plain text."""
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=140, color_system=None).print(self)
        return out.getvalue().rstrip()


def _pattern(name: str) -> str:
    """The name with layer numbers as ``*``, so that the same module of every layer reads alike."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.removeprefix("base_model.model."))


def explain(model: nn.Module) -> Report:
    """Report what was adapted, which code path each part takes, and why.

    Args:
        model: Any model: before or after ``wrap``, with or without adapters.
    """
    from peftkit.fuse.loss import logit_free_status

    model = getattr(model, "_orig_mod", model)
    modules = dict(base_modules(model))
    trainable, total = _count_parameters(model)
    logit_free, reason = logit_free_status(model)
    return Report(
        model=type(modules[""]).__name__,
        layers=tuple(_layers(model)),
        left_out=_left_out(model, modules),
        trainable=trainable,
        total=total,
        logit_free=logit_free,
        logit_free_reason=reason,
    )


def _layers(model: nn.Module) -> list[LayerReport]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    reports = []
    for name, module in model.named_modules():
        is_adapter = isinstance(module, BaseTunerLayer)
        if hasattr(module, "peftkit_verdict"):
            path, reason = module.peftkit_verdict()
            reports.append(LayerReport(name, module.peftkit_method, path, reason, is_adapter))
        elif is_adapter:
            reports.append(LayerReport(name, _method(module), "peft", _why_not_fused(module)))
    return reports


def _method(layer: nn.Module) -> str:
    """``peft.tuners.lora.layer.Linear`` is LoRA: PEFT keeps each method in a package of its name."""
    from peft.tuners.lora import LoraLayer

    from peftkit.fuse.eligibility import method

    if isinstance(layer, LoraLayer):
        return method(layer)
    homes = (cls.__module__ for cls in type(layer).__mro__)
    return next(home for home in homes if home.startswith("peft.tuners.")).split(".")[2].upper()


def _why_not_fused(layer: nn.Module) -> str:
    from peft.tuners.lora import LoraLayer

    from peftkit.fuse.eligibility import obstacle

    if not isinstance(layer, LoraLayer):
        return f"{_method(layer)} has no fused forward"
    return obstacle(layer) or "not accelerated; call peftkit.accelerate(model)"


def _left_out(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Linear-like modules without an adapter: the reason of "all-linear" where it would leave them out too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    adapted: set[int] = set()
    for wrapper in model.modules():
        if isinstance(wrapper, BaseTunerLayer):
            adapted.add(id(wrapper.get_base_layer()))
            # One wrapper stands around each expert parameter, the next around the first one.
            own = getattr(wrapper, "parameter_name", None)
            adapted.add(id(getattr(wrapper.get_base_layer(), own, None)) if own else 0)
        elif isinstance(wrapper, AuxiliaryTrainingWrapper):
            adapted.update(id(inner) for inner in wrapper.original_module.modules())
    selection = all_linear(model)
    bare = {
        name
        for name in selection.modules
        if {*suffixes(f"{name}.weight")} & {*selection.parameters}
    }
    reasons = selection.left_out | dict.fromkeys(bare, REWRITTEN)
    reasons |= dict.fromkeys(selection.stacks, STACKED.format(ndim=3))

    left_out = {}
    for name, module in modules.items():
        if is_linear_like(module) and id(module) not in adapted:
            left_out[name] = reasons.get(name, NOT_TARGETED)
        elif name in reasons and id(module) not in adapted:
            left_out[name] = reasons[name]
        for own, parameter in module._parameters.items():
            if f"{name}.{own}" in reasons and id(parameter) not in adapted:
                left_out[f"{name}.{own}"] = reasons[f"{name}.{own}"]
    return left_out


def _count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; ``model.parameters()`` already yields tied ones once."""
    trainable = total = 0
    for parameter in model.parameters():
        count = _logical_size(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _logical_size(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for: bitsandbytes packs two 4-bit codes into each byte of storage."""
    if type(parameter).__name__ != "Params4bit":
        return parameter.numel()
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()
