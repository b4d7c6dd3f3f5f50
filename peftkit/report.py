"""``explain`` and its ``Report``: what was adapted, which code each part runs, and why, as a table or as data."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from peftkit.base.summary import logical_size, stored_as
from peftkit.find.stacks import PackedStack, packed_stack, packed_stacks
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

    from peftkit.planning.result import MemoryPlan

Path = Literal["fused:triton", "fused:torch", "torch", "peft"]

NOT_TARGETED = "not targeted by any adapter"


@dataclass(frozen=True)
class LayerReport:
    """One adapter layer, or one module that is fused around adapters.

    Attributes:
        name: The module's name in the model.
        method: ``"LoRA"``, another PEFT method, ``"gated MLP"``, ``"shared input"``, ``"frozen RMSNorm"`` ...
        path: The code that its forward runs. ``"peft"`` is the code it had before, ``"torch"`` the code of peftkit's prefix and
            bottleneck modules.
        reason: The reason for this path; empty if there is none to give.
        is_adapter: Whether the module itself has an adapter.
        declined: Whether peftkit does not know the formula of the module, so that it is not fused in any state.
    """

    name: str
    method: str
    path: Path
    reason: str
    is_adapter: bool = True
    declined: bool = False


@dataclass(frozen=True)
class Report:
    """Which code each layer of a model runs, and why.

    Attributes:
        model: Class name of the base model.
        layers: One entry per adapter layer or fused module, in the model's order.
        left_out: For each linear-like module or expert parameter without an adapter, the reason by name.
        trainable: Number of trainable parameters.
        total: Number of parameters. Tied parameters count once; each 4-bit value counts as one parameter.
        trained_in_full: Number of trained parameters by module, for modules that are trained without an adapter, such as a
            classifier.
        storage: Number of parameters of the base model by their storage: ``"bfloat16"``, ``"nf4"``, ``"int8"``, ``"fp8"`` ...
        logit_free: Whether the training loss is computed without the logits.
        logit_free_reason: The reason for ``logit_free``.
        planned_bytes: The peak of the plan that was passed to ``explain``.
        measured_bytes: On a GPU, the most memory that torch allocated so far; on the CPU it is not known.
    """

    model: str
    layers: tuple[LayerReport, ...]
    left_out: dict[str, str]
    trainable: int
    total: int
    trained_in_full: dict[str, int]
    storage: dict[str, int]
    logit_free: bool
    logit_free_reason: str
    planned_bytes: int | None = None
    measured_bytes: int | None = None

    @property
    def fused_fraction(self) -> float:
        """Share of PEFT's adapter layers whose forward is fused; 0 if there are none."""
        paths = [r.path for r in self.layers if r.is_adapter and r.path != "torch"]
        return sum(path != "peft" for path in paths) / len(paths) if paths else 0.0

    @property
    def blocks(self) -> dict[str, int]:
        """Number of fused modules that are not adapter layers, by method."""
        return dict(Counter(r.method for r in self.layers if not r.is_adapter and r.path != "peft"))

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data."""
        return {**asdict(self), "fused_fraction": self.fused_fraction, "blocks": self.blocks}

    def __rich__(self) -> RenderableType:
        """Print as tables. Equal rows of different layers are shown as one row."""
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
            *(
                Text(f"trained in full: {name} ({count:,} parameters)")
                for name, count in self.trained_in_full.items()
            ),
            Text(
                "base stored in: "
                + ", ".join(
                    f"{kind} ({count:,} parameters)" for kind, count in self.storage.items()
                )
            ),
            Text(f"fused {100 * self.fused_fraction:.4g} % of the adapter layers"),
            Text(
                f"loss without logits: {'yes' if self.logit_free else 'no'} ({self.logit_free_reason})"
            ),
        ]
        sizes = {"planned": self.planned_bytes, "measured so far": self.measured_bytes}
        if known := [f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items() if size]:
            lines.append(Text(f"peak memory: {', '.join(known)}"))
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
    """The name with ``*`` for layer numbers, so that the same module of every layer has one name."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.removeprefix("base_model.model."))


def explain(model: nn.Module, plan: MemoryPlan | None = None) -> Report:
    """Report what was adapted, which code each part runs, and why.

    Args:
        model: Any model, before or after ``wrap``, with or without adapters.
        plan: The plan of a training step. The report then shows its peak, on a GPU next to what torch allocated at most so far.
    """
    from peftkit.fuse.loss import logit_free_status

    model = getattr(model, "_orig_mod", model)
    modules = dict(base_modules(model))
    trainable, total = _count_parameters(model)
    logit_free, reason = logit_free_status(model)
    return Report(
        model=type(modules[""]).__name__,
        layers=tuple(layer_reports(model)),
        left_out=_left_out(model, modules),
        trainable=trainable,
        total=total,
        trained_in_full=_trained_in_full(model),
        storage=_storage(modules),
        logit_free=logit_free,
        logit_free_reason=reason,
        planned_bytes=None if plan is None else plan.peak_bytes,
        measured_bytes=_most_allocated(model),
    )


def _most_allocated(model: nn.Module) -> int | None:
    """The most memory that torch allocated on the model's GPU; ``None`` on the CPU."""
    device = next((p.device for p in model.parameters()), None)
    if device is None or device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device)


