"""Lower the ranks of a trained LoRA: an ordinary adapter of PEFT with a smaller file."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.compress.low_rank import Update
from peftkit.compress.report import PrunedLayer, PruneReport
from peftkit.errors import ContractError, count, listing, short
from peftkit.interop.files import Checkpoint, read_checkpoint
from peftkit.rollback import writes_base_weights

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(?P<end>(\.weight)?)$")
_WEIGHTS = "adapter_model.safetensors"
_NOT_COPIED = ("adapter_config.json", _WEIGHTS, "adapter_model.bin", "README.md")
_UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "lora_bias", "megatron_core", "qalora_group_size", "runtime_config"),
    *("trainable_token_indices", "loftq_config", "layer_replication", "alora_invocation_tokens"),
}
"""Fields of a LoRA config with which the update of a layer is ``scale · B A``. Others must have no value."""


def prune_adapter(
    source: Path, folder: Path, rank: int | None, energy: float | None
) -> PruneReport:
    """Write an adapter with smaller ranks into a folder.

    The scale of each layer becomes part of its factors, so ``lora_alpha`` equals the rank in the new config.

    Args:
        source: Folder of the adapter.
        folder: An existing folder.
        rank: Largest rank of a layer, or ``None``.
        energy: Share of the squared norm of each layer's update that is kept, or ``None``.

    Raises:
        ContractError: It is no LoRA, or a kind whose update is not ``scale · B A``; or no rank would become smaller.
    """
    from safetensors.torch import save_file

    checkpoint = read_checkpoint(source)
    config = _require_plain(checkpoint)
    pairs = _factors(checkpoint)
    tensors = {n: t for n, t in checkpoint.tensors.items() if not _belongs(n, pairs)}
    layers, ranks = [], {}
    before = after = 0
    for module, (name_A, name_B) in pairs.items():
        lora_A, lora_B = checkpoint.tensors[name_A], checkpoint.tensors[name_B]
        own_rank = lora_A.shape[0]
        scale = _scale(config, module, own_rank)
        update = Update(lora_A.reshape(own_rank, -1), lora_B.reshape(-1, own_rank), scale)
        wanted = rank if energy is None else update.rank_for(energy)
        assert wanted is not None
        found = update.truncated(min(wanted, update.rank), lora_A.dtype)
        ranks[module] = found.A.shape[0]
        tensors[name_A] = _like(found.A, (ranks[module], *lora_A.shape[1:]))
        tensors[name_B] = _like(found.B, (lora_B.shape[0], ranks[module], *lora_B.shape[2:]))
        bias = f"{module_of(name_B)}.bias"
        if bias in tensors:
            # PEFT multiplies it with the scale too.
            tensors[bias] = (tensors[bias].double() * scale).to(tensors[bias].dtype)
        layers.append(PrunedLayer(module, own_rank, ranks[module], found.energy, found.error))
        before += lora_A.numel() + lora_B.numel()
        after += found.A.numel() + found.B.numel()
    setting = f"rank={rank}" if energy is None else f"energy={energy:g}"
    if all(layer.after == layer.before for layer in layers):
        largest = max(int(layer.before) for layer in layers)
        raise ContractError(
            f"{setting} lowers no rank of {source} (the largest is {largest}); give a smaller number"
        )
    save_file(tensors, str(folder / _WEIGHTS), metadata={"format": "pt"})
    written = _with_ranks(checkpoint.config, ranks)
    text = json.dumps(written, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    _copy_rest(source, folder)
    return PruneReport(str(source), "", setting, layers, numbers_before=before, numbers_after=after)


def module_of(name: str) -> str:
    """The name of a tensor without ``.weight``."""
    return name.removesuffix(".weight")


def _require_plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config, if each layer's update is ``scale · B A`` on the unchanged base model."""
    from types import SimpleNamespace

    from peft import LoraConfig

    config, where = checkpoint.config, checkpoint.folder
    if config.get("peft_type") != "LORA":
        raise ContractError(
            f"{where} is an adapter of the kind {config.get('peft_type')}, and only LoRA has ranks to lower; leave it as it is, or merge it "
            "(peftkit merge) and prune the model"
        )
    if config.get("use_dora"):
        raise ContractError(
            f"{where} is a DoRA: its magnitudes belong to the directions of the whole weight, which a smaller rank would turn; merge it "
            "(peftkit merge), or train with a smaller r"
        )
    if writes_base_weights(SimpleNamespace(**config)):
        raise ContractError(
            f"{where} has init_lora_weights={config['init_lora_weights']!r}, which computes other weights of the base model for another rank, "
            "so a pruned adapter would not fit; merge it (peftkit merge), or convert it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    defaults = {
        f.name: f.default for f in dataclasses.fields(LoraConfig) if f.name not in _UNDERSTOOD
    }
    odd = [n for n, v in config.items() if n not in _UNDERSTOOD and v and v != defaults.get(n)]
    if odd:
        raise ContractError(
            f"{where} has {odd[0]}={short(config[odd[0]])}, with which a layer computes something else than scale · B A; merge it (peftkit "
            "merge), or leave it as it is"
        )
    return config


def _factors(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """The names of both factors by the name of their module."""
    found, odd = {}, []
    for name, tensor in checkpoint.tensors.items():
        match = _FACTOR.match(name)
        if match is None:
            continue
        other = f"{match['module']}.lora_{match['embedding'] or ''}B{match['end']}"
        second = checkpoint.tensors.get(other)
        module = match["module"].removeprefix(_PREFIX)
        if second is None or second.shape[1] != tensor.shape[0] or module in found:
            odd.append(
                f"{name}: {list(tensor.shape)}, {None if second is None else list(second.shape)}"
            )
        found[module] = name, other
    if odd:
        raise ContractError(
            f"{checkpoint.weights} has {count(len(odd), 'pair')} of lora_A and lora_B that do not fit each other:\n{listing(odd)}\nGrouped "
            "convolutions cannot be pruned; save the adapter again if it has none."
        )
    if not found:
        raise ContractError(f"{checkpoint.weights} has no lora_A; name the folder of a LoRA")
    return found


def _belongs(name: str, pairs: dict[str, tuple[str, str]]) -> bool:
    return any(name in pair for pair in pairs.values())


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """The factor of a layer's update, as PEFT computes it.

    Raises:
        ContractError: The config says another rank than the file.
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    wanted = ranks.get(get_pattern_key(ranks, module), config.get("r"))
    if wanted != rank:
        raise ContractError(
            f"{module} has the rank {rank} in the file and {wanted} in adapter_config.json; the two belong to different adapters"
        )
    alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.reshape(shape).contiguous()


def _with_ranks(config: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    """The config with a scale of 1 and the rank of each layer."""
    largest = max(ranks.values())
    pattern: dict[str, int] = {}
    if len(set(ranks.values())) > 1:
        # A key also matches names that end with it, and the first match counts, so longer names come first.
        for module in sorted(ranks, key=lambda name: (-len(name), name)):
            pattern[re.escape(module)] = ranks[module]
    return config | {
        "r": largest,
        "lora_alpha": largest,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy the tokenizer and the other files."""
    for file in source.iterdir():
        if file.is_file() and file.name not in _NOT_COPIED and not file.name.startswith("."):
            shutil.copy2(file, folder / file.name)
