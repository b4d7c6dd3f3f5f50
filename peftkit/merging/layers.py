"""Merge one layer, decide how its weights are stored, and measure what the storage changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit.base.storage import Storage
from peftkit.errors import ContractError
from peftkit.merging.arithmetic import DecodedLinear
from peftkit.merging.aware import is_tuned_as_stored
from peftkit.merging.certificate import LayerDifference, recovery_of, relative_error
from peftkit.merging.probe import Batch
from peftkit.merging.rounding import Rounding, cast_to_outputs, quantize_to_outputs
from peftkit.merging.state import StateWriter, require_in_range
from peftkit.merging.units import base_module, kind_of, merged_module, plain_copy

WeightOf = Callable[[str, tuple[int, ...]], Tensor]

_16_BIT = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """One call of a layer: its arguments, and its output with the adapter."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class MergedLayer(NamedTuple):
    """The tensors of a merged layer and what was measured on it.

    Attributes:
        entries: The tensors as they are stored, by their names within the layer.
        difference: The measures.
    """

    entries: dict[str, Tensor]
    difference: LayerDifference


class LayerMerger:
    """Merges layers into one kind of storage."""

    def __init__(
        self,
        state: StateWriter,
        rounding: Rounding,
        keep_storage: bool,
        original: WeightOf | None,
    ):
        """Create a merger.

        Args:
            state: Knows the dtype in which each tensor is stored, and which tensors are tied.
            rounding: How quantised weights are rounded.
            keep_storage: Store weights of quantised layers in the storage that the base has.
            original: Returns the original weight of a quantised layer by name, to merge into it instead of the decoded one.
        """
        self._state, self._rounding = state, rounding
        self._keep_storage, self._original = keep_storage, original

    def merge(self, name: str, unit: Any, call: Call | None, batch: Batch | None) -> MergedLayer:
        """Merge the active adapters of one layer.

        Args:
            name: The layer's name in the base model.
            unit: The layer with adapters, with float32 tensors; not changed.
            call: A call of the layer, for the rounding and to compare outputs. ``None`` if the layer did not run.
            batch: The batch of the call.

        Raises:
            ContractError: PEFT cannot merge the layer, or the merged weight is not finite or too large for the dtype.
        """
        decoded = [part for part in unit.modules() if isinstance(part, DecodedLinear)]
        storages: dict[int, Storage] = {}
        dense: dict[int, nn.Module] = {}
        for part in decoded:
            dense[id(part)] = linear = self._dense(name, part)
            storages[id(linear)] = part.__dict__["storage"]
        merged = merged_module(unit, dense, name)
        as_tuned = is_tuned_as_stored(unit)
        before = base_module(unit)
        if self._original is not None:
            before = plain_copy(unit, {id(part): self._dense(name, part) for part in decoded})

        calibration = _inputs(call, batch)
        entries: dict[str, Tensor] = {}
        kinds: list[str] = []
        exact2 = error2 = change2 = 0.0
        base_tensors = _tensors(before)
        for path, part in merged.named_modules():
            storage = storages.get(id(part)) if self._keep_storage else None
            prefix = f"{path}." if path else ""
            # only the tensors of this part, not those of its children
            own = {**dict(part.named_parameters(recurse=False)), **_buffers(part)}
            for key, tensor in own.items():
                exact = tensor.detach()
                full = f"{name}.{prefix}{key}"
                _require_finite(full, exact)
                if as_tuned and key == "weight" and id(part) in storages:
                    # the tuned weight is the rounded one, whatever the dtype of the files is
                    rounded = storages[id(part)].quantized(exact)
                    exact.copy_(rounded.dense())
                else:
                    rounded = None
                if storage is not None and key == "weight":
                    stored = rounded or self._quantize(
                        storage, exact, calibration if not path else None
                    )
                    entries |= {prefix + end: value for end, value in stored.entries().items()}
                    value = stored.dense()
                    kinds.append(storage.name)
                else:
                    kept = self._state.cast(full, exact, key in part._parameters)
                    # tied tensors have to be rounded alike
                    if key == "weight" and not path and not self._state.is_tied(full):
                        kept = self._round(part, exact, kept, calibration)
                    require_in_range(full, exact, kept)
                    entries[prefix + key] = kept
                    value = kept.float() if kept.is_floating_point() else kept
                    kinds.append(str(kept.dtype).removeprefix("torch."))
                if exact.is_floating_point():
                    base = base_tensors.pop(prefix + key, None)
                    exact2 += _norm2(exact)
                    error2 += _norm2(value - exact)
                    if base is not None and base.shape == exact.shape:
                        change2 += _norm2(exact - base.float())
                    exact.copy_(value)
        output_error = recovery = None
        if call is not None:
            output_error, recovery = _outputs(before, merged, call, batch)
        difference = LayerDifference(
            name=name,
            method=kind_of(unit),
            stored=" and ".join(dict.fromkeys(kinds)),
            weight_error=(error2 / exact2) ** 0.5 if exact2 else 0.0,
            weight_change=(change2 / exact2) ** 0.5 if exact2 else None,
            output_error=output_error,
            recovery=recovery,
        )
        return MergedLayer(entries, difference)

    def _dense(self, name: str, part: DecodedLinear) -> nn.Linear:
        linear = part.dense()
        if self._original is not None:
            linear.weight.data = self._original(f"{name}.weight", tuple(linear.weight.shape)).to(
                linear.weight
            )
        return linear

    def _quantize(self, storage: Storage, weight: Tensor, inputs: Tensor | None) -> Storage:
        if self._rounding == "nearest" or inputs is None:
            return storage.quantized(weight)
        return quantize_to_outputs(storage, weight, inputs)

    def _round(
        self, layer: nn.Module, exact: Tensor, cast: Tensor, inputs: Tensor | None
    ) -> Tensor:
        """Round the weight of a linear layer to a 16-bit dtype by its outputs; return ``cast`` if this is not possible."""
        from transformers.pytorch_utils import Conv1D

        if self._rounding == "nearest" or inputs is None or cast.dtype not in _16_BIT:
            return cast
        if isinstance(layer, Conv1D):
            return cast_to_outputs(cast.dtype, exact.T, inputs).T.contiguous()
        return cast_to_outputs(cast.dtype, exact, inputs) if isinstance(layer, nn.Linear) else cast


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    skipped = module._non_persistent_buffers_set
    return {k: v for k, v in module._buffers.items() if v is not None and k not in skipped}


