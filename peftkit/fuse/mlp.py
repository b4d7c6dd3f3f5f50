"""Gated MLPs, ``down(act(gate(x)) ∘ up(x))``, as one op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.fuse.compute import LinearParts, draw_seeds, gated_mlp, gated_mlp_backend
from peftkit.fuse.experts import FusedParamWrapper
from peftkit.fuse.linear import FusedLoRA, different_dtypes, is_quantized, plan_linear
from peftkit.fuse.plan import Fused, Reason, decline, forget_declined
from peftkit.fuse.recognise import seal_gated_mlp
from peftkit.fuse.seal import Seal
from peftkit.swap import swap_in, swap_out
from peftkit_kernels.core.dispatch import is_transformed
from peftkit_kernels.core.launch import on_gpu
from peftkit_kernels.core.views import as_one_view

METHOD = "gated MLP"

_NAMES = ("gate_proj", "up_proj", "down_proj")
_NAMES_JOINT = ("gate_up_proj", "down_proj")

_TRANSFORMED = Reason("under torch.compile and torch.func the module runs its own operations")


class FusedGatedMLP(Fused):
    """The forward of a gated MLP as one ``lora_swiglu_mlp``; mixed into the module's own class."""

    peftkit_method = METHOD
    _peftkit_names: tuple[str, ...]
    _peftkit_seal: Seal

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``down(act(gate(x)) ∘ up(x))`` for ``x [..., hidden_size]``. With other arguments the module's own forward runs."""
        if len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        x = args[0]
        parts = self.peftkit_plan(x)
        if isinstance(parts, Reason):
            return super().forward(x)
        share_weights(x, parts[:2])
        return gated_mlp(x, [draw_seeds(part) for part in parts], self._peftkit_seal.answer)

    def peftkit_plan(self, x: Tensor) -> list[LinearParts] | Reason:
        """Gate, up and down as tensors, or why the module's own forward runs."""
        if is_transformed():
            return _TRANSFORMED  # before the seal, which torch.compile cannot trace
        broken = self._peftkit_seal.broken(self)
        if broken is not None:
            return broken
        parts = []
        for name in self._peftkit_names:
            part = plan_linear(self._modules[name], x)
            if isinstance(part, Reason):
                return type(part)(f"{name}: {part}")
            if part.magnitude is not None and part.lora is not None and part.lora.p:
                return Reason(
                    f"{name}: DoRA with dropout cannot be fused across the layers of an MLP; each linear runs separately"
                )
            parts.append(part)
        reason = different_dtypes(parts)
        if reason is not None:
            return reason
        return parts if len(parts) == 3 else _halves(*parts)

    def peftkit_example(self) -> Tensor:
        """One row of input with the dtype of its linears and the device of the first weight."""
        linears: list[Any] = [self._modules[name] for name in self._peftkit_names]
        first = getattr(linears[0], "base_layer", linears[0])
        x = first.weight.new_empty(1, first.in_features)
        fused = [linear for linear in linears if isinstance(linear, FusedLoRA)]
        return x.to(fused[0].peftkit_example().dtype) if fused else x

    def peftkit_backend(self, x: Tensor, parts: list[LinearParts]) -> str:
        """``"torch"`` or ``"triton"``."""
        return gated_mlp_backend(x, parts)


def fuse_gated_mlps(model: nn.Module) -> int:
    """Fuse every module that computes exactly a gated MLP; returns their number. The reason is kept on modules that are not fused."""
    count = 0
    for module in list(model.modules()):
        is_fused = isinstance(module, FusedGatedMLP)
        names = _names(module)
        if names is None or (is_fused and module._peftkit_seal.broken(module) is None):
            continue
        seal = _seal_or_reason(module, names)
        if isinstance(seal, Reason):
            if is_fused:
                swap_out(module, FusedGatedMLP)
            decline(module, METHOD, seal)
            continue
        forget_declined(module)
        if not is_fused:
            swap_in(module, FusedGatedMLP)
            count += 1
        module.__dict__.update(_peftkit_names=names, _peftkit_seal=seal)
    return count


def _seal_or_reason(module: nn.Module, names: tuple[str, ...]) -> Seal | Reason:
    for name in names:
        if not _is_linear(module._modules[name]):
            kind = type(getattr(module._modules[name], "base_layer", module._modules[name]))
            return Reason(f"{name} is a {kind.__name__}, so each linear runs separately")
    seal = seal_gated_mlp(module, names)
    return seal.answer if isinstance(seal.answer, Reason) else seal


def _names(module: nn.Module) -> tuple[str, ...] | None:
    """The names of gate, up and down, or of a joint gate-and-up projection and down; ``None`` for any other module."""
    if isinstance(
        module, nn.ModuleDict
    ):  # torch keeps the parametrisations of experts' stacks in one
        return None
    for names in (_NAMES, _NAMES_JOINT):
        if all(names_ in module._modules for names_ in names):
            return names
    return None


def _is_linear(module: Any) -> bool:
    if isinstance(module, FusedParamWrapper):
        module = module.base_layer  # LoRA on the bare weight of a linear
    return type(module) is nn.Linear or isinstance(module, FusedLoRA) or is_quantized(module)


def _halves(joint: LinearParts, down: LinearParts) -> list[LinearParts] | Reason:
    """Gate and up of a joint projection as two linears, and down."""
    if joint.lora is not None and joint.lora.p > 0.0:
        return Reason(
            "the joint projection of gate and up has one dropout mask, but two linears would draw two masks; each linear runs "
            "separately"
        )
    if not isinstance(joint.weight, Tensor):
        return Reason(
            "the joint projection of gate and up is quantised, and its halves cannot be read separately; each linear runs separately"
        )
    size = joint.weight.shape[0] // 2
    return [_rows(joint, slice(0, size)), _rows(joint, slice(size, None)), down]


def _rows(part: LinearParts, rows: slice) -> LinearParts:
    lora = part.lora
    return LinearParts(
        part.weight[rows],
        None if part.bias is None else part.bias[rows],
        None if lora is None else replace(lora, B=lora.B[rows]),
        None if part.magnitude is None else part.magnitude[rows],
    )


def share_weights(x: Tensor, parts: Sequence[LinearParts]) -> None:
    """Move the weights of gate and up into one buffer if that is safe; ``x`` is the input of the call."""
    weights = [part.weight for part in parts]
    if _may_move_weights(x) and all(isinstance(weight, Tensor) for weight in weights):
        share_buffer(weights)


def _may_move_weights(x: Tensor) -> bool:
    """Whether it is safe to move weights into a shared buffer.

    It is not safe if several processes share the work, because they have their own buffers. It is not safe either while a CUDA
    graph is captured, because the graph would repeat the move in every replay.
    """
    if not on_gpu(x.device) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


@torch.inference_mode(mode=False)
@torch.no_grad()
def share_buffer(weights: Sequence[Tensor]) -> None:
    """Move frozen weights of one width into one buffer, so that one product can use all of them; their values do not change.

    Nothing happens if they share a buffer already, if they differ in dtype, device or width, or if one is a view of a larger
    tensor. Moving or copying the model separates the weights again, which only makes the MLP slower.
    """
    if (
        as_one_view(weights, 0) is not None
        or len({(w.dtype, w.device, w.shape[1]) for w in weights}) > 1
    ):
        return
    if all(
        type(w) is nn.Parameter
        and not w.is_inference()
        and w.is_contiguous()
        and w.untyped_storage().nbytes() == w.nbytes
        for w in weights
    ):
        buffer = torch.cat([w.data for w in weights])
        for weight, part in zip(weights, buffer.split([len(w) for w in weights]), strict=True):
            weight.data = part