def layer_reports(model: nn.Module) -> list[LayerReport]:
    """A row for every adapter layer, every fused module, and every module that was examined and not fused."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from peftkit.fuse.adapter import method
    from peftkit.fuse.plan import declined

    reports: list[LayerReport] = []
    outer: dict[int, LayerReport] = {}
    for name, module in model.named_modules():
        is_adapter = isinstance(module, BaseTunerLayer)
        if hasattr(module, "peftkit_verdict"):
            row = LayerReport(name, module.peftkit_method, *module.peftkit_verdict(), is_adapter)
            around = outer.get(id(module))
            if around is not None and around.path == "peft" != row.path:
                row = replace(
                    row,
                    path="peft",
                    reason=f"the layer around it runs PEFT's forward: {around.reason}",
                )
            reports.append(row)
            outer[id(getattr(module, "base_layer", None))] = row
        elif is_adapter:
            reason = _why_not_fused(module)
            reports.append(LayerReport(name, method(module), "peft", reason))
        if (kept := declined(module)) is not None:
            reports.append(LayerReport(name, kept[0], "peft", kept[1], False, True))
        reports += _sibling_reports(name, module)
    return reports


def _why_not_fused(layer: Any) -> str:
    """Why an adapter layer was not fused."""
    from peftkit.fuse.adapter import NONE_ACTIVE, class_reason

    held = [
        getattr(layer, names) for names in ("lora_A", "lora_embedding_A") if hasattr(layer, names)
    ]
    if held and not any(name in names for name in layer.active_adapters for names in held):
        return NONE_ACTIVE
    return class_reason(layer) or "not accelerated; call peftkit.accelerate(model)"


def _sibling_reports(name: str, parent: nn.Module) -> list[LayerReport]:
    """A row for every group of linears in ``parent`` that are computed together."""
    from peftkit.fuse.siblings import GROUP, METHOD

    groups: dict[int, tuple[Any, dict[str, nn.Module]]] = {}
    for child_name, child in parent.named_children():
        group = child.__dict__.get(GROUP)
        if group is not None:
            groups.setdefault(id(group), (group, {}))[1][child_name] = child
    rows = []
    for group, members in groups.values():
        path, reason = group.peftkit_verdict(list(members.values()))
        rows.append(LayerReport(f"{name}.{'+'.join(members)}", METHOD, path, reason, False))
    return rows


def _left_out(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Linear-like modules without an adapter, with the reason: that of "all-linear" if it leaves them out too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    adapted: set[int] = set()
    for wrapper in model.modules():
        if isinstance(wrapper, BaseTunerLayer):
            adapted.add(id(wrapper.get_base_layer()))
            # PEFT has one wrapper for each expert parameter; each wraps the previous wrapper.
            own = getattr(wrapper, "parameter_name", None)
            packed = packed_stack(wrapper.get_base_layer(), own) if own else None
            if packed is not None:
                adapted.add(id(packed.packed))
            elif own:
                adapted.add(id(getattr(wrapper.get_base_layer(), own, None)))
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
        packed = {own: stack.packed for own, stack in packed_stacks(module).items()}
        for own, parameter in {**module._parameters, **packed}.items():
            if f"{name}.{own}" in reasons and id(parameter) not in adapted:
                left_out[f"{name}.{own}"] = reasons[f"{name}.{own}"]
    return left_out


def _count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trainable parameters and of all parameters. ``model.parameters()`` yields tied parameters once."""
    trainable = total = 0
    packed = _packed(model.modules())
    for parameter in model.parameters():
        count = packed[id(parameter)].numel if id(parameter) in packed else logical_size(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _trained_in_full(model: nn.Module) -> dict[str, int]:
    """Numbers of trained parameters outside adapters, by module. Copies for ``modules_to_save`` count for the original module."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    found: dict[str, int] = {}
    seen: set[int] = set()

    def walk(name: str, module: nn.Module, in_adapter: bool) -> None:
        inner = name.endswith((".base_layer", ".original_module"))
        # PEFT has one wrapper for each expert parameter, and each is the base layer of the next
        in_adapter = isinstance(module, BaseTunerLayer) or (in_adapter and not inner)
        whole = isinstance(module, AuxiliaryTrainingWrapper)
        own = module.parameters() if whole else module._parameters.values()
        trained = {id(p): p for p in own if p is not None and p.requires_grad and id(p) not in seen}
        seen.update(trained)
        if trained and not in_adapter:
            short = name.removeprefix("base_model.model.") or type(model).__name__
            found[short] = sum(map(logical_size, trained.values()))
        for child_name, child in module.named_children():
            if child_name != "prompt_encoder":
                walk(f"{name}.{child_name}" if name else child_name, child, in_adapter)

    walk("", model, in_adapter=False)
    return found


def _storage(modules: dict[str, nn.Module]) -> dict[str, int]:
    """Numbers of parameters of the base model by their storage."""
    parameters = {
        id(p): p
        for module in modules.values()
        for p in module._parameters.values()
        if p is not None
    }
    packed = _packed(modules.values())
    counts: Counter[str] = Counter()
    for key, parameter in parameters.items():
        if key in packed:
            counts[packed[key].state.quant_type] += packed[key].numel
        else:
            counts[stored_as(parameter)] += logical_size(parameter)
    return dict(counts)


def _packed(modules: Iterable[nn.Module]) -> dict[int, PackedStack]:
    """The stacks of experts in 4 bits, by the ids of their parameters."""
    return {id(s.packed): s for module in modules for s in packed_stacks(module).values()}
