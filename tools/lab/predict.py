"""Predicted times of the ops on GPUs that need not be present, compared with eager torch and with the frozen layer alone.

An op is a list of kernels: the launches that it makes at these sizes on that GPU, recorded on meta tensors, and the torch ops
between them. Eager torch is the list of its aten ops. The time of a kernel is the longer of the times for its products and for
its bytes (a roofline with the efficiencies of ``devices``):

* A launch moves each of its arguments once, and those that it changes in place twice; ``volumes`` checks this rule.
* A product of matrices moves the bytes that miss the L2 cache of the GPU (``l2sim``); any other torch op moves its arguments.

Nothing here is a measurement. Gaps between launches, of which eager torch has more, are not counted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lab.case import Case, Sizes, step
from lab.cases import OPERATIONS, build, chosen
from lab.devices import DEVICES, Device, roofline_seconds
from lab.eager import EagerTraffic, Op, touched_bytes
from lab.inventory import OPS
from lab.l2sim import Tiling, gemm_volume
from peftkit_kernels.core.launch import Launch, Target, recording

SIZES: dict[str, tuple[Sizes, ...]] = {
    "lora_linear": (Sizes(8192, 4096, 4096), Sizes(8192, 4096, 1024)),
    "lora_qkv": (Sizes(8192, 4096, 4096),),
    "lora_swiglu_mlp": (Sizes(8192, 4096, 14336),),
    "linear_cross_entropy": (Sizes(8192, 4096, 128256), Sizes(8192, 576, 49152)),
    "dora_scale": (Sizes(8192, 4096, 4096), Sizes(8192, 4096, 14336)),
}
"""The sizes for which an op is predicted. An op that is not listed is predicted at the first sizes of ``lora_linear``."""
_DROPOUT = "lora_linear", "lora_qkv", "lora_swiglu_mlp"


class Work(NamedTuple):
    """The work of a launch besides moving each argument once.

    Attributes:
        product: The names of the arguments M, N and K if the launch is a product of large matrices.
        rate: The rate of that product, in units of the 16-bit rate.
        in_place: Arguments that are both read and written, each with the constant that must be true (``""``: always).
        bounded: Whether the accessed part of an argument depends on the data, so that the rule is an upper bound.
    """

    product: tuple[str, ...] = ()
    rate: float = 1.0
    in_place: tuple[tuple[str, str], ...] = ()
    bounded: bool = False


WORK: dict[str, Work] = {
    "gemm_lora_kernel": Work(product=("M", "N", "K")),
    "expand_kernel": Work(in_place=(("y_ptr", "ADD"),)),
    "norm_forward_kernel": Work(in_place=(("x_ptr", "ADD"),)),
    "rotate_kernel": Work(in_place=(("q_ptr", ""), ("k_ptr", ""))),
    "xent_kernel": Work(in_place=(("z_ptr", "GRAD"),)),
    "int8_gemm_kernel": Work(product=("M", "N", "K"), rate=2.0),
    # an upper bound: memory for one more partial sum for every adapter, which adapters without rows do not use
    "grouped_tall_kernel": Work(bounded=True),
    "grouped_sum_kernel": Work(bounded=True),
}
"""By the name of the kernel. A rank-r pass has no product here, because at every supported rank its bytes take longer than its products."""


class Kernel(NamedTuple):
    """One kernel of a list: the least bytes it must move, the bytes it moves to and from DRAM, and its FLOPs in units of 16-bit FLOPs."""

    name: str
    unique_bytes: int
    dram_bytes: int
    flops: float
    triton_gemm: bool = False

    def seconds(self, device: Device) -> float:
        """Predicted time by the roofline."""
        return roofline_seconds(device, self.flops, self.dram_bytes, triton_gemm=self.triton_gemm)


def arguments_of(launch: Launch) -> dict[str, Any]:
    """The arguments of a recorded launch by name, constants included."""
    names, values = inspect.signature(launch.kernel.fn).parameters, iter(launch.arguments)
    given = launch.constants
    return {name: given[name] if name in given else next(values) for name in names}


def moved_bytes(kernel: str, arguments: dict[str, Any]) -> int:
    """Unique bytes of a launch by the rule: each tensor once, or twice if it is changed in place."""
    in_place = WORK.get(kernel, Work()).in_place
    twice = {name for name, flag in in_place if not flag or arguments[flag]}
    return sum(
        touched_bytes(value) * (2 if name in twice else 1)
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    )


def launch_kernel(launch: Launch, device: Device) -> Kernel:
    """The bytes and FLOPs of a launch."""
    name, arguments = launch.kernel.fn.__name__, arguments_of(launch)
    unique = moved_bytes(name, arguments)
    work = WORK.get(name, Work())
    if not work.product:
        return Kernel(name, unique, unique, 0)
    M, N, K = (arguments[size] for size in work.product)
    blocks = (arguments[f"BLOCK_{axis}"] for axis in "MNK")
    tiling = Tiling(*blocks, group_m=arguments.get("GROUP", 1), programs=device.sms)
    itemsize = next(v for v in arguments.values() if isinstance(v, Tensor)).element_size()
    # the operands of the product may be read several times, all other arguments once
    once = itemsize * (M * K + N * K + M * N)
    dram = unique - once + _volume(M, N, K, itemsize, device.l2_mib, tiling, False)
    return Kernel(name, unique, dram, 2 * M * N * K / work.rate, True)


def op_kernel(op: Op, device: Device) -> Kernel:
    """The bytes and FLOPs of a torch op."""
    unique = op.read_bytes + op.written_bytes
    if op.product is None:
        return Kernel(op.name, unique, unique, op.flops)
    M, N, K = op.product
    added = op.name == "addmm_"
    once = M * K + N * K + M * N * (2 if added else 1)
    itemsize = round(unique / once)
    tiling = Tiling(programs=device.sms)
    dram = _volume(M, N, K, max(itemsize, 1), device.l2_mib, tiling, added)
    return Kernel(op.name, unique, max(dram, unique), op.flops)


@functools.cache
def _volume(
    M: int, N: int, K: int, itemsize: int, l2_mib: float, tiling: Tiling, accumulates: bool
) -> int:
    volume = gemm_volume(
        M, N, K, itemsize=itemsize, l2_mib=l2_mib, tiling=tiling, accumulates=accumulates
    )
    return volume.total_bytes


def kernels_of_op(case: Case, device: Device) -> list[Kernel]:
    """The kernels that an op runs on ``device``, forward and backward; ``case`` is on the meta device."""
    with recording(Target(device.arch, device.sms)) as launches, EagerTraffic() as torch_ops:
        case.run("triton")
    found = [launch_kernel(launch, device) for launch in launches]
    return found + [op_kernel(op, device) for op in torch_ops.ops]


def kernels_of_torch(
    function: Callable[[dict[str, Tensor]], Any], case: Case, device: Device
) -> list[Kernel]:
    """The kernels that ``function`` of the case's tensors runs in eager torch, forward and backward."""
    with EagerTraffic() as torch_ops:
        step(function, case.leaves)
    return [op_kernel(op, device) for op in torch_ops.ops]


