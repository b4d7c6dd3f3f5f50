"""``base_report``: how each part of a base model is stored, how many bytes it takes, and why it is not quantised."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peftkit.base.keep import (
    BLOCKSIZE,
    BY_KEEP,
    EXPERT_ROWS,
    EXPERTS,
    EXPERTS_8_BIT,
    kept_modules,
    skipped_by_transformers,
)
from peftkit.base.kinds import QUANTISED, quantization_settings, stored_kind
from peftkit.errors import ContractError, short
from peftkit.find.experts import ROUTER, experts_and_routers
from peftkit.find.modules import base_modules, storage_of
from peftkit.find.stacks import packed_parameter

if TYPE_CHECKING:
    from rich.console import RenderableType

BUFFER = "buffers"


@dataclass(frozen=True)
class StoredPart:
    """One parameter of a model, or one buffer.

    Attributes:
        name: Its name in the model without adapters.
        storage: ``"nf4"``, ``"fp4"``, ``"int8"``, a dtype, or ``"buffers"``.
        parameters: Number of values; 0 for a buffer.
        nbytes: Bytes of the values and of the block or row maxima that belong to them.
        reason: Why it is not quantised; empty if it is, or if the model is not quantised.
    """

    name: str
    storage: str
    parameters: int
    nbytes: int
    reason: str


@dataclass(frozen=True)
class BaseReport:
    """How a base model is stored.

    Attributes:
        model: Class name of the model.
        kind: ``"nf4"``, ``"fp4"``, ``"int8"``, the name of another method of quantisation, or ``None`` for a model that is not quantised.
        parts: Every parameter and buffer once, in the model's order. Tied parameters have the name of the first.
        note: What else there is to know; may be empty.
    """

    model: str
    kind: str | None
    parts: tuple[StoredPart, ...]
    note: str

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model."""
        return sum(part.nbytes for part in self.parts)

    @property
    def storage(self) -> dict[str, tuple[int, int]]:
        """Numbers of parameters and bytes by storage."""
        sums: dict[str, tuple[int, int]] = {}
        for part in self.parts:
            parameters, nbytes = sums.get(part.storage, (0, 0))
            sums[part.storage] = parameters + part.parameters, nbytes + part.nbytes
        return sums

    @property
    def kept(self) -> dict[str, str]:
        """The reason for each parameter of a quantised model that is not quantised."""
        return {part.name: part.reason for part in self.parts if part.reason}

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data."""
        return {**asdict(self), "nbytes": self.nbytes, "storage": self.storage}

    def __rich__(self) -> RenderableType:
        """Print as tables. Equal rows of different layers are shown as one row."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        total = Table(title=f"base: {self.model}", title_justify="left", expand=False)
        for column in ("storage", "parameters", "MiB"):
            total.add_column(column, justify="left" if column == "storage" else "right")
        for storage, (parameters, nbytes) in self.storage.items():
            total.add_row(storage, f"{parameters:,}", f"{nbytes / 2**20:,.1f}")
        lines: list[RenderableType] = [total]
        if self.kept:
            kept = Table(title="not quantised", title_justify="left", expand=False)
            for column in ("parameters", "n", "storage", "MiB", "reason"):
                right = column in ("n", "MiB")
                kept.add_column(column, justify="right" if right else "left", overflow="fold")
            for (pattern, storage, reason), sizes in self._kept_groups().items():
                size = f"{sum(sizes) / 2**20:,.1f}"
                kept.add_row(Text(pattern), str(len(sizes)), storage, size, Text(reason))
            lines.append(kept)
        if self.note:
            lines.append(Text(self.note))
        return Group(*lines)

    def _kept_groups(self) -> dict[tuple[str, str, str], list[int]]:
        groups: dict[tuple[str, str, str], list[int]] = {}
        for part in self.parts:
            if part.reason:
                pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", part.name)
                groups.setdefault((pattern, part.storage, part.reason), []).append(part.nbytes)
        return groups

    def __str__(self) -> str:
        """The printed tables as plain text."""
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=140, color_system=None).print(self)
        return out.getvalue().rstrip()


