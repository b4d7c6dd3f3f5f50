"""Set the smallest weights of a model's linear layers to zero, one layer at a time, without changing the model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.keep import inner_linears
from peftkit.compress.report import PrunedLayer, PruneReport
from peftkit.errors import ContractError, short
from peftkit.merging.extras import write_config, write_generation_config, write_tokenizer
from peftkit.merging.files import ShardWriter, require_space
from peftkit.merging.mapped import load_mapped
from peftkit.merging.state import StateWriter, stored_bytes

PATTERNS = {"2:4": 4, "4:8": 8}
"""Patterns by name, with the number of neighbours of which half are zero."""


def prune_weights(
    source: str, folder: Path, sparsity: float | None, pattern: str | None, max_shard_size: int
) -> PruneReport:
    """Write a model with zeros into a folder.

    Args:
        source: Id on the Hub, or folder of a model.
        folder: An existing folder.
        sparsity: Share of zeros in each layer, or ``None``.
        pattern: A key of ``PATTERNS``, or ``None``.
        max_shard_size: Bytes in one file.

    Raises:
        ContractError: The model is quantised or cannot be read, or no layer would get more zeros.
    """
    _require_dense(source)
    model = load_mapped(source, None, strict=True)
    require_space(folder, stored_bytes(model, None))
    write_generation_config(folder, model)
    write_tokenizer(folder, model, None)
    writer = ShardWriter(folder, max_shard_size, sum(1 for _ in model.state_dict()))
    state = _SparseWriter(model, writer, sparsity, pattern)
    try:
        state.write_rest(None)
        writer.finish(sum(p.numel() for p in model.parameters()))
    finally:
        writer.abandon()
    write_config(
        folder, model, type(model), model.dtype, quantized=False, untied=bool(state.untied)
    )
    setting = f"pattern={pattern}" if sparsity is None else f"sparsity={sparsity:g}"
    if all(layer.after <= layer.before for layer in state.layers):
        raise ContractError(
            f"{setting} makes no zeros in {source}: {_why(state, model)}; use a larger share, or another model"
        )
    return PruneReport(
        source,
        "",
        setting,
        state.layers,
        state.kept,
        sum(before for before, _ in state.numbers),
        sum(after for _, after in state.numbers),
    )


def _why(state: _SparseWriter, model: nn.Module) -> str:
    if not state.layers:
        return f"{type(model).__name__} has no linear layer that can be pruned"
    least = min(layer.before for layer in state.layers)
    return f"each of its {len(state.layers)} layers has at least {least:.1%} already"


def _require_dense(source: str) -> None:
    from transformers import AutoConfig

    from peftkit.base.kinds import stored_kind

    try:
        stored = stored_kind(AutoConfig.from_pretrained(source))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ContractError(f"source={short(source)} cannot be loaded: {reason}") from error
    if stored is not None:
        raise ContractError(
            f"source={short(source)} is quantised ({stored}), and its codes have no zeros to set; prune the original model, then quantise it"
        )


def smallest(weight: Tensor, share: float) -> Tensor:
    """The weights with the smallest magnitudes: ``Bool[*weight.shape]``, exactly ``round(share · numel)`` of them.

    Of equal magnitudes the first count as smaller.

    Source: Han et al., 2015, arXiv:1506.02626.
    """
    sizes = weight.abs().float().flatten()
    number = round(share * sizes.numel())
    if not number:
        return torch.zeros_like(weight, dtype=torch.bool)
    limit = sizes.kthvalue(number).values
    found = sizes < limit
    equal = (sizes == limit).nonzero().flatten()
    found[equal[: number - int(found.sum())]] = True
    return found.view(weight.shape)


def smaller_half(weight: Tensor, group: int) -> Tensor:
    """The smaller half of each ``group`` neighbours of a row: ``Bool[N, K]``, for ``K`` divisible by ``group``.

    Source: Mishra et al., 2021, arXiv:2104.08378, for 2:4.
    """
    sizes = weight.abs().float().view(weight.shape[0], -1, group)
    order = sizes.argsort(dim=-1, stable=True)[..., : group // 2]
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, order, True).view(weight.shape)


class _SparseWriter(StateWriter):
    """Writes a model's tensors, those of its inner linear layers with zeros.

    Attributes:
        layers: The layers that were pruned.
        kept: Layers that were not, with the reason.
        numbers: For each pruned layer the numbers that were not zero before, and those that are not now.
    """

    def __init__(
        self, model: Any, writer: ShardWriter, sparsity: float | None, pattern: str | None
    ):
        super().__init__(model, None, writer)
        self._sparsity, self._pattern = sparsity, pattern
        names, self.kept = inner_linears(model)
        self._names = {id(model.get_submodule(name)): name for name in names}
        self.layers: list[PrunedLayer] = []
        self.numbers: list[tuple[int, int]] = []
        self._seen: set[int] = set()

    def entries_of(self, name: str, module: nn.Module, original: Any) -> dict[str, Tensor]:
        found = super().entries_of(name, module, original)
        own = self._names.get(id(module))
        if own is None:
            return found
        transposed = not isinstance(module, nn.Linear)  # GPT-2's Conv1D
        zeros = self._zeros(own, found["weight"].T if transposed else found["weight"])
        if zeros is None:
            return found
        pruned = found["weight"].masked_fill(zeros.T if transposed else zeros, 0)
        if id(module) not in self._seen:
            self._seen.add(id(module))
            self._note(own, found["weight"], pruned)
        return found | {"weight": pruned}

    def _zeros(self, name: str, weight: Tensor) -> Tensor | None:
        """The zeros of a weight ``[N, K]``, or ``None`` if the pattern does not fit it."""
        if self._pattern is None:
            assert self._sparsity is not None
            return smallest(weight, self._sparsity)
        group = PATTERNS[self._pattern]
        if weight.shape[1] % group:
            self.kept[name] = f"its inputs are no multiple of {group}"
            return None
        return smaller_half(weight.contiguous(), group)

    def _note(self, name: str, weight: Tensor, pruned: Tensor) -> None:
        norm = torch.linalg.vector_norm
        before, after = int(weight.count_nonzero()), int(pruned.count_nonzero())
        whole = norm(weight, dtype=torch.float64).item()
        lost = norm(weight - pruned, dtype=torch.float64).item()
        error = lost / whole if whole else 0.0
        size = weight.numel()
        self.numbers.append((before, after))
        self.layers.append(
            PrunedLayer(name, 1 - before / size, 1 - after / size, 1 - error**2, error)
        )
