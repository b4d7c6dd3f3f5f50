"""The tensors of a merged checkpoint: their names, dtypes and ties, written in the layout that transformers' ``save_pretrained`` has."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.original import OriginalWeights
from peftkit.base.storage import replaces_conv1d, storage_of
from peftkit.errors import ContractError
from peftkit.find.stacks import packed_stacks
from peftkit.merging.files import ShardWriter
from peftkit.merging.lazy import decoded_stacks, values_of
from peftkit.merging.mapped import files_of
from peftkit.merging.units import base_module, is_unit, walk


class StateWriter:
    """Writes the tensors of a model layer by layer.

    Attributes:
        untied: Pairs of names whose tensors were one in the base model and have become different.
    """

    def __init__(self, base: Any, dtype: torch.dtype | None, writer: ShardWriter):
        """Create a writer.

        Args:
            base: The transformers model, with adapters in it.
            dtype: The dtype of parameters, or ``None`` to keep the dtype that each parameter has in the base model.
            writer: Writes the files.
        """
        self._base, self._dtype, self._writer = base, dtype, writer
        self._files = files_of(base)
        self._tensors = base_tensors(base)
        names: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            names.setdefault(id(tensor), []).append(name)
        self._tied = {
            name: group[0] for group in names.values() if len(group) > 1 for name in group
        }
        self._first: dict[str, tuple[str, Tensor]] = {}
        self._kept_names = _float32_names(base, dtype)
        self._ignored = set(getattr(base, "_keys_to_ignore_on_save", None) or [])
        self._converted = _with_conversions(base, self._tensors)
        if dtype is None:
            _require_own_layout(self._converted, base)
        self._joined = _joined_names(self._converted)
        self._waiting: dict[tuple[int, str, str], dict[str, Tensor]] = {}
        self._transposed = transposed_weights(base) if dtype is not None else frozenset()
        self._done: set[str] = set()
        self.untied: list[tuple[str, str]] = []

    def cast(self, name: str, tensor: Tensor, is_parameter: bool) -> Tensor:
        """Return a tensor in the dtype in which it is stored."""
        if not tensor.is_floating_point():
            return tensor
        own = self._tensors.get(name)
        before = own.dtype if own is not None else self._base.dtype
        if self._dtype is None or not is_parameter:
            target = before if before.is_floating_point else self._base.dtype
        elif self._kept_names is not None and self._kept_names.search(name):
            target = torch.float32
        else:
            target = self._dtype
        return tensor.to(target)

    def is_tied(self, name: str) -> bool:
        """Whether a tensor of the base model has a second name."""
        return name in self._tied

    def write_layer(self, name: str, entries: dict[str, Tensor]) -> None:
        """Write the tensors of one merged layer. The names of ``entries`` are within the layer."""
        named = {f"{name}.{key}" if name else key: value for key, value in entries.items()}
        for weight in self._transposed & named.keys():
            named[weight] = named[weight].T.contiguous()
        self._write(named)

    def write_rest(self, original: OriginalWeights | None) -> None:
        """Write the tensors of all layers without adapters.

        Args:
            original: Has the weights that replace those of quantised layers, or ``None``.

        Raises:
            ContractError: A value is too large for the dtype.
        """
        for name, module in walk(self._base):
            if not is_unit(module):
                self.write_layer(name, self.entries_of(name, module, original))
        for parts in self._waiting.values():
            self._add(parts)  # of a model that lacks the others
        self._waiting.clear()

    def entries_of(
        self, name: str, module: nn.Module, original: OriginalWeights | None
    ) -> dict[str, Tensor]:
        """The tensors of a layer without adapters, as they are stored."""
        found: dict[str, Any] = {}
        module._save_to_state_dict(found, "", keep_vars=False)
        stacks = decoded_stacks(module)
        found |= stacks
        storage = storage_of(module)
        quantized: dict[str, Any] = {}
        if storage is not None and self._dtype is None:
            quantized = {key: value for key, value in found.items() if key != "bias"}
        elif storage is not None:
            weight = storage.dense()
            if original is not None:
                weight = original(f"{name}.weight", tuple(weight.shape)).to(weight.device)
            found = {"weight": weight} | {k: v for k, v in found.items() if k == "bias"}
        stored = {}
        for key, value in found.items():
            if key not in quantized and isinstance(value, Tensor):
                full = f"{name}.{key}" if name else key
                values = values_of(value)
                stored[key] = self.cast(full, values, key in module._parameters or key in stacks)
                require_in_range(full, values, stored[key])
        return quantized | stored

    def _write(self, tensors: dict[str, Tensor]) -> None:
        kept = {}
        for name, tensor in tensors.items():
            if name in self._done or name in self._ignored:
                continue
            self._done.add(name)
            if name in self._tied and self._is_tied(name, tensor):
                continue
            kept[name] = tensor
        self._add(self._complete(kept))
        self._files.release()

    def _complete(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that can be written: of those that are one tensor in the checkpoint, such as q, k and v, all or none."""
        ready = {}
        for name, tensor in tensors.items():
            for number, patterns in enumerate(self._joined):
                found = next(filter(None, (re.search(p, name) for p in patterns)), None)
                if found is not None:
                    group = (number, name[: found.start()], name[found.end() :])
                    parts = self._waiting.setdefault(group, {})
                    parts[name] = tensor
                    if len(parts) == len(patterns):
                        ready |= self._waiting.pop(group)
                    break
            else:
                ready[name] = tensor
        return ready

    def _add(self, tensors: dict[str, Tensor]) -> None:
        if self._converted is not None and tensors:
            from transformers.core_model_loading import revert_weight_conversion

            tensors = revert_weight_conversion(self._converted, tensors)  # pyright: ignore[reportArgumentType]
        for name, tensor in tensors.items():
            self._writer.add(name, tensor)

    def _is_tied(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor of the same tie was written already and has the same values."""
        group = self._tied[name]
        if group not in self._first:
            self._first[group] = name, tensor.detach().cpu()
            return False
        other, first = self._first[group]
        if _same(first, tensor):
            return True
        self.untied.append((other, name))
        return False

    def missing(self) -> list[str]:
        """Names of tensors of the base model that were not written and are not tied to one that was."""
        return [
            name for name in self._tensors if name not in self._done and name not in self._ignored
        ]


def _joined_names(model: _Converted | None) -> list[list[str]]:
    """The patterns of names that are one tensor in a checkpoint of the model and several in the model, one list for each such tensor."""
    if model is None:
        return []
    joins = [step for step in model.writers() if len(step.target_patterns) == 1]
    return [list(step.source_patterns) for step in joins if len(step.source_patterns) > 1]


def _require_own_layout(model: _Converted | None, base: nn.Module) -> None:
    """Raise ``ContractError`` if the checkpoints of a model join or reorder weights that are stored in codes."""
    if model is None:
        return
    patterns = [pattern for step in model.writers() for pattern in step.source_patterns]
    for name, module in walk(base):
        weight = f"{name}.weight"
        is_quantised = storage_of(base_module(module)) is not None
        if is_quantised and any(re.search(pattern, weight) for pattern in patterns):
            raise ContractError(
                f"dtype='base': checkpoints of {type(base).__name__} join or reorder weights such as {weight}, which cannot be done with quantised "
                "ones; use dtype='bf16'"
            )


def require_in_range(name: str, value: Tensor, stored: Tensor) -> None:
    """Raise ``ContractError`` if finite values have become infinite in the dtype in which they are stored."""
    if not stored.is_floating_point() or stored.dtype is value.dtype:
        return
    if bool(stored.isfinite().all()) or not bool(value.isfinite().all()):
        return
    raise ContractError(
        f"values of {name} are too large for {str(stored.dtype).removeprefix('torch.')} (the largest is "
        f"{value.abs().max().item():.3g}); pass dtype='bf16' or 'fp32'"
    )


def base_tensors(base: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a base model without its adapters, by the names they have in its checkpoint."""
    found: dict[str, Tensor] = {}
    for name, module in walk(base):
        plain = base_module(module)
        inner = walk(plain) if is_unit(module) else [("", plain)]
        for path, part in inner:
            prefix = ".".join(p for p in (name, path) if p)
            tensors = dict(part._parameters) | decoded_stacks(part)
            tensors |= {
                k: v for k, v in part._buffers.items() if k not in part._non_persistent_buffers_set
            }
            for key, tensor in tensors.items():
                if tensor is not None:
                    found[f"{prefix}.{key}" if prefix else key] = tensor
    return found


def transposed_weights(base: nn.Module) -> frozenset[str]:
    """The names of the weights that checkpoints without quantisation have as ``[K, N]``: of 4- and 8-bit layers in place of ``Conv1D``."""
    found = ((name, base_module(module)) for name, module in walk(base))
    return frozenset(
        f"{name}.weight"
        for name, module in found
        if storage_of(module) is not None and replaces_conv1d(module)
    )


def stored_bytes(base: nn.Module, dtype: torch.dtype | None) -> int:
    """The size of the tensors of a merged checkpoint, apart from the scales of quantised weights."""
    total, seen = 0, set()
    quantized = {}
    for name, module in walk(base):
        plain: Any = base_module(module)
        storage = storage_of(plain)
        if storage is not None:
            quantized[f"{name}.weight"] = plain.in_features * plain.out_features
    for name, tensor in base_tensors(base).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        floats = tensor.is_floating_point() or name in quantized
        size = dtype.itemsize if dtype is not None and floats else tensor.element_size()
        total += size * (
            quantized.get(name, tensor.numel()) if dtype is not None else tensor.numel()
        )
    return total


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of their dtype: PEFT computes tied deltas in a different order."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    allowed = 2 * torch.finfo(a.dtype).eps * torch.maximum(a.abs(), b.abs()).float()
    return bool(((a.float() - b.float()).abs() <= allowed).all())


def _float32_names(base: Any, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Matches the parameters that transformers keeps in float32 when it loads a model in this dtype."""
    names = set(getattr(base, "_keep_in_fp32_modules_strict", None) or [])
    if dtype is torch.float16:
        names |= set(getattr(base, "_keep_in_fp32_modules", None) or [])
    if dtype not in (torch.float16, torch.bfloat16) or not names:
        return None
    return re.compile("|".join(rf"(^|\.){name}($|\.)" for name in sorted(names)))


class _Converted:
    """The model as transformers' conversions read it: with its parameters by the names that they have without adapters."""

    def __init__(self, base: Any, conversions: list[Any], tensors: dict[str, Tensor]):
        self._base, self._weight_conversions, self._tensors = base, conversions, tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def writers(self) -> list[Any]:
        """The conversions that change tensors, not names alone, in the direction in which a checkpoint is written."""
        from transformers.core_model_loading import WeightConverter

        steps = [step for step in self._weight_conversions if isinstance(step, WeightConverter)]
        return [step.reverse_transform() for step in steps]

    def get_parameter(self, name: str) -> Tensor:
        """A parameter of the base model, as ``nn.Module.get_parameter`` has it."""
        if name not in self._tensors:
            raise AttributeError(f"{type(self._base).__name__} has no parameter {name}")
        return self._tensors[name]


def _with_conversions(base: Any, tensors: dict[str, Tensor]) -> _Converted | None:
    """The model with the conversions to the names and layouts of its checkpoints, or ``None`` if these are those of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    conversions = getattr(base, "_weight_conversions", None)
    if any(packed_stacks(module) for module in base.modules()):
        from peftkit.base.stacks import dense_conversions

        conversions = dense_conversions(base)
    elif conversions is None:
        known = get_model_conversion_mapping(base, add_legacy=False)
        # a model that was not loaded has the prefix of its class
        conversions = [step for step in known if not isinstance(step, PrefixChange)]
    return _Converted(base, conversions, tensors) if conversions else None
