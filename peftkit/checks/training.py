"""``check``: check that a model would train, from its adapters and, with a batch, from one forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftkit.checks.adapters import AdapterTensor, active_adapters, adapter_tensors, tuner_layers
from peftkit.checks.batches import checked_batch, require_supervision, supervision
from peftkit.checks.effect import check_heads, check_strength
from peftkit.checks.reach import measure
from peftkit.errors import ContractError, count, listing, short
from peftkit.find.matching import check_targets
from peftkit.find.statistics import lost_statistics

if TYPE_CHECKING:
    from rich.console import RenderableType

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class CheckReport:
    """The results of ``check`` for a model that passed.

    Attributes:
        adapters: Names of the active adapters.
        tensors: Number of adapter tensors.
        trainable: Number of trainable adapter tensors.
        loss: Loss of the batch; ``None`` without a batch.
        grad_norms: Euclidean norm of each trainable tensor's gradient by name; empty without a batch.
        supervised: Number of labels that the loss uses; ``None`` without a batch, or if the labels are not classes.
        labels: Number of all labels of the batch, or ``None`` in the same cases.
        notes: Notes on unusual facts that are not errors.
    """

    adapters: tuple[str, ...]
    tensors: int
    trainable: int
    loss: float | None = None
    grad_norms: dict[str, float] = field(default_factory=dict)
    supervised: int | None = None
    labels: int | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary of plain data."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """Return the report as a table."""
        from rich.table import Table

        table = Table(title="peftkit check: passed", show_header=False)
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def __str__(self) -> str:
        """Return the report as text, with one line per entry."""
        return "\n".join(f"{name}: {value}" for name, value in self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("active adapters", ", ".join(self.adapters)),
            ("adapter tensors", f"{self.tensors}, {self.trainable} of them trainable"),
        ]
        if self.loss is not None:
            norms = {name: norm for name, norm in self.grad_norms.items() if norm > 0.0}
            if self.supervised is not None:
                rows.append(("supervised labels", f"{self.supervised} of {self.labels}"))
            rows.append(("loss", f"{self.loss:.6g}"))
            for what, pick in (("smallest", min), ("largest", max)) if norms else ():
                name = pick(norms, key=norms.__getitem__)
                rows.append((f"{what} gradient norm", f"{norms[name]:.3g} ({name})"))
            zeros = len(self.grad_norms) - len(norms)
            rows.append(("zero gradients", f"{zeros}, as expected"))
        return rows + [("note", note) for note in self.notes]


def check(model: nn.Module, batch: Mapping[str, Any] | None = None) -> CheckReport:
    """Raise an error if training this model would fail silently.

    Without a batch, ``check`` verifies that adapters exist, are active and match modules; that their tensors are finite,
    trainable and of a trainable dtype; that no scale of 0 or dropout of 1 disables them; and that a task head with random
    weights is trained.

    With a batch, ``check`` also runs one forward and backward in the model's current mode. It verifies that labels are
    supervised, that loss and gradients are finite, and that every trainable adapter tensor gets a nonzero gradient. A zero
    gradient is allowed if it is correct (``lora_A`` while ``lora_B`` is zero, an expert without tokens, ...). The model, its
    gradients, its buffers and the random state are not changed.

    Args:
        model: A ``PeftModel``, or a transformers model after ``add_adapter``.
        batch: The arguments of the model's forward, including labels, as a dictionary of tensors. They are moved to the model's
            device.

    Returns:
        The results, for printing.

    Raises:
        ContractError: A check failed. The message names the cause and a way out.
    """
    if not isinstance(model, nn.Module):
        way_out = (
            "the arguments are swapped, call check(model, batch)"
            if isinstance(batch, nn.Module)
            else "load one and call peftkit.wrap(model) first"
        )
        raise ContractError(
            f"model={short(model)} is of type {type(model).__name__}, not a model; {way_out}"
        )
    model = getattr(model, "_orig_mod", model)
    tensors = adapter_tensors(model)
    if not tensors or not getattr(model, "peft_config", None):
        raise ContractError(
            f"{type(model).__name__} has no adapter; call peftkit.wrap(model) first"
        )
    active = active_adapters(model)
    _check_active(model, active, tensors)
    for config in model.peft_config.values():
        check_targets(model, config)
    notes = _check_values(tensors) + _check_trainable(tensors, active)
    check_strength(model, active)
    notes += check_heads(model) + _statistics_notes(model)
    trainable = sum(t.tensor.requires_grad for t in tensors)
    report = CheckReport(tuple(active), len(tensors), trainable, notes=tuple(notes))
    if batch is None:
        return report
    batch = checked_batch(batch)
    found = supervision(model, batch)
    notes += require_supervision(batch, found)
    loss, norms, more = measure(model, batch, tensors)
    return replace(
        report,
        loss=loss,
        grad_norms=norms,
        supervised=found.supervised if found else None,
        labels=found.labels if found else None,
        notes=(*notes, *more),
    )


def _statistics_notes(model: nn.Module) -> list[str]:
    """Whether frozen batch norms would change in training, which the adapter's file would not contain."""
    lost = lost_statistics(model)
    if not lost:
        return []
    return [
        f"{count(len(lost), 'frozen batch norm changes its', 'frozen batch norms change their')} running statistics in training, such as "
        f"{lost[0]}. An adapter's file does not contain them, so the loaded adapter would compute something else. Call eval() on them "
        "after each model.train(), as peftkit train does"
    ]


