"""The public functions: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.checks import autocast_dtype, check_bias, check_lora
from peftkit_kernels.core.dispatch import Backend, choose_backend
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops.lora_linear.reference import lora_linear_reference
from peftkit_kernels.ops.lora_linear.schedule import Linear, Linears, linears
from peftkit_kernels.storage.fp8 import Float8Weight
from peftkit_kernels.storage.int8 import Int8Weight
from peftkit_kernels.storage.nf4 import NF4Weight
from peftkit_kernels.storage.quantized import QuantizedWeight, check_quantized


def nf4_linear(
    x: Tensor,
    q: NF4Weight,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A linear on a 4-bit weight with a low-rank update: ``y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ``.

    The weight is decoded into a buffer shared by all layers, once forward and once backward. Kept for backward: the tensors
    that ``lora_linear`` keeps, except the weight.

    Args:
        x: ``[..., K]``.
        q: The weight ``(N, K)``; it has no gradient.
        bias: ``[N]`` or ``None``.
        lora: The adapter or ``None``. It is computed in ``low_rank.adapter_dtype``: in float32 for float32 factors on a 16-bit
            ``x``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., N]`` in the dtype of ``x``, or of autocast if it is on.

    Raises:
        ValueError: Shapes or dtypes do not fit, or the backend cannot run.

    Source: Dettmers et al., 2023, arXiv:2305.14314.
    """
    return _linear("nf4_linear", NF4Weight, x, q, bias, lora, backend)


def int8_linear(
    x: Tensor,
    q: Int8Weight,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """``nf4_linear`` for an 8-bit weight. It multiplies in the dtype of ``x``; see ``int8_compute_linear`` for 8-bit products.

    Args:
        x: ``[..., K]``.
        q: The weight ``(N, K)``; it has no gradient.
        bias: ``[N]`` or ``None``.
        lora: The adapter or ``None``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., N]`` in the dtype of ``x``, or of autocast if it is on.

    Raises:
        ValueError: Shapes or dtypes do not fit, or the backend cannot run.
    """
    return _linear("int8_linear", Int8Weight, x, q, bias, lora, backend)


def fp8_linear(
    x: Tensor,
    q: Float8Weight,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A linear that multiplies in float8 (e4m3), with a low-rank update in full precision.

    ``y = x8 W8ᵀ · sx · sw + bias + scale · drop(x) Aᵀ Bᵀ``; the rows of ``x`` are quantised in the call: ``x8 = x / sx``,
    ``sx = absmax / 448``. The gradient of ``x`` is computed in the same way from ``dy ∘ sw``; those of the adapter and the bias
    are exact. GPUs from compute capability 8.9 on multiply in float8; other processors multiply the same codes in a wider dtype.
    Kept for backward: the tensors that ``lora_linear`` keeps, except the weight.

    Args:
        x: ``[..., K]``. A row with a value that is not finite spoils its own result only.
        q: The weight ``(N, K)``; it has no gradient.
        bias: ``[N]`` or ``None``.
        lora: The adapter or ``None``. It is computed in ``low_rank.adapter_dtype``: in float32 for float32 factors on a 16-bit
            ``x``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[..., N]`` in the dtype of ``x``, or of autocast if it is on.

    Raises:
        ValueError: Shapes or dtypes do not fit, ``x`` is float8 itself, or the backend cannot run.

    Source: Micikevicius et al., 2022, arXiv:2209.05433.
    """
    if x.dtype.itemsize < 2:
        # some models cast an input to the dtype of the next weight, which rounds it without a scale
        raise ValueError(
            f"x is {x.dtype}; pass float32 or a 16-bit dtype. If the model casts inputs to the dtype of the weight, keep this layer as it is"
        )
    return _linear("fp8_linear", Float8Weight, x, q, bias, lora, backend)


def _linear(
    op: str,
    kind: type,
    x: Tensor,
    q: QuantizedWeight,
    bias: Tensor | None,
    lora: LoRA | None,
    backend: Backend,
) -> Tensor:
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return _linear(op, kind, x.to(dtype), q, bias, lora, backend)
    check_quantized(x, q, kind)
    check_bias(bias, q, "bias")
    if lora is not None:
        check_lora(lora, q, "lora")
    A, B = (None, None) if lora is None else (lora.A, lora.B)
    rank = 0 if lora is None else lora.A.shape[0]
    chosen = choose_backend(op, backend, x, *q.tensors(), bias, A, B, rank=rank)
    if chosen == "reference":
        return lora_linear_reference(x, q, bias, lora)
    return linears(chosen, Linears(x, [Linear(q, bias, lora)]))[0]
