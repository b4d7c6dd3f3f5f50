"""The dense products of every op, by the fastest float32 routine of the machine.

PyTorch multiplies float32 matrices on x86 with MKL, which runs only its AVX2 code on processors that are not Intel's.
oneDNN, which every x86 build of PyTorch also contains, uses AVX-512 on them: 1.9x faster on a Zen 5 server core at the
sizes of a 135M-parameter model (512 x 576 x 576: 183 against 350 GFLOP/s on two cores). The processor decides which of the
two runs, never a timing, so the same machine always gives the same bits.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels.core.blocks import starts
from peftkit_kernels.core.modes import hides_native_calls

_MIN_FLOPS = 2 * 64**3
"""A smaller product takes microseconds, and torch's own call has less overhead."""

_WHOLE_BYTES = 2**26
"""The largest weight that is passed to oneDNN in one piece."""

_SLICE_BYTES = 2**24


def matmul_nt(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x wᵀ + bias`` with one rounding.

    Args:
        x: ``[M, K]``.
        w: ``[N, K]``, the dtype of ``x``; any strides.
        bias: ``[N]``, the dtype of ``x``, or ``None``.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    if _use_onednn(x, w):
        return _onednn(x, w, bias)
    return F.linear(whole_rows(x), w, bias)


def matmul_nn(x: Tensor, w: Tensor) -> Tensor:
    """``x w`` for ``x [M, N]`` and ``w [N, K]``; otherwise as ``matmul_nt``."""
    return _onednn(x, w.t(), None) if _use_onednn(x, w) else torch.mm(whole_rows(x), w)


def addmm_nt(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """``y + x wᵀ`` with one rounding of the sum; ``y`` ``[M, N]`` may be overwritten and must not be used again."""
    if _use_onednn(x, w):
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, w, None, "add")
    return y.addmm_(whole_rows(x), w.t())


def addmm_nn(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """``y + x w``; otherwise as ``addmm_nt``."""
    return addmm_nt(y, x, w.t()) if _use_onednn(x, w) else y.addmm_(whole_rows(x), w)


def whole_rows(x: Tensor) -> Tensor:
    """The left operand ``x`` of one of torch's products, copied if the product would read what stands between its rows.

    On processors with AMX, oneDNN multiplies what follows a row of bfloat16 by zero, so that a NaN there spoils the result: seen in
    torch 2.13 for many numbers of columns, but for no multiple of 32.
    """
    if x.dtype is not torch.bfloat16 or not x.is_cpu or x.dim() != 2:
        return x
    return x.contiguous() if x.shape[1] % 32 and x.stride(0) > x.shape[1] else x


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """``matmul_nt`` by oneDNN, which first copies the whole weight into its own layout.

    A large weight is multiplied in slices: the copy of a language model's head alone (49,152 x 576) would add 108 MiB to
    the peak memory. Slices are no slower (M 128, forward and input gradient: 48 against 51 ms on two Zen 5 cores).
    """
    linear = torch.ops.mkldnn._linear_pointwise
    (N, K), size = w.shape, w.numel() * 4
    if size <= _WHOLE_BYTES:
        return linear(x, w, bias, "none", [], "")
    if N >= K:
        y, step = x.new_empty(x.shape[0], N), -(-N * _SLICE_BYTES // size)
        for start in starts(N, step):
            part = slice(start, start + step)
            y[:, part] = linear(x, w[part], None if bias is None else bias[part], "none", [], "")
        return y
    y, step = None, -(-K * _SLICE_BYTES // size)
    for start in starts(K, step):
        part = slice(start, start + step)
        if y is None:
            y = linear(x[:, part], w[:, part], bias, "none", [], "")
        else:
            y = linear.binary(x[:, part], y, w[:, part], None, "add")
    assert y is not None
    return y


def _use_onednn(x: Tensor, w: Tensor) -> bool:
    # tracers have no rule for oneDNN's operations, and counters of operations do not count them
    return (
        2 * x.shape[0] * w.numel() >= _MIN_FLOPS
        and x.dtype is torch.float32
        and x.is_cpu
        and w.dtype is torch.float32
        and prefers_onednn()
        and not hides_native_calls()
    )


@functools.cache
def prefers_onednn() -> bool:
    """Whether this machine's CPU multiplies float32 matrices with oneDNN instead of the BLAS that PyTorch was built with."""
    return onednn_obstacle() is None


def onednn_obstacle() -> str | None:
    """Why PyTorch's BLAS multiplies float32 matrices on this machine's CPU, as a sentence, or ``None`` if oneDNN does."""
    for name, library in (("oneDNN", torch.backends.mkldnn), ("MKL", torch.backends.mkl)):
        if not library.is_available():
            return f"this build of PyTorch has no {name}"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        return f"PyTorch runs {capability} code here, and oneDNN is faster only with AVX-512"
    if "Intel" in cpu_vendor():
        return "MKL itself uses AVX-512 on Intel's processors"
    return None


@functools.cache
def cpu_vendor() -> str:
    """The processor's vendor string, ``GenuineIntel`` or ``AuthenticAMD`` on x86; empty if it cannot be read."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return platform.processor()