def _check_active(model: nn.Module, active: list[str], tensors: list[AdapterTensor]) -> None:
    layers = tuner_layers(model)
    if not active:
        raise ContractError(
            f"no adapter is active; call model.set_adapter with one of {sorted(model.peft_config)}"
        )
    owned = {t.adapter for t in tensors}
    for name in active:
        if name not in owned and owned != {""}:
            raise ContractError(
                f"the active adapter {name!r} has no tensors in the model, which has the adapters {sorted(owned)}; call "
                "model.set_adapter with one of them"
            )
    if layers and all(layer.disable_adapters for layer in layers.values()):
        raise ContractError(
            "all adapters are disabled; call model.enable_adapter_layers() or leave model.disable_adapter()"
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ContractError(
            f"adapters are merged into the base weights of {count(len(merged), 'layer')}, so they get no gradient:\n{listing(merged)}\n"
            "Call model.unmerge_adapter() first."
        )


def _check_values(tensors: list[AdapterTensor]) -> list[str]:
    empty = [t.name for t in tensors if t.tensor.is_meta]
    if empty:
        raise ContractError(
            f"{_are(empty)} on the meta device, so their values were never loaded:\n{listing(empty)}\n"
            "Load the adapter again without low_cpu_mem_usage, or with peftkit.load_adapter."
        )
    odd = [f"{t.name}: {t.tensor.dtype}" for t in tensors if t.tensor.dtype not in _DTYPES]
    if odd:
        raise ContractError(
            f"{_have(odd)} a dtype that cannot be trained:\n{listing(odd)}\nCast them to torch.float32."
        )
    broken = [t.name for t in tensors if not bool(t.tensor.detach().isfinite().all())]
    if broken:
        raise ContractError(
            f"{_have(broken)} NaN or infinite values:\n{listing(broken)}\n"
            "Load an earlier checkpoint, or start again with a smaller learning rate."
        )
    dtypes: dict[tuple[str, str], set[torch.dtype]] = {}
    for t in tensors:
        if t.role.startswith("lora_"):
            dtypes.setdefault((t.layer, t.adapter), set()).add(t.tensor.dtype)
    mixed = [
        f"{layer}: {sorted(map(str, found))}"
        for (layer, _), found in dtypes.items()
        if len(found) > 1
    ]
    if mixed:
        raise ContractError(
            f"the factors of {count(len(mixed), 'layer')} differ in dtype:\n{listing(mixed)}\nCast the whole adapter to one "
            "dtype."
        )
    halves = sum(t.tensor.requires_grad and t.tensor.dtype is torch.float16 for t in tensors)
    return (
        [f"{count(halves, 'tensor')} trained in float16: small gradients and updates round to zero"]
        if halves
        else []
    )


def _check_trainable(tensors: list[AdapterTensor], active: list[str]) -> list[str]:
    """Raise if adapters are frozen by accident: all of them, or one tensor of a layer whose other tensors are trained."""
    mine = [t for t in tensors if t.adapter in active or not t.adapter]
    if not any(t.tensor.requires_grad for t in mine):
        raise ContractError(
            f"no tensor of the active adapters ({', '.join(active)}) is trainable; they were probably loaded for inference: "
            "pass is_trainable=True when loading, or call model.set_adapter after loading"
        )
    trained_layers = {t.layer for t in mine if t.tensor.requires_grad}
    trained_roles = {(t.adapter, t.role) for t in mine if t.tensor.requires_grad}
    frozen = [
        t for t in mine if not t.tensor.requires_grad and (t.adapter, t.role) in trained_roles
    ]
    odd = [t.name for t in frozen if t.layer in trained_layers]
    if odd:
        raise ContractError(
            f"{_have(odd)} requires_grad=False while the rest of the layer, and the same tensor of other layers, is trained:\n"
            f"{listing(odd)}\nSet requires_grad to the same value on all of them."
        )
    layers = sorted({t.layer for t in frozen})
    frozen_layers = count(len(layers), "adapter layer is", "adapter layers are")
    return [f"{frozen_layers} frozen, such as {layers[0]}"] if layers else []


def _are(names: list[str]) -> str:
    return count(len(names), "adapter tensor is", "adapter tensors are")


def _have(names: list[str]) -> str:
    return count(len(names), "adapter tensor has", "adapter tensors have")