def base_report(model: nn.Module) -> BaseReport:
    """Report how a base model is stored: parameters and bytes by storage, and what is not quantised and why.

    Args:
        model: A model from ``load_base`` or from transformers, with or without adapters; adapters are left out.

    Raises:
        ContractError: It is not a model.
    """
    if not isinstance(model, nn.Module):
        raise ContractError(f"model={short(model)} is of type {type(model).__name__}, not a model")
    modules = dict(base_modules(model))
    base = modules[""]
    config = getattr(base, "config", None)
    parts = tuple(_parts(base, modules))
    kind = stored_kind(config)
    if kind is None:
        kind = next((part.storage for part in parts if part.storage in (*QUANTISED, "fp4")), None)
    note = ""
    if kind is not None and kind not in (*QUANTISED, "fp4"):
        note = f"quantised with {kind}; its layers run PEFT's own path, peftkit does not fuse them"
    return BaseReport(type(base).__name__, kind, parts, note)


def stored_as(tensor: Tensor) -> str:
    """``"nf4"`` or ``"fp4"`` for bitsandbytes' 4-bit weights, ``"fp8"`` for float8 (e4m3), otherwise the dtype."""
    state = getattr(tensor, "quant_state", None)
    if type(tensor).__name__ == "Params4bit" and state is not None:
        return state.quant_type
    dtype = str(tensor.dtype).removeprefix("torch.")
    return "fp8" if dtype == "float8_e4m3fn" else dtype


def logical_size(tensor: Tensor) -> int:
    """The number of values of a parameter. bitsandbytes packs two 4-bit values into each byte."""
    if type(tensor).__name__ != "Params4bit":
        return tensor.numel()
    state = getattr(tensor, "quant_state", None)
    return math.prod(state.shape) if state is not None else tensor.numel()


def _parts(base: nn.Module, modules: dict[str, nn.Module]) -> Iterator[StoredPart]:
    quantised = any(_statistics(p) for module in modules.values() for p in _own(module))
    reasons = _reasons(base) if quantised else {}
    stacks = set(experts_and_routers(modules)[1])
    in_8_bits = any(hasattr(p, "SCB") for module in modules.values() for p in _own(module))
    seen: set[Any] = set()
    for name, module in modules.items():
        before = f"{name}." if name else ""
        for own, parameter in module._parameters.items():
            if parameter is None or storage_of(parameter) in seen:
                continue
            seen.add(storage_of(parameter))
            statistics = _statistics(parameter)
            full = f"{before}{own}"
            packed = packed_parameter(module)
            if packed is not None:
                statistics = _of_state(packed.state)
                full = before.replace(".parametrizations.", ".").removesuffix(".")
            reason = ""
            if quantised and not statistics:
                reason = _reason(module, own, reasons.get(name))
                if full in stacks:
                    reason = EXPERTS_8_BIT if in_8_bits else _stack_reason(parameter)
            nbytes = parameter.nbytes + sum(part.nbytes for part in statistics)
            storage = packed.state.quant_type if packed is not None else stored_as(parameter)
            size = packed.numel if packed is not None else logical_size(parameter)
            yield StoredPart(full, storage, size, nbytes, reason)
        for own, buffer in module._buffers.items():
            if buffer is not None and storage_of(buffer) not in seen:
                seen.add(storage_of(buffer))
                yield StoredPart(f"{before}{own}", BUFFER, 0, buffer.nbytes, "")


def _stack_reason(weight: Tensor) -> str:
    return EXPERT_ROWS if weight.shape[-1] % BLOCKSIZE else EXPERTS


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _statistics(parameter: Any) -> list[Tensor]:
    """The tensors that bitsandbytes keeps beside a quantised weight: maxima, tables and offset."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return _of_state(state)
    maxima = getattr(parameter, "SCB", None)
    return [] if maxima is None else [maxima]


def _of_state(state: Any) -> list[Tensor]:
    inner = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *inner]


def _reasons(base: nn.Module) -> dict[str, str]:
    """Why linear layers are not quantised, as ``load_base`` decided."""
    named = (quantization_settings(getattr(base, "config", None)) or {}).get(
        "llm_int8_skip_modules"
    )
    left_out = experts_and_routers(dict(base_modules(base)))[0]
    routers = {name: reason for name, reason in left_out.items() if reason == ROUTER}
    reasons = kept_modules(base, (), skipped_by_transformers(base))
    return dict.fromkeys(named or (), BY_KEEP) | routers | reasons


def _reason(module: nn.Module, own: str, reason: str | None) -> str:
    """Why one parameter of a quantised model is not quantised. ``reason`` is that of a linear layer or router."""
    if own.endswith("bias"):
        return "bias"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return reason or "no weight of a linear layer"
