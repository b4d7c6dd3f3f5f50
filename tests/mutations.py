"""Planted bugs in kernels, one line each, with the test that must detect the bug.

A new kernel needs one mutation of every kind that applies. ``mutations_of_layers.py`` has those of the kernels between the products of a
decoder layer, ``mutations_of_weights.py`` those of kernels that read the frozen
weight.
"""

from mutation import bugs_of, tests_of
from mutations_of_layers import MUTATIONS_OF_LAYERS
from mutations_of_weights import MUTATIONS_OF_WEIGHTS

_LOW_RANK = "tests/triton/test_low_rank.py::"
_SHRINK = _LOW_RANK + "test_shrink[0.1-torch.bfloat16]"
_EXPAND = _LOW_RANK + "test_expand[no_bias-0.1-torch.bfloat16]"
_BOTH = _LOW_RANK + "test_one_pass_over_dy_gives_both_gradients[torch.float32-torch.bfloat16]"
_GRAD_A = _LOW_RANK + "test_grad_a[0.1-torch.bfloat16]"
_SUMS = _LOW_RANK + "test_sums_of_partials"
_GEMM = _LOW_RANK + "test_gemm_lora[backward-0.1-torch.bfloat16]"
_WIDE = _LOW_RANK + "test_float32_factors_beside_16_bit_rows[torch.float16]"
_RULE = _LOW_RANK + "test_the_mask_is_the_rule_whatever_the_tiles[16]"

_bottleneck = tests_of("bottleneck")
_grouped = tests_of("grouped_lora")
_prefix = tests_of("prefix_attention")
_loss = tests_of("linear_cross_entropy")
_peft = tests_of("precision")("no_further_from_float64_than_twice_as_far_as_peft")
_BFLOAT16, _FLOAT16 = (f"{_peft}[lora_linear-{dtype}-float32]" for dtype in ("bfloat16", "float16"))

