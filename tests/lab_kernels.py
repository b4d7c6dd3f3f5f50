"""Small right and wrong kernels for the tests of ``lab``."""

import triton
import triton.language as tl


@triton.jit
def matmul_nt(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_ym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y[M, N] = x[M, K] w[N, K]ᵀ``."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None],
            mask=mask_n[None, :] & mask_k[:, None],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    tl.store(
        y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@triton.jit
def cast(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """``y = x`` in the dtype of ``y``."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def add(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """``y += x`` in the dtype of the tensors, which is wrong for bfloat16."""
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(y_ptr + offs, mask) + tl.load(x_ptr + offs, mask), mask=mask)


@triton.jit
def smaller(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """``y = min(x, y)`` by a comparison."""
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    x, y = tl.load(x_ptr + offs, mask), tl.load(y_ptr + offs, mask)
    tl.store(y_ptr + offs, tl.where(x < y, x, y), mask=mask)


@triton.jit
def copy_row(x_ptr, y_ptr, N, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Each program handles one row. Without ``WIDE`` its offset overflows on large tensors."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, mask=offs < N)
    tl.store(y_ptr + row * stride + offs, x, mask=offs < N)


@triton.jit
def write_program_id(y_ptr, BLOCK: tl.constexpr):
    """Every program writes the same elements."""
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32) + tl.program_id(0))


@triton.jit
def shift(x_ptr, BLOCK: tl.constexpr):
    """Reads elements that the next program overwrites."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + BLOCK)
    tl.store(x_ptr + offs, x)


@triton.jit
def count(x_ptr, n_ptr, BLOCK: tl.constexpr, PLAIN: tl.constexpr):
    """Adds the sums of blocks to one number atomically. With ``PLAIN`` it also writes to the number without atomics."""
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(n_ptr, tl.sum(x, 0))
    if PLAIN:
        tl.store(n_ptr, 0.0)