def seconds(kernels: list[Kernel], device: Device) -> float:
    """Time of the kernels one after the other."""
    return sum(kernel.seconds(device) for kernel in kernels)


def predict(op: str, variant: str, sizes: Sizes, device: Device) -> dict[str, Any]:
    """One row: bytes and predicted microseconds, forward and backward in bfloat16, of the op, eager torch and the frozen layer.

    Args:
        op: A key of ``inventory.OPS``.
        variant: One of its variants in ``cases.OPERATIONS``.
        sizes: The sizes.
        device: The GPU.

    Returns:
        The row. ``speedup`` is relative to eager torch. ``overhead`` and ``eager_overhead`` are relative to the frozen layer's
        products and fused element-wise passes; they are ``None`` if nothing remains without the adapter.
    """
    case = build(op, variant, sizes, dtype=torch.bfloat16, device="meta")
    ours, eager = kernels_of_op(case, device), kernels_of_torch(case.eager, case, device)
    ours_seconds, eager_seconds = seconds(ours, device), seconds(eager, device)
    row = {
        "op": variant,
        **{name: getattr(sizes, name) for name in ("M", "K", "N", "R", "p")},
        "device": device.name,
        "unique_bytes": sum(kernel.unique_bytes for kernel in ours),
        "eager_unique_bytes": sum(kernel.unique_bytes for kernel in eager),
        "dram_bytes": sum(kernel.dram_bytes for kernel in ours),
        "eager_dram_bytes": sum(kernel.dram_bytes for kernel in eager),
        "kernels": len(ours),
        "eager_kernels": len(eager),
        "microseconds": round(1e6 * ours_seconds, 1),
        "eager_microseconds": round(1e6 * eager_seconds, 1),
        "speedup": round(eager_seconds / ours_seconds, 3),
        "overhead": None,
        "eager_overhead": None,
    }
    if case.frozen is not None:
        frozen = kernels_of_torch(case.frozen, case, device)
        passes = Kernel("passes", case.frozen_bytes, case.frozen_bytes, 0)
        floor = seconds([passes, *(kernel for kernel in frozen if kernel.flops)], device)
        row["overhead"] = round(ours_seconds / floor - 1, 3)
        row["eager_overhead"] = round(eager_seconds / floor - 1, 3)
    return row


UNPREDICTED = frozenset({"lora_decoder_layer"})
"""Its attention is the library's on both sides, and the counts of torch's operations show it as products with stored scores."""


def rows(ops: list[str] | None = None) -> list[dict[str, Any]]:
    """The table of predictions for the named ops; ``None`` means all ops with Triton kernels that can be predicted."""
    found = []
    for op in chosen(ops, [op for op in OPS if op not in UNPREDICTED]):
        for sizes in SIZES.get(op, SIZES["lora_linear"][:1]):
            for p in (0.0, 0.1) if op in _DROPOUT else (0.0,):
                for variant in OPERATIONS[op].variants:
                    drawn = Sizes(sizes.M, sizes.K, sizes.N, sizes.R, p)
                    found += [predict(op, variant, drawn, device) for device in DEVICES]
    return found
