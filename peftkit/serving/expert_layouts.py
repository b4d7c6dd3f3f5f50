"""The two layouts of LoRA on a mixture of experts, and exact rewriting between them.

Stacked, PEFT's ``target_parameters``: one pair for all experts of a layer, ``lora_A [E·R, K]`` with the rank fastest and
``lora_B [N, R·E]`` with the expert fastest; the keys of ``gate_up_proj`` end in ``experts.base_layer``, those of ``down_proj`` in
``experts``. One pair for each expert, as in checkpoints of transformers 4: ``experts.0.gate_proj.lora_A [R, K]`` and so on.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit.errors import ContractError
from peftkit.serving.rows import Key, module_rank, module_scale, parameter_name

Pair = tuple[Tensor, Tensor]


class Form(NamedTuple):
    """The rank of a pair, and the factor of its product."""

    rank: int
    scale: float


@dataclass(frozen=True)
class Names:
    """The names of one architecture's experts in both layouts.

    Attributes:
        parts: For each stacked parameter the linear layers of one expert that it consists of, in the order of their rows:
            ``{"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}``.
        renamed: Parts of module names with one pair for each expert, and with stacked experts:
            ``((".block_sparse_moe.", ".mlp."),)``.
    """

    parts: dict[str, tuple[str, ...]]
    renamed: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, model_type: str) -> Names:
        """Read the names from transformers' conversion of older checkpoints.

        Raises:
            ContractError: This architecture has no checkpoints with separate weights for each expert.
        """
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        parts, renamed = {}, []
        for step in get_checkpoint_conversion_mapping(model_type) or ():
            if isinstance(step, WeightConverter):
                stacked = step.target_patterns[0].rpartition(".")[2]
                single = [
                    re.fullmatch(r".*\.?experts\.\*\.(\w+)\.weight", source)
                    for source in step.source_patterns
                ]
                if all(single):
                    parts[stacked] = tuple(match[1] for match in single if match)
            elif type(step) is WeightRenaming:
                old, new = step.source_patterns[0], step.target_patterns[0]
                if re.fullmatch(r"\.\w+\.", old) and re.fullmatch(r"\.\w+\.", new):
                    renamed.append((old, new))
        if not parts:
            raise ContractError(
                f"{model_type} has no layout with one pair for each expert: its checkpoints are stacked. Servers read the "
                "stacked layout for it; keep the adapter as it is"
            )
        return cls(parts, tuple(renamed))


def to_one_pair_per_expert(
    config: dict[str, Any], tensors: dict[str, Tensor], names: Names
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Form]]:
    """Rewrite stacked pairs. Each pair keeps its rank and scale.

    Args:
        config: Content of ``adapter_config.json``.
        tensors: Tensors with PEFT's keys.
        names: Names of the architecture.

    Returns:
        The config, still with the original's rank and scale; the tensors; and the ranks and scales of the new pairs by module.

    Raises:
        ContractError: There are no stacked experts, or their sizes contradict the config.
    """
    stacks = _pairs(tensors, lambda key: key.is_stack)
    if not stacks:
        raise ContractError(
            "experts='per-expert': the adapter has no stacked experts (keys that end in experts.lora_A.weight); it adapts none, "
            "or has one pair for each expert already"
        )
    out = {
        _renamed(name, names, back=True): tensor
        for name, tensor in tensors.items()
        if not Key.parse(name).is_stack
    }
    leaves: set[str] = set()
    forms: dict[str, Form] = {}
    for module, pair in stacks.items():
        parameter = parameter_name(config, module)
        parts = names.parts.get(parameter.rpartition(".")[2])
        if parts is None:
            raise ContractError(
                f"{parameter}: unknown parameter; this architecture's experts have {', '.join(names.parts)}"
            )
        container = _renamed(module.removesuffix(".base_layer"), names, back=True)
        scale = module_scale(config, module)
        for expert, single in enumerate(unstack(pair, module_rank(config, module))):
            for part, (A, B) in zip(parts, split_rows(single, len(parts)), strict=True):
                place = f"{container}.{expert}.{part}"
                out[f"base_model.model.{place}.lora_A.weight"] = A
                out[f"base_model.model.{place}.lora_B.weight"] = B
                forms[place] = Form(A.shape[0], scale)
        leaves.update(parts)
    named = config.get("target_parameters") or ()
    others = [name for name in named if name.rpartition(".")[2] not in names.parts]
    listed = config.get("target_modules") or []
    kept = leaf_names(out) if isinstance(listed, str) else set(listed)
    new = {"target_parameters": others or None, "target_modules": sorted(kept | leaves)}
    return config | new, out, forms


def to_stacked(
    config: dict[str, Any], tensors: dict[str, Tensor], names: Names
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rewrite the pairs of single experts as stacks. Linear layers with different ``lora_A`` become one pair of higher rank.

    Args:
        config: Content of ``adapter_config.json``.
        tensors: Tensors with PEFT's keys.
        names: Names of the architecture.

    Raises:
        ContractError: There are no pairs of single experts, some are missing, or their scales differ within one stack.
    """
    singles = _pairs(tensors, lambda key: key.is_one_expert)
    if not singles:
        raise ContractError(
            "experts='stacked': the adapter has no pairs of single experts (keys such as experts.0.gate_proj.lora_A.weight); it "
            "adapts none, or is stacked already"
        )
    grouped: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for module in singles:
        container, expert, part = _place(module)
        grouped[container][expert][part] = module
    out = {
        _renamed(name, names): tensor
        for name, tensor in tensors.items()
        if not Key.parse(name).is_one_expert
    }
    forms: dict[str, dict[str, Form]] = defaultdict(dict)
    for container, experts in grouped.items():
        new = _renamed(container, names)
        if sorted(experts) != list(range(len(experts))):
            raise ContractError(
                f"{container}: experts {sorted(experts)} are adapted, not all; a stack needs a pair for each"
            )
        found = {part for expert in experts.values() for part in expert}
        adapted = [name for name, parts in names.parts.items() if found & set(parts)]
        order = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in adapted]
        for parameter in order:
            (A, B), scale = _stack(experts, singles, names.parts[parameter], config, container)
            inner = ".base_layer" if len(order) > 1 and parameter == order[0] else ""
            out[f"base_model.model.{new}{inner}.lora_A.weight"] = A
            out[f"base_model.model.{new}{inner}.lora_B.weight"] = B
            short = ".".join([*new.split(".")[-2:], parameter])
            forms[short][f"{new}.{parameter}"] = Form(A.shape[0] // len(experts), scale)
    left = leaf_names(out)
    listed = config.get("target_modules") or []
    kept = left if isinstance(listed, str) else {n for n in listed if n.rpartition(".")[2] in left}
    known = list(dict.fromkeys([*(config.get("target_parameters") or ()), *forms]))
    new_config = config | {"target_parameters": known, "target_modules": sorted(kept)}
    return _with_patterns(new_config, forms), out


def unstack(pair: Pair, rank: int) -> list[Pair]:
    """The pairs of the experts in a stack.

    Args:
        pair: ``[E·R, K]`` and ``[N, R·E]``.
        rank: R.

    Returns:
        For each expert ``[R, K]`` and ``[N, R]``.

    Raises:
        ContractError: The sizes do not fit the rank.
    """
    A, B = pair
    if A.shape[0] % rank or B.shape[1] != A.shape[0]:
        raise ContractError(
            f"stacked factors of shapes {list(A.shape)} and {list(B.shape)} do not consist of pairs of rank {rank}; correct r and "
            "rank_pattern in adapter_config.json"
        )
    count = A.shape[0] // rank
    return list(zip(A.view(count, rank, -1), B.view(-1, rank, count).permute(2, 0, 1), strict=True))


def stack(pairs: list[Pair]) -> Pair:
    """The inverse of ``unstack``."""
    A = torch.stack([a for a, _ in pairs])
    B = torch.stack([b for _, b in pairs]).permute(1, 2, 0)
    return A.flatten(0, 1), B.flatten(1, 2)


def split_rows(pair: Pair, count: int) -> list[Pair]:
    """Split the outputs of a pair into ``count`` equal parts.

    A block-diagonal ``lora_B`` is split together with ``lora_A``, so that each part has a rank of its own; otherwise all parts
    have the same ``lora_A``.
    """
    A, B = pair
    if count == 1:
        return [pair]
    rows = B.chunk(count)
    if A.shape[0] % count == 0:
        blocks = [part.chunk(count, dim=1) for part in rows]
        off = [blocks[i][j] for i in range(count) for j in range(count) if i != j]
        if not any(block.any() for block in off) and B.any():
            return list(zip(A.chunk(count), (blocks[i][i] for i in range(count)), strict=True))
    return [(A, part) for part in rows]


def join_rows(pairs: list[Pair]) -> Pair:
    """The inverse of ``split_rows``."""
    first = pairs[0][0]
    if len(pairs) == 1:
        return pairs[0]
    if all(torch.equal(first, A) for A, _ in pairs):
        return first, torch.cat([B for _, B in pairs])
    return torch.cat([A for A, _ in pairs]), torch.block_diag(*(B for _, B in pairs))


def _stack(
    experts: dict[int, dict[str, str]],
    singles: dict[str, Pair],
    parts: tuple[str, ...],
    config: dict[str, Any],
    container: str,
) -> tuple[Pair, float]:
    """One stack and its scale."""
    joined, scales = [], set()
    for expert in range(len(experts)):
        missing = [part for part in parts if part not in experts[expert]]
        if missing:
            raise ContractError(
                f"{container}.{expert}: {missing[0]} is not adapted, but {', '.join(parts)} share one stack"
            )
        modules = [experts[expert][part] for part in parts]
        scales.update(module_scale(config, module) for module in modules)
        joined.append(join_rows([singles[module] for module in modules]))
    if len(scales) > 1:
        raise ContractError(
            f"{container}: its experts have the scales {sorted(scales)}, but a stack has one; pass uniform=True (--uniform)"
        )
    sizes = {A.shape[0] for A, _ in joined}
    if len(sizes) > 1:
        widest = max(sizes)  # some experts have equal factors lora_A and others do not
        joined = [pad(pair, widest) for pair in joined]
    return stack(joined), scales.pop()


def pad(pair: Pair, rank: int) -> Pair:
    """Add zeros to a pair until it has this rank. The product does not change."""
    A, B = pair
    more = rank - A.shape[0]
    return (
        torch.cat([A, A.new_zeros(more, *A.shape[1:])]),
        torch.cat([B, B.new_zeros(B.shape[0], more, *B.shape[2:])], dim=1),
    )


def leaf_names(tensors: dict[str, Tensor]) -> set[str]:
    """The last parts of the names of adapted modules, except stacked experts."""
    keys = [Key.parse(name) for name in tensors]
    return {key.leaf for key in keys if key.role and not key.is_stack}


def _pairs(tensors: dict[str, Tensor], wanted: Any) -> dict[str, Pair]:
    """The pairs by module name, for keys that ``wanted`` accepts."""
    keys = {k.module: k for k in map(Key.parse, tensors) if k.role == "lora_A" and wanted(k)}
    pairs = {}
    for module, key in keys.items():
        other = key.name.replace(".lora_A.", ".lora_B.")
        if other not in tensors:
            raise ContractError(f"{key.name} has no counterpart {other}; save the adapter again")
        pairs[module] = (tensors[key.name], tensors[other])
    return pairs


def _place(module: str) -> tuple[str, int, str]:
    found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", module)
    if found is None:
        raise ContractError(f"{module}: expected a name such as ...experts.0.gate_proj")
    return found[1], int(found[2]), found[3]


def _renamed(name: str, names: Names, back: bool = False) -> str:
    for old, new in names.renamed:
        name = name.replace(new, old) if back else name.replace(old, new)
    return name


def _with_patterns(config: dict[str, Any], forms: dict[str, dict[str, Form]]) -> dict[str, Any]:
    """The config with patterns for the stacked parameters whose rank or alpha differs from ``r`` and ``lora_alpha``.

    Args:
        config: Content of ``adapter_config.json``.
        forms: By the end of the parameters' names: by their whole names, the forms.
    """
    ranks, alphas = {}, {}
    for short, by_name in forms.items():
        same = len(set(by_name.values())) == 1
        for name, form in by_name.items():
            pattern = re.escape(short if same else name)
            ranks[pattern] = form.rank
            root = form.rank**0.5 if config.get("use_rslora") else form.rank
            alphas[pattern] = form.scale * root
    old_ranks, old_alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    # An old pattern may match the new names, so then every new name has a pattern of its own.
    new_ranks = {n: r for n, r in ranks.items() if old_ranks or r != config["r"]}
    new_alphas = {
        n: a for n, a in alphas.items() if old_alphas or not math.isclose(a, config["lora_alpha"])
    }
    return config | {
        "rank_pattern": {**new_ranks, **old_ranks},
        "alpha_pattern": {**new_alphas, **old_alphas},
    }
