"""Bugs planted into kernels, one line each, and the test that has to notice.

A new kernel needs one mutation of every kind that makes sense for it. ``old`` has to occur exactly once in the kernel.
"""

from dataclasses import dataclass

KINDS = ("stride", "mask", "scale", "tile", "race", "int32", "rule")
"""A wrong stride, a missing mask, a dropped factor, a tile too few or too many, two programs storing to one place, a row offset in
int32, another rule (a term or a mask that is not the definition's)."""


@dataclass(frozen=True)
class Mutation:
    """A bug: ``old`` becomes ``new`` in ``kernel`` of ``module`` (below ``peftkit_kernels``), noticed by ``test``."""

    module: str
    kernel: str
    kind: str
    old: str
    new: str
    test: str
    quick: bool = False

    @property
    def name(self):
        return f"{self.kernel}: {self.kind}"


def _of(module, kernel, *lines):
    return [Mutation(module, kernel, *line) for line in lines]


_LOW_RANK = "tests/triton/test_low_rank.py::"
_SHRINK = _LOW_RANK + "test_shrink[0.1-torch.bfloat16]"
_EXPAND = _LOW_RANK + "test_expand[no_bias-0.1-torch.bfloat16]"
_BOTH = _LOW_RANK + "test_one_pass_over_dy_gives_both_gradients[torch.float32-torch.bfloat16]"
_GRAD_A = _LOW_RANK + "test_grad_a[0.1-torch.bfloat16]"
_SUMS = _LOW_RANK + "test_sums_of_partials"
_GEMM = _LOW_RANK + "test_gemm_lora[backward-0.1-torch.bfloat16]"
_RULE = _LOW_RANK + "test_the_mask_is_the_rule_whatever_the_tiles[16]"
_QKV = "tests/triton/test_lora_qkv.py::"
_ROWS = "tests/triton/test_linear_cross_entropy.py::test_rows_are_within_their_bounds[1031-torch.float32]"

MUTATIONS = [
    *_of(
        "low_rank.kernels",
        "shrink_kernel",
        ("stride", "offs_r[None, :] * stride_ar", "offs_r[None, :] * stride_ak", _SHRINK, True),
        ("mask", "mask_k = offs_k < K", "mask_k = offs_k < K + BLOCK_K", _SHRINK, True),
        ("scale", "(acc * factor)", "acc", _SHRINK, True),
        ("tile", "first + steps * BLOCK_K)", "first + (steps - 1) * BLOCK_K)", _SHRINK, True),
        ("race", "(pid_k.to(tl.int64) * M + offs_m)", "offs_m.to(tl.int64)", _SHRINK, True),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None] * stride_xm",
            "offs_m[:, None] * stride_xm",
            _SHRINK,
            True,
        ),
        ("rule", "kept(seed, offs_m, k,", "kept(seed, offs_m, 0,", _SHRINK, True),
    ),
    *_of(
        "low_rank.kernels",
        "expand_kernel",
        ("stride", "offs_n[None, :] * stride_bn", "offs_n[None, :] * stride_br", _EXPAND),
        ("mask", "offs_n < N, offs_r < R", "offs_n < N + 1, offs_r < R", _EXPAND),
        ("scale", "input_precision=PRECISION) * factor", "input_precision=PRECISION)", _EXPAND),
        ("tile", "pid_n * BLOCK_N + tl.arange", "pid_n * (BLOCK_N - 1) + tl.arange", _EXPAND),
        ("race", "tl.program_id(0) * BLOCK_M + ", "", _EXPAND),
        ("int32", "y_ptr + offs_m.to(tl.int64)[:, None]", "y_ptr + offs_m[:, None]", _EXPAND),
        ("rule", "y = tl.where(keep, y, 0.0)", "y = tl.where(keep, y, y)", _EXPAND),
    ),
    *_of(
        "low_rank.kernels",
        "tall_kernel",
        ("stride", "offs_c[:, None] * stride_bc", "offs_c[:, None] * stride_br", _BOTH),
        ("mask", "mask_m = offs_m < M", "mask_m = offs_m < M + BLOCK_M", _BOTH),
        ("scale", "(g * g_factor)", "g", _BOTH),
        ("scale", " * p_factor", "", _BOTH),
        ("tile", "first + chunk_m), BLOCK_M", "first + chunk_m + 1), BLOCK_M", _BOTH),
        ("race", "(pid_c.to(tl.int64) * M + offs_m)", "offs_m.to(tl.int64)", _BOTH),
        ("int32", "x_ptr + offs_m.to(tl.int64)[:, None]", "x_ptr + offs_m[:, None]", _BOTH),
        ("rule", "pid_c * BLOCK_C, tl.cdiv(C, 8)", "pid_c * BLOCK_C, tl.cdiv(C, 8) + 1", _GRAD_A),
    ),
    *_of(
        "low_rank.kernels",
        "sum_kernel",
        ("stride", "x_ptrs += stride_xi", "x_ptrs += N", _SUMS),
        ("mask", "(offs_n < N)[None, :]", "(offs_n < N + 1)[None, :]", _SUMS),
        ("tile", "range(count)", "range(count - 1)", _SUMS),
        ("race", "tl.program_id(0) * BLOCK_M + ", "", _SUMS),
        ("int32", ".to(tl.int64)\n    offs_n", "\n    offs_n", _SUMS),
    ),
    *_of(
        "low_rank.kernels",
        "gemm_lora_kernel",
        ("stride", "[:, None] * stride_wk", "[:, None] * stride_wn", _GEMM),
        ("mask", "mask_k = offs_k < K", "mask_k = offs_k < K + 1", _GEMM),
        ("scale", "input_precision=PRECISION) * factor", "input_precision=PRECISION)", _GEMM),
        ("tile", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)", _GEMM),
        ("race", "tile_m * BLOCK_M + ", "", _GEMM),
        ("int32", "y_ptr + offs_m.to(tl.int64)[:, None]", "y_ptr + offs_m[:, None]", _GEMM),
        ("rule", "tile_n * BLOCK_N, tl.cdiv(N, 8)", "0, tl.cdiv(N, 8)", _GEMM),
    ),
    *_of("tiles", "kept", ("rule", "n_rounds=7", "n_rounds=10", _RULE)),
    *_of(
        "tiles",
        "grouped_tile",
        ("tile", "program % size % height,", "program % size % GROUP,", _GEMM),
    ),
    *_of(
        "linear_cross_entropy.kernels",
        "xent_kernel",
        ("stride", "z_ptr + row * stride_zm", "z_ptr + row * (stride_zm + 1)", _ROWS),
        ("mask", "mask = v + group < V", "mask = v + group < V + 1", _ROWS),
        ("race", "row = tl.program_id(0)", "row = (tl.program_id(0) // 2)", _ROWS),
    ),
]