MUTATIONS = [
    *bugs_of(
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
    *bugs_of(
        "low_rank.kernels",
        "expand_kernel",
        ("stride", "offs_n[None, :] * stride_bn", "offs_n[None, :] * stride_br", _EXPAND),
        ("mask", "mask_n = offs_m < M, offs_n < N", "mask_n = offs_m < M, offs_n < N + 1", _EXPAND),
        ("scale", "y *= factor", "y *= 1.0", _EXPAND),
        ("tile", "pid_n * BLOCK_N + tl.arange", "pid_n * (BLOCK_N - 1) + tl.arange", _EXPAND),
        ("race", "tl.program_id(0) * BLOCK_M + ", "", _EXPAND),
        ("int32", "y_ptr + offs_m.to(tl.int64)[:, None]", "y_ptr + offs_m[:, None]", _EXPAND),
        ("rule", "y = tl.where(keep, y, 0.0)", "y = tl.where(keep, y, y)", _EXPAND),
    ),
    *bugs_of(
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
    *bugs_of(
        "low_rank.kernels",
        "_sum_tile",
        ("stride", "x_ptrs += stride_xi", "x_ptrs += N", _SUMS),
        ("mask", "(offs_n < N)[None, :]", "(offs_n < N + 1)[None, :]", _SUMS),
        ("tile", "range(count)", "range(count - 1)", _SUMS),
        ("race", "(tile // blocks)", "(tile // blocks // 2)", _SUMS),
        ("int32", "tl.zeros((), tl.int64) + N", "N + 0", _SUMS),
    ),
    *bugs_of(
        "low_rank.kernels",
        "gemm_lora_kernel",
        ("stride", "[:, None] * stride_wk", "[:, None] * stride_wn", _GEMM),
        ("mask", "mask_k = offs_k < K", "mask_k = offs_k < K + 1", _GEMM),
        ("scale", "PRECISION) * factor", "PRECISION)", _GEMM),
        ("tile", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)", _GEMM),
        ("race", "tile_m * BLOCK_M + ", "", _GEMM),
        ("int32", "y_ptr + offs_m.to(tl.int64)[:, None]", "y_ptr + offs_m[:, None]", _GEMM),
        ("rule", "tile_n * BLOCK_N, tl.cdiv(N, 8)", "0, tl.cdiv(N, 8)", _GEMM),
    ),
    *bugs_of("core.tiles", "kept", ("rule", "n_rounds=7", "n_rounds=10", _RULE)),
    *bugs_of(
        "core.tiles",
        "mixed_dot",
        ("rule", "tl.dot(a, middle, tl.dot(a, low, acc))", "tl.dot(a, middle, acc)", _BFLOAT16),
        ("rule", "tl.dot(middle, b, tl.dot(low, b, acc))", "tl.dot(middle, b, acc)", _BFLOAT16),
        ("rule", "tl.dot(a_low, high, acc)", "acc", _FLOAT16),
        ("rule", "tl.dot(high, b_low, acc)", "acc", _FLOAT16),
        ("scale", "tl.dot(a_low, b_high, acc)", "acc", _WIDE),
    ),
    *bugs_of(
        "core.tiles",
        "assume_multiple_of",
        ("stride", "n // STEP * STEP", "n // STEP", _BOTH),
    ),
    *bugs_of(
        "core.tiles",
        "grouped_tile",
        ("tile", "program % size % height,", "program % size % GROUP,", _GEMM),
    ),
    *bugs_of(
        "ops.linear_cross_entropy.kernels",
        "xent_kernel",
        (
            "stride",
            "z_ptr + row * stride_zm",
            "z_ptr + row * (stride_zm + 1)",
            _loss("rows_are_within_their_bounds"),
        ),
        (
            "mask",
            "mask = v + group < V",
            "mask = v + group < V + 1",
            _loss("rows_are_within_their_bounds"),
        ),
        (
            "mask",
            "mask=v + group < W",
            "mask=v + group < W + 1",
            _loss("columns_behind_the_vocabulary_hold_nothing"),
        ),
        (
            "race",
            "row = tl.program_id(0)",
            "row = (tl.program_id(0) // 2)",
            _loss("rows_are_within_their_bounds"),
        ),
    ),
    *bugs_of(
        "ops.linear_cross_entropy.kernels",
        "xent_kernel",
        ("scale", "factor = logit_scale", "factor = 1.0", _loss("every_option_of_a_row")),
        (
            "int32",
            "tl.program_id(0).to(tl.int64)",
            "tl.program_id(0)",
            _loss("large_logits_and_row_offsets_do_not_overflow"),
        ),
        ("rule", "1.0 - share * share", "1.0 - share", _loss("every_option_of_a_row")),
        (
            "tile",
            "for v in range(0, V, BLOCK_V):\n        mask",
            "for v in range(0, V - BLOCK_V, BLOCK_V):\n        mask",
            _loss("every_option_of_a_row"),
        ),
    ),
    *bugs_of(
        "ops.bottleneck.kernels",
        "_narrow",
        (
            "stride",
            "[None, :] * stride_wr",
            "[None, :] * stride_wd",
            _bottleneck("within_the_error_bound"),
        ),
        (
            "mask",
            "mask_d = offs_d < D",
            "mask_d = offs_d < D + 1",
            _bottleneck("within_the_error_bound"),
        ),
        (
            "tile",
            "range(0, D, BLOCK_D)",
            "range(0, D - BLOCK_D, BLOCK_D)",
            _bottleneck("within_the_error_bound"),
        ),
    ),
    *bugs_of(
        "ops.bottleneck.kernels",
        "_widen",
        ("scale", "y *= scale", "y *= 1.0", _bottleneck("scale")),
        ("rule", "if ADD:", "if not ADD:", _bottleneck("within_the_error_bound")),
    ),
    *bugs_of(
        "ops.bottleneck.kernels",
        "bottleneck_forward_kernel",
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _bottleneck("offsets_of_rows_do_not_overflow"),
        ),
        (
            "race",
            "tl.program_id(0) * BLOCK_M + ",
            "",
            _bottleneck("offsets_of_rows_do_not_overflow"),
        ),
    ),
    *bugs_of(
        "ops.bottleneck.kernels",
        "bottleneck_backward_kernel",
        ("stride", "rows * stride_dhm", "rows * stride_dym", _bottleneck("strides_and_offsets")),
        ("scale", "da = scale * ", "da = ", _bottleneck("scale")),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _bottleneck("offsets_of_rows_do_not_overflow"),
        ),
        ("rule", "(da * slope)", "da", _bottleneck("within_the_error_bound")),
    ),
    *bugs_of(
        "ops.grouped_lora.kernels",
        "grouped_shrink_kernel",
        (
            "stride",
            "offs_r[None, :] * stride_ar",
            "offs_r[None, :] * K",
            _grouped("strides_and_offsets"),
        ),
        (
            "mask",
            "mask_k = offs_k < K",
            "mask_k = offs_k < K + 1",
            _grouped("within_the_error_bound"),
        ),
        (
            "scale",
            "acc *= tl.load(scale_ptr + adapter)",
            "acc *= tl.load(scale_ptr)",
            _grouped("within_the_error_bound"),
        ),
        (
            "tile",
            "start + steps * BLOCK_K)",
            "start + (steps - 1) * BLOCK_K)",
            _grouped("partial_sums_of_every_pass"),
        ),
        ("race", "(pid_k.to(tl.int64) * M + rows)", "rows", _grouped("partial_sums_of_every_pass")),
        (
            "rule",
            "order_ptr + first + offs_m",
            "order_ptr + offs_m",
            _grouped("within_the_error_bound"),
        ),
    ),
    *bugs_of(
        "ops.grouped_lora.kernels",
        "grouped_expand_kernel",
        (
            "stride",
            "rows[:, None] * stride_om",
            "rows[:, None] * stride_ym",
            _grouped("strides_and_offsets"),
        ),
        (
            "mask",
            "offs_m < count, offs_n < N",
            "offs_m < count + 1, offs_n < N",
            _grouped("within_the_error_bound"),
        ),
        ("race", "(pid_m - tiles) * BLOCK_M", "0", _grouped("any_number_of_rows_and_rank")),
        ("rule", "tl.where(listed, R, 0)", "R", _grouped("within_the_error_bound")),
    ),
    *bugs_of(
        "ops.grouped_lora.kernels",
        "grouped_tall_kernel",
        (
            "mask",
            "mask_m = offs_m < count",
            "mask_m = offs_m < count + 1",
            _grouped("within_the_error_bound"),
        ),
        (
            "scale",
            "g *= tl.load(scale_ptr + adapter)",
            "g *= tl.load(scale_ptr)",
            _grouped("within_the_error_bound"),
        ),
        ("race", "pid_s.to(tl.int64) * stride_gi + ", "", _grouped("within_the_error_bound")),
        (
            "tile",
            "range(0, count.to(tl.int32), BLOCK_M)",
            "range(0, BLOCK_M, BLOCK_M)",
            _grouped("within_the_error_bound"),
        ),
    ),
    *bugs_of(
        "ops.grouped_lora.kernels",
        "grouped_sum_kernel",
        (
            "tile",
            "(last - first).to(tl.int32)",
            "(last - first - 1).to(tl.int32)",
            _grouped("within_the_error_bound"),
        ),
        (
            "stride",
            "offs_c[None, :] * stride_oc",
            "offs_c[None, :]",
            _grouped("within_the_error_bound"),
        ),
    ),
    *bugs_of(
        "ops.prefix_attention.kernels",
        "_rows",
        ("mask", "(offs_s < S)[:, None]", "(offs_s < S + 1)[:, None]", _prefix("merge")),
        ("race", "tl.program_id(1) * BLOCK_S + ", "", _prefix("merge")),
        ("int32", "(pid // H).to(tl.int64)", "(pid // H)", _prefix("merge")),
        ("stride", "* H + pid % H", "* H + pid // H", _prefix("merge")),
    ),
    *bugs_of(
        "ops.prefix_attention.kernels",
        "merge_kernel",
        (
            "scale",
            "(top + tl.log2(total)) * 0.6931471805599453",
            "top + tl.log2(total)",
            _prefix("merge"),
        ),
        ("rule", "o2 * (e2 / total)", "o2 * e2", _prefix("merge")),
    ),
    *bugs_of(
        "ops.prefix_attention.kernels",
        "gate_grad_kernel",
        ("rule", "tl.sum(dout * o2, 1)", "tl.sum(do2 * o2, 1)", _prefix("gate_and_its_gradient")),
        (
            "race",
            "tl.program_id(1) * tl.num_programs(0) + pid",
            "pid",
            _prefix("gate_and_its_gradient"),
        ),
    ),
    *MUTATIONS_OF_LAYERS,
    *MUTATIONS_OF_WEIGHTS,
]
