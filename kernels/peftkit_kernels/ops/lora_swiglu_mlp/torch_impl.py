"""``lora_swiglu_mlp`` from torch ops: keeps x, gate, up and the rank-r projections; recomputes ``h``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit_kernels import low_rank
from peftkit_kernels.core import recompute
from peftkit_kernels.core.autograd import once_differentiable
from peftkit_kernels.gemm import addmm_nn, matmul_nn
from peftkit_kernels.low_rank import rows
from peftkit_kernels.ops.lora_linear.torch_impl import add_update_grad, project, unflatten
from peftkit_kernels.ops.lora_qkv.torch_impl import Numbers, make_loras, shared_grads, shared_shrink
from peftkit_kernels.ops.lora_swiglu_mlp.activation import gate_backward, gated
from peftkit_kernels.storage.quantized import dense, weights_of


class Call(NamedTuple):
    """The arguments of the autograd function that are not tensors."""

    numbers: tuple[Numbers | None, ...]
    storage: list[int]
    act: str


class LoRASwiGLUMLP(torch.autograd.Function):
    """With the outputs ``gate`` and ``up`` of the two projections of x, and ``h = act(gate) ∘ up``:

    ``dh = dy Wd + mask ∘ (dsd Ad)``, ``d_up = dh ∘ act(gate)``, ``d_gate = dh ∘ up ∘ act'(gate)``, and the chain rule of
    ``lora_linear`` for each of the three linears.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *tensors: Tensor | None) -> Tensor:
        biases, As, Bs = (tensors[i * 3 : i * 3 + 3] for i in range(3))
        stored: Any = tensors[9:]
        weights = weights_of(stored, call.storage)
        loras = make_loras(As, Bs, call.numbers)
        flat = rows(x)
        s_gate, s_up = shared_shrink(flat, loras[:2])
        gate = project(flat, weights[0], biases[0], s_gate, loras[0])
        up = project(flat, weights[1], biases[1], s_up, loras[1])
        h = gated(gate, up, call.act)
        (s_down,) = shared_shrink(h, loras[2:])
        y = project(h, weights[2], biases[2], s_down, loras[2])
        needs = ctx.needs_input_grad[2:]
        ctx.recompute_x, x_parts = recompute.saved_for(x, needs[3] or needs[4])
        ctx.save_for_backward(gate, up, *As, *Bs, s_gate, s_up, s_down, *stored, *x_parts)
        ctx.call, ctx.shape, ctx.stored = call, x.shape, len(stored)
        return unflatten(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *saved = ctx.saved_tensors
        As, Bs, s = (saved[i * 3 : i * 3 + 3] for i in range(3))
        end = 9 + ctx.stored
        weights = weights_of(saved[9:end], ctx.call.storage)
        loras = make_loras(As, Bs, ctx.call.numbers)
        needs = ctx.needs_input_grad[2:]
        dbias, dA, dB, ds = ([None] * 3 for _ in range(4))

        def grads_at_output(i: int, grad: Tensor) -> None:
            """The gradients of linear ``i`` that need only the gradient at its output."""
            if needs[i]:
                dbias[i] = grad.sum(0)
            if loras[i] is not None:
                ds[i] = low_rank.grad_s(grad, Bs[i], loras[i].scale)
                if needs[6 + i]:
                    dB[i] = low_rank.grad_b(grad, s[i], loras[i].scale, Bs[i])

        dy = rows(dy)
        grads_at_output(2, dy)
        dh = matmul_nn(dy, dense(weights[2], dy.dtype))
        if loras[2] is not None:
            dh = add_update_grad(dh, ds[2], loras[2])
        d_gate, d_up, h = gate_backward(dh, gate, up, ctx.call.act)
        if needs[5]:
            dA[2] = low_rank.grad_a(ds[2], h, As[2].dtype, loras[2].p, loras[2].seed)
        # only dA of the down projection needs h; free it before the other gradients are computed
        del h
        grads_at_output(0, d_gate)
        grads_at_output(1, d_up)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = matmul_nn(d_gate, dense(weights[0], d_gate.dtype))
            dx = addmm_nn(dx, d_up, dense(weights[1], d_up.dtype))
        x = recompute.restore(ctx.recompute_x, saved[end:])
        flat = None if x is None else rows(x)
        dx, dA[:2] = shared_grads(dx, flat, ds[:2], loras[:2])
        return (
            None,
            None if dx is None else unflatten(dx, ctx.shape),
            *dbias,
            *dA,
            *dB,
            *[None] * ctx.stored,
        )
