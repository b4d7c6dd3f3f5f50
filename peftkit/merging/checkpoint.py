"""``merge``: write a model with its adapters merged as a checkpoint of transformers, and certify how near it is to the adapted model."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftkit.base.original import OriginalWeights
from peftkit.base.storage import storage_of
from peftkit.errors import ContractError, listing, short
from peftkit.find.repacking import without_repacking
from peftkit.find.stacks import packed_stacks
from peftkit.merging.arithmetic import exact_float32, float32_copy, with_float32_tensors
from peftkit.merging.aware import compute_as_stored
from peftkit.merging.certificate import Certificate, LayerDifference, Outputs, compare
from peftkit.merging.checking import base_outputs, written_outputs
from peftkit.merging.extras import write_config, write_generation_config, write_tokenizer
from peftkit.merging.files import (
    ShardWriter,
    new_folder,
    parse_size,
    require_absent,
    require_space,
    write_json,
)
from peftkit.merging.layers import Call, LayerMerger
from peftkit.merging.mapped import files_of
from peftkit.merging.probe import Batch, Probe, make_batch, outputs_of
from peftkit.merging.rounding import ROUNDINGS, Rounding
from peftkit.merging.state import StateWriter, stored_bytes, transposed_weights
from peftkit.merging.units import require_mergeable, units_of

Dtype = Literal["bf16", "fp16", "fp32", "base"]

DTYPES: dict[str, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "base": None,
}

MIN_RECOVERY = {"float32": 0.9999, "16 bit": 0.99, "int8": 0.8, "nf4": 0.5}
"""The default thresholds, by the storage of the adapted layers. Below them something other than rounding is likely to be wrong."""

CERTIFICATE_FILE = "merge.json"


def merge(
    model: nn.Module,
    out_dir: str | Path,
    dtype: Dtype = "bf16",
    *,
    certificate: bool = True,
    min_recovery: float | Literal["default"] | None = "default",
    rounding: Rounding = "outputs",
    probe: Probe = None,
    tokenizer: Any = None,
    base_weights: str | Path | None = None,
    max_shard_size: int | str = "5GB",
) -> Certificate | None:
    """Write the model with its active adapters merged to a new folder that ``from_pretrained`` loads.

    The layers are merged one at a time by PEFT's own arithmetic in float32, rounded once, and written at once. The model is not
    changed. The folder has its final name only when it is complete.

    Args:
        model: A ``PeftModel``, or a transformers model with adapters.
        out_dir: A folder that does not exist yet, or is empty.
        dtype: The dtype of the weights: ``"bf16"``, ``"fp16"``, ``"fp32"``, or ``"base"`` for the storage that each weight has in
            the base model. For a base in NF4 or int8 this is a checkpoint of bitsandbytes. With the other dtypes its weights are
            decoded first.
        certificate: Compare the written files with the model and its adapters, and write the result to ``merge.json``.
        min_recovery: The smallest share of the adapter's effect that has to be kept (``Difference.recovery``), or ``None`` to accept
            any. The default depends on the storage, see ``MIN_RECOVERY``.
        rounding: ``"outputs"`` rounds the weights of linear layers so that the layers' outputs on the probe keep the effect.
            ``"nearest"`` rounds each weight by itself.
        probe: Inputs on which the models are compared: a dictionary of tensors, a tensor, or texts. Default: random token ids. For
            ``rounding="outputs"`` the even rows are used to round and the odd rows to compare. Inputs like those of the task give the
            best result.
        tokenizer: A tokenizer or processor to save, or a folder with its files. Default: the files of the base model's folder.
        base_weights: The folder of the base model before it was quantised, to merge into these weights. The adapter was trained on
            the quantised ones, and the certificate says so.
        max_shard_size: Bytes in one file, or a text such as ``"5GB"``.

    Returns:
        The certificate, or ``None`` with ``certificate=False``.

    Raises:
        ContractError: The adapters cannot be merged, the recovery is below ``min_recovery``, or ``out_dir`` is not empty. Nothing is left
            in ``out_dir``. If the recovery was too small, the certificate is in ``<out_dir>.rejected.json``.
        ValueError: An argument is unknown.
        OSError: The disk is full, or the folder cannot be written.
    """
    out, job = Path(out_dir).absolute(), _Job(model, dtype, rounding, base_weights)
    _check_min_recovery(min_recovery)
    limit = parse_size(max_shard_size)
    require_absent(out)
    batch = None
    if certificate or job.rounds:
        batch = make_batch(job.base, probe, tokenizer, name="probe", seed=0)
    with new_folder(out) as folder, exact_float32(), without_repacking(job.base):
        require_space(folder, stored_bytes(job.base, job.dtype))
        write_generation_config(folder, job.base)
        job.facts["tokenizer"] = write_tokenizer(folder, job.base, tokenizer)
        tuned = job.write(folder, limit, batch)
        if not certificate:
            return None
        assert batch is not None and tuned is not None
        found = job.certify(folder, batch, tuned, min_recovery)
        write_json(folder / CERTIFICATE_FILE, found.to_dict())
        if not found.accepted:
            _reject(out, found)
    return found


class _Job:
    """One merge: what is merged, how it is stored, and what was found."""

    def __init__(self, model: Any, dtype: str, rounding: str, base_weights: str | Path | None):
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; pass one of {', '.join(DTYPES)}")
        if rounding not in ROUNDINGS:
            raise ValueError(
                f"rounding={rounding!r} is unknown; pass one of {', '.join(ROUNDINGS)}"
            )
        self.base, self.dtype = _base_of(model), DTYPES[dtype]
        units = units_of(self.base)
        self.active = require_mergeable(model, units)
        kinds = _storages(self.base)
        if base_weights is not None and (not kinds or self.dtype is None):
            what = (
                "dtype='base' keeps the quantised weights"
                if kinds
                else "the base model is not quantised"
            )
            raise ValueError(f"base_weights={short(str(base_weights))}, but {what}; leave it out")
        stacked = any(packed_stacks(module) for module in self.base.modules())
        if stacked and (self.dtype is None or base_weights is not None):
            _refuse_stacks(dtype, base_weights)
        self.original = None
        if base_weights is not None:
            prefix = getattr(self.base, "base_model_prefix", "")
            self.original = OriginalWeights(
                base_weights, "base_weights", prefix, transposed_weights(self.base)
            )
        self.rounding: Rounding = rounding  # pyright: ignore[reportAttributeAccessIssue]
        self.quantized = bool(kinds) and self.dtype is None
        self.rounds = rounding == "outputs" and (self.quantized or self._stores_16_bit())
        self.layers: list[LayerDifference] = []
        self.facts: dict[str, Any] = self._facts(model, dtype, kinds)

    def _stores_16_bit(self) -> bool:
        stored = self.dtype or self.base.dtype
        return stored in (torch.float16, torch.bfloat16)

    def _facts(self, model: Any, dtype: str, kinds: list[str]) -> dict[str, Any]:
        configs = getattr(model, "peft_config", None) or {}
        adapters = {
            name: str(getattr(configs[name].peft_type, "value", configs[name].peft_type))
            for name in self.active
            if name in configs
        }
        if not kinds:
            into = "the weights of the model"
        elif self.original is not None:
            into = (
                f"the weights in {self.original.path}; the adapter was trained on the quantised ones ({', '.join(kinds)}), whose "
                "error it may have learned to correct"
            )
        elif self.quantized:
            into = f"the quantised weights ({', '.join(kinds)}), which were rounded again"
        else:
            into = f"the decoded quantised weights ({', '.join(kinds)}), on which the adapter was trained"
        packages = ("torch", "transformers", "peft", "peftkit")
        return {
            "adapters": adapters,
            "base_model": getattr(self.base.config, "_name_or_path", None) or None,
            "architecture": type(self.base).__name__,
            "merged_into": into,
            "base_read_from": files_of(self.base).note,
            "dtype": dtype,
            "rounding": self.rounding if self.rounds else "nearest",
            "versions": {name: version(name) for name in packages},
        }

    def write(self, folder: Path, limit: int, batch: Batch | None) -> Outputs | None:
        """Write config and weights. Returns the outputs of the adapted model if there is a batch."""
        copied = float32_copy(self.base)
        units = units_of(copied)
        compute_as_stored(self.base, units)
        names = sum(1 for _ in self.base.state_dict()) * (2 if self.quantized else 1)
        writer = ShardWriter(folder, limit, names)
        self.state = state = StateWriter(self.base, self.dtype, writer)
        merger = LayerMerger(state, self.rounding, self.quantized, self.original)
        waiting = dict(units)

        def finish(name: str, call: Call | None) -> None:
            if waiting.pop(name, None) is None:
                return
            merged = merger.merge(name, units[name], call, batch)
            state.write_layer(name, merged.entries)
            self.layers.append(merged.difference)

        try:
            tuned = None if batch is None else _run(copied, units, batch, finish)
            for name in list(waiting):
                with with_float32_tensors(units[name], files_of(self.base)):
                    finish(name, None)
            state.write_rest(self.original)
            if state.missing():
                raise AssertionError(f"not written: {state.missing()[:5]}")
            writer.finish(sum(p.numel() for p in self.base.parameters()))
        finally:
            writer.abandon()
        write_config(
            folder,
            self.base,
            type(copied),
            self.dtype or self.base.dtype,
            quantized=self.quantized,
            untied=bool(state.untied),
        )
        self.facts["untied"] = [list(pair) for pair in state.untied]
        self.facts["size_bytes"] = writer.total_bytes
        self.architecture = type(copied)
        return tuned

    def certify(
        self, folder: Path, batch: Batch, tuned: Outputs, min_recovery: float | str | None
    ) -> Certificate:
        """Compare the files with the adapted model."""
        base = base_outputs(self.base, batch)
        rounded = base if self.dtype is None else base_outputs(self.base, batch, self._rounded)
        merged = written_outputs(folder, self.base, self.architecture, batch)
        is_lm = self.base.get_output_embeddings() is not None and set(tuned) == {"logits"}
        outputs = compare(base, tuned, merged, rounded, is_lm)
        threshold = self._default() if isinstance(min_recovery, str) else min_recovery
        recovery = outputs.recovery
        accepted = threshold is None or (recovery is not None and recovery >= threshold)
        self.facts["probe"] = batch.source
        return Certificate(recovery, threshold, accepted, outputs, tuple(self.layers), self.facts)

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        """The weight of the base model as it would be stored without an adapter."""
        if self.original is not None and name in self._quantized_names():
            weight = self.original(name, tuple(weight.shape)).to(weight)
        return self.state.cast(name, weight, True).float()

    def _quantized_names(self) -> set[str]:
        return {f"{name}.weight" for name in _quantized_linears(self.base)}

    def _default(self) -> float:
        stored = {layer.stored for layer in self.layers}
        for kind in ("nf4", "int8"):
            if any(kind in one for one in stored):
                return MIN_RECOVERY[kind]
        narrow = any(one in kind for kind in stored for one in ("float16", "bfloat16"))
        return MIN_RECOVERY["16 bit" if narrow else "float32"]


def _run(copied: Any, units: dict[str, Any], batch: Batch, finish: Any) -> Outputs:
    """Run the adapted model. Each layer with adapters is merged and written when it has been called the first time."""

    def after(name: str) -> Any:
        def hook(unit: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            finish(name, Call(args, kwargs, output))

        return hook

    for name, unit in units.items():
        # before the hook that puts the 16-bit tensors back
        unit.register_forward_hook(after(name), with_kwargs=True, prepend=True)
    return batch.measured(outputs_of(copied, batch))


def _base_of(model: Any) -> Any:
    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel

    base = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
    elif isinstance(model, PeftMixedModel):
        base = model.base_model.model
    if not isinstance(base, PreTrainedModel):
        raise ContractError(
            f"model is a {type(model).__name__} around a {type(base).__name__}; merge writes checkpoints of transformers models. "
            "Call model.merge_and_unload() for other models."
        )
    config = getattr(base.config, "quantization_config", None)
    quantizer = getattr(getattr(base, "hf_quantizer", None), "quantization_config", config)
    method = str(getattr(getattr(quantizer, "quant_method", ""), "value", ""))
    if quantizer is not None and "bitsandbytes" not in method:
        raise ContractError(
            f"the base model is quantised with {method or type(quantizer).__name__}; only bitsandbytes' nf4 and int8 can be merged. "
            "Load the original model, put the adapter on it, and merge that."
        )
    return base


def _quantized_linears(base: nn.Module) -> dict[str, Any]:
    """The linears of bitsandbytes by the names they have in the base model."""
    from peftkit.merging.units import base_module, walk

    found = ((name, base_module(module)) for name, module in walk(base))
    return {name: module for name, module in found if type(module).__name__ in _BITSANDBYTES}


_BITSANDBYTES = ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt")


def _storages(base: nn.Module) -> list[str]:
    """The kinds of quantised storage in the base model."""
    kinds = set()
    for name, linear in _quantized_linears(base).items():
        try:
            storage = storage_of(linear)
        except ValueError as error:
            raise ContractError(f"the base layer {name} cannot be merged: {error}") from error
        if storage is not None:
            kinds.add(storage.name)
    if any(packed_stacks(module) for module in base.modules()):
        kinds.add("nf4")
    return sorted(kinds)


def _refuse_stacks(dtype: str, base_weights: Any) -> None:
    if base_weights is None:
        raise ContractError(
            f"dtype={dtype!r} would store the experts of this model as stacks in 4 bits, a layout that transformers cannot load; pass "
            "dtype='bf16', 'fp16' or 'fp32'"
        )
    raise ContractError(
        f"base_weights={short(str(base_weights))} replaces the weights of linear layers only, but the experts of this model are stacked "
        "and stored in 4 bits. Leave it out, or load the original model (load_base(PATH, 'bf16')) and the adapter (load_adapter), and merge that"
    )


def _check_min_recovery(value: Any) -> None:
    if value is None or value == "default":
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= 1:
        raise ValueError(
            f"min_recovery={value!r} is not a number up to 1; pass for example 0.99, or None to accept any recovery"
        )


def _reject(out: Path, found: Certificate) -> None:
    file = out.with_name(f"{out.name}.rejected.json")
    write_json(file, found.to_dict())
    worst = sorted(
        (layer for layer in found.layers if layer.recovery is not None),
        key=lambda layer: layer.recovery or 0.0,
    )
    lines = [f"{layer.name} ({layer.stored}): {layer.recovery:.4f}" for layer in worst]
    if found.recovery is None:
        raise ContractError(
            f"the adapter changes no output on the probe ({found.facts['probe']}), so there is nothing to compare; was it trained and "
            f"loaded? Nothing was left in {str(out)!r}; the certificate is in {file.name}. Pass min_recovery=None to merge it anyway."
        )
    raise ContractError(
        f"recovery={found.recovery:.4f} is below min_recovery={found.min_recovery}: the merged model keeps too little of the adapter's "
        f"effect. Layers with the smallest recovery:\n{listing(lines)}\nNothing was left in {str(out)!r}; the certificate is in "
        f"{file.name}. Pass a probe of inputs like those of the task, another dtype, or a smaller min_recovery."
    )