def _inputs(call: Call | None, batch: Batch | None) -> Tensor | None:
    """The inputs ``[tokens, K]`` for the rounding."""
    x = call.args[0] if call is not None and call.args else None
    if batch is None or not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        return None
    return batch.calibration(x)


def _outputs(
    before: nn.Module, stored: nn.Module, call: Call, batch: Batch | None
) -> tuple[float | None, float | None]:
    """The relative error of the layer's output and the share of the adapter's effect on it that was kept."""
    exact, got = _first(call.output), _first(stored(*call.args, **call.kwargs))
    base = _first(before(*call.args, **call.kwargs))
    if exact is None or got is None or base is None or exact.shape != got.shape:
        return None, None
    if batch is not None:
        exact, got, base = (batch.measured_rows(t) for t in (exact, got, base))
    return relative_error(got, exact), recovery_of(base, exact, got)


def _first(output: Any) -> Tensor | None:
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _require_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ContractError(
            f"the merged {name} has values that are not finite; the adapter or the base model is broken"
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a plain layer by name, with decoded weights."""
    found = dict(module.state_dict())
    for path, part in module.named_modules():
        if isinstance(part, DecodedLinear):
            found[f"{path}.weight" if path else "weight"] = part.weight
    return found


def _norm2(tensor: Tensor) -> float:
    # without a temporary tensor in float64
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2
