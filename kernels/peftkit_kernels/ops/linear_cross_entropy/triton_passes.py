"""The steps of the cross entropy of an output head by Triton kernels around the library's GEMMs.

All rows are computed, and those without a target are masked, so that the host never waits for their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels.core.launch import cdiv
from peftkit_kernels.gemm import whole_rows
from peftkit_kernels.low_rank import LoRA, cast, passes
from peftkit_kernels.ops.linear_cross_entropy.passes import xent_rows_triton_
from peftkit_kernels.ops.linear_cross_entropy.reference import RowLoss
from peftkit_kernels.ops.linear_cross_entropy.torch_passes import Rows, hidden_grad, tiles


class TritonPasses:
    """The steps of ``ops.linear_cross_entropy.schedule``."""

    def select(self, hidden: Tensor, target: Tensor, ignore_index: int) -> Rows:
        """All rows; an ignored one gets a target that the kernel ignores."""
        return Rows(hidden, target.masked_fill(target == ignore_index, -1), None, None)

    def adapter(self, lora: LoRA, dtype: torch.dtype) -> LoRA:
        """The adapter as the other steps read it: both factors in the dtype in which it is computed."""
        wide = torch.promote_types(dtype, lora.A.dtype)
        return LoRA(cast(lora.A, wide), cast(lora.B, wide), lora.scale)

    def shrink(self, h: Tensor, A: Tensor) -> Tensor:
        """``s = h Aᵀ``."""
        return passes.shrink(h, A)

    def logits(
        self,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        s: Tensor | None,
        lora: LoRA | None,
    ) -> Tensor:
        """``h Wᵀ + bias + scale · s Bᵀ`` in the first V columns of ``[C, W]``. The update is written first, and the GEMM adds to it.

        Rows are padded to a multiple of 16 elements. So for any vocabulary (for example 50,257) the kernel and the library's GEMMs
        access them by 128 bits instead of element by element. A weight of another dtype is cast a tile at a time.
        """
        V = weight.shape[0]
        memory = h.new_empty(h.shape[0], 16 * cdiv(V, 16))
        z = memory[:, :V]
        bias = None if bias is None else cast(bias, h.dtype)
        added = s is not None and lora is not None
        if added:
            passes.expand(s, lora.B, lora.scale, bias=bias, out=z)
        whole = weight.dtype is h.dtype
        for tile in [slice(None)] if whole else tiles(*weight.shape):
            part, out = weight[tile].to(h.dtype).t(), z[:, tile]
            if added:
                out.addmm_(whole_rows(h), part)
            elif bias is None:
                torch.mm(whole_rows(h), part, out=out)
            else:
                torch.addmm(bias[tile], whole_rows(h), part, out=out)
        return memory

    def row_losses_(
        self,
        memory: Tensor,
        target: Tensor,
        row_loss: RowLoss,
        *,
        vocabulary: int,
        ignored: Tensor | None,
        factor: Tensor | None,
        want_grad: bool,
    ) -> Tensor:
        """The loss of each row; with ``want_grad`` the gradient, multiplied by ``factor``, is written over the logits."""
        del ignored  # their targets say it
        options = {"want_grad": want_grad, "factor": factor, "vocabulary": vocabulary}
        return xent_rows_triton_(memory, target, row_loss, **options)[0]

    def grads_at_output(
        self, dz: Tensor, s: Tensor, lora: LoRA, dB: Tensor | None, needs_ds: bool
    ) -> Tensor | None:
        """Add the chunk's part to ``dB``, and return ``ds = scale · dz B`` if needed, from the same pass over ``dz``."""
        if dB is None:
            return passes.grad_s(dz, lora.B, lora.scale) if needs_ds else None
        if needs_ds:
            part, ds = passes.grad_b_and_s(dz, s, lora.B, lora.scale, torch.float32)
        else:
            part, ds = passes.grad_b(dz, s, lora.scale, torch.float32), None
        dB.add_(part)
        return ds

    def add_grad_a_(self, dA: Tensor, ds: Tensor, h: Tensor) -> None:
        """Add ``dsᵀ h`` to ``dA``."""
        dA.add_(passes.grad_a(ds, h, torch.float32))

    def write_grad_hidden(
        self, out: Tensor, dz: Tensor, weight: Tensor, ds: Tensor | None, lora: LoRA | None
    ) -> None:
        """Fill ``out = dz W + ds A``."""
        update = None
        if lora is not None and ds is not None:
            update = passes.expand(ds, lora.A.t(), 1.0, dtype=dz.dtype)
        if not dz.dtype is weight.dtype is out.dtype:
            dh = hidden_grad(dz, weight)
            out.copy_(dh if update is None else dh.add_(update))
        elif update is None:
            torch.mm(whole_rows(dz), weight, out=out)
        else:
            torch.addmm(update, whole_rows(dz), weight, out=out)

    def scaled(self, dhidden: Tensor, factor: Tensor, places: Tensor | None) -> Tensor:
        """``factor · dhidden`` for a ``factor`` of ``Float32[]`` or ``Float32[M]``: one pass, rounded once."""
        del places  # all rows
        return torch.mul(dhidden, factor.reshape(-1, 1), out=torch.empty_like(dhidden))
