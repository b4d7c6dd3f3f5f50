"""Bytes and FLOPs of torch ops, by the rule that ``traffic`` uses for Triton launches.

Every aten op counts as one GPU kernel that reads each distinct input element once and writes each output element once. A
fused op is usually a few Triton launches and a few calls of cuBLAS; the sum of both counts is comparable with the count of
eager torch. Meta tensors work: an 8192 x 4096 layer is counted in milliseconds. For an op of this package the torch ops inside
it are counted. In a plain path use ``torch.native_dropout``, which is one kernel on a GPU; ``F.dropout`` on the CPU is three ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_MOVES_NOTHING = frozenset(
    """view _unsafe_view reshape t transpose permute expand slice select split split_with_sizes unsqueeze squeeze detach
    alias as_strided empty empty_like new_empty empty_strided set_ resize_ lift_fresh _local_scalar_dense unbind chunk
    diagonal is_same_size sym_size narrow _reshape_alias unfold view_as expand_as""".split()
)
_ONLY_WRITES = frozenset(
    """zeros zeros_like ones ones_like full full_like fill_ zero_ new_zeros new_full new_ones arange rand randn rand_like
    randn_like bernoulli_ uniform_ normal_ randint""".split()
)
_PRODUCTS = frozenset("mm addmm addmm_".split())


class Op(NamedTuple):
    """One aten op. ``product`` has the sizes ``(M, N, K)`` of a product of matrices."""

    name: str
    read_bytes: int
    written_bytes: int
    flops: int
    product: tuple[int, int, int] | None = None


class EagerTraffic(TorchDispatchMode):
    """Lists every aten op that runs inside the ``with`` block and moves data."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    @property
    def unique_bytes(self) -> int:
        """The bytes that all ops must move."""
        return sum(op.read_bytes + op.written_bytes for op in self.ops)

    @property
    def flops(self) -> int:
        """FLOPs of all products."""
        return sum(op.flops for op in self.ops)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "peftkit":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with (
                self
            ):  # composite ops such as linear and matmul are not yet decomposed below autograd
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if name in _MOVES_NOTHING or not outputs:
            return result
        read = {key: value for key, value in kwargs.items() if key != "out"}
        inputs = [t for t in tree_leaves((args, read)) if isinstance(t, Tensor)]
        self.ops.append(
            Op(
                name,
                _read_bytes(name, inputs, kwargs),
                sum(touched_bytes(t) for t in outputs),
                _flops(func, name, args, kwargs, inputs, result),
                _product(inputs, outputs[0]) if name in _PRODUCTS else None,
            )
        )
        return result


def _read_bytes(name: str, inputs: list[Tensor], kwargs: dict[str, Any]) -> int:
    if name in _ONLY_WRITES:
        return 0
    if name == "copy_":
        return touched_bytes(inputs[1])
    distinct = {(t.data_ptr() or id(t), t.shape, t.stride()): t for t in inputs}
    read = sum(touched_bytes(t) for t in distinct.values())
    if name in ("addmm", "addmm_", "baddbmm") and kwargs.get("beta", 1) == 0:
        read -= touched_bytes(inputs[0])
    return read


def _flops(func: Any, name: str, args: tuple, kwargs: dict, inputs: list, result: Any) -> int:
    if name == "addmm_":
        return 2 * inputs[1].numel() * inputs[2].shape[1]
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


def _product(inputs: list[Tensor], result: Tensor) -> tuple[int, int, int]:
    M, N = result.shape
    return M, N, inputs[-1].shape[0]


def touched_bytes(t: Tensor) -> int:
    """Bytes of the distinct elements of a tensor; an expanded element counts once."""
    n = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        n *= size if stride or not size else 1
    return n * t.element_size()
