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


def _tests(file):
    return lambda name: f"tests/triton/test_{file}.py::test_{name}"


_norm = _tests("frozen_norm")
_gate = _tests("lora_swiglu_mlp")
_bottleneck = _tests("bottleneck")
_grouped = _tests("grouped_lora")
_prefix = _tests("prefix_attention")
_nf4 = _tests("nf4")
_int8 = _tests("int8")
_few_rows = _tests("quantized_linear")
_int8_linear = _tests("int8_compute_linear")
_dora = _tests("dora")
_scale = _tests("dora_scale")
_loss = _tests("linear_cross_entropy")

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
        ("race", "(tl.program_id(0) // blocks)", "(tl.program_id(0) // blocks // 2)", _SUMS),
        ("int32", "% blocks).to(tl.int64)", "% blocks)", _SUMS),
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
        "whole",
        ("stride", "n // STEP * STEP", "n // STEP", _BOTH),
    ),
    *_of(
        "tiles",
        "grouped_tile",
        ("tile", "program % size % height,", "program % size % GROUP,", _GEMM),
    ),
    *_of(
        "linear_cross_entropy.kernels",
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
    *_of(
        "linear_cross_entropy.kernels",
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
    *_of(
        "frozen_norm.kernels",
        "norm_forward_kernel",
        ("stride", "rows * stride_ym", "rows * stride_xm", _norm("within_the_error_bound")),
        (
            "mask",
            "mask_m, mask_k = offs_m < M, offs_k < K",
            "mask_m, mask_k = offs_m < M, offs_k < K + 1",
            _norm("within_the_error_bound"),
        ),
        (
            "scale",
            "tl.sum(x * x, 1) / K",
            "tl.sum(x * x, 1) / BLOCK_K",
            _norm("within_the_error_bound"),
        ),
        ("race", "tl.program_id(0) * BLOCK_M + ", "", _norm("within_the_error_bound")),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _norm("offsets_of_rows_do_not_overflow"),
        ),
        (
            "rule",
            "tl.where(mask, x - mean[:, None], 0.0)",
            "x - mean[:, None]",
            _norm("within_the_error_bound"),
        ),
    ),
    *_of(
        "frozen_norm.kernels",
        "norm_backward_kernel",
        ("stride", "rows * stride_dym", "rows * stride_dxm", _norm("within_the_error_bound")),
        ("scale", "(dx * rstd)", "dx", _norm("within_the_error_bound")),
        (
            "tile",
            "tl.program_id(0) * BLOCK_M",
            "tl.program_id(0) * (BLOCK_M + 1)",
            _norm("within_the_error_bound"),
        ),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _norm("offsets_of_rows_do_not_overflow"),
        ),
        ("rule", "dx -= (tl.sum(u, 1) / K)[:, None]", "dx -= 0.0", _norm("within_the_error_bound")),
    ),
    *_of(
        "lora_swiglu_mlp.kernels",
        "gate_forward_kernel",
        ("stride", "g_ptr + rows * stride_gm", "g_ptr + rows * F", _gate("within_the_error_bound")),
        ("mask", "mask_f = offs_f < F", "mask_f = offs_f < F + 1", _gate("within_the_error_bound")),
        ("scale", "(s_d * factor)", "s_d", _gate("within_the_error_bound")),
        (
            "tile",
            "first + steps * BLOCK_F), BLOCK_F",
            "first + (steps - 1) * BLOCK_F), BLOCK_F",
            _gate("tiles_do_not_matter_and_each_stream_moves_once"),
        ),
        (
            "race",
            "(pid_f.to(tl.int64) * M + offs_m)",
            "offs_m.to(tl.int64)",
            _gate("tiles_do_not_matter_and_each_stream_moves_once"),
        ),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _gate("offsets_of_rows_do_not_overflow"),
        ),
        (
            "rule",
            "kept(seed, offs_m, f,",
            "kept(seed, offs_m, 0,",
            _gate("tiles_do_not_matter_and_each_stream_moves_once"),
        ),
    ),
    *_of(
        "lora_swiglu_mlp.kernels",
        "gate_backward_kernel",
        (
            "stride",
            "rows * stride_dm",
            "rows * stride_em",
            _gate("tiles_do_not_matter_and_each_stream_moves_once"),
        ),
        (
            "mask",
            "mask_m = offs_m < M\n",
            "mask_m = offs_m < M + 1\n",
            _gate("within_the_error_bound"),
        ),
        ("scale", "update * factor", "update", _gate("within_the_error_bound")),
        (
            "tile",
            "first + chunk_m), BLOCK_M",
            "first + chunk_m + 1), BLOCK_M",
            _gate("tiles_do_not_matter_and_each_stream_moves_once"),
        ),
        (
            "race",
            "pid_m.to(tl.int64) * stride_ai + ",
            "",
            _gate("tiles_do_not_matter_and_each_stream_moves_once"),
        ),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _gate("offsets_of_rows_do_not_overflow"),
        ),
        ("rule", "dh * g * slope", "dh * g", _gate("within_the_error_bound")),
    ),
    *_of(
        "bottleneck.kernels",
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
    *_of(
        "bottleneck.kernels",
        "_widen",
        ("scale", "y *= scale", "y *= 1.0", _bottleneck("scale")),
        ("rule", "if ADD:", "if not ADD:", _bottleneck("within_the_error_bound")),
    ),
    *_of(
        "bottleneck.kernels",
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
    *_of(
        "bottleneck.kernels",
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
    *_of(
        "grouped_lora.kernels",
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
    *_of(
        "grouped_lora.kernels",
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
    *_of(
        "grouped_lora.kernels",
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
    *_of(
        "grouped_lora.kernels",
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
    *_of(
        "prefix_attention.kernels",
        "_rows",
        ("mask", "(offs_s < S)[:, None]", "(offs_s < S + 1)[:, None]", _prefix("merge")),
        ("race", "tl.program_id(1) * BLOCK_S + ", "", _prefix("merge")),
        ("int32", "(pid // H).to(tl.int64)", "(pid // H)", _prefix("merge")),
        ("stride", "* H + pid % H", "* H + pid // H", _prefix("merge")),
    ),
    *_of(
        "prefix_attention.kernels",
        "merge_kernel",
        (
            "scale",
            "(top + tl.log2(total)) * 0.6931471805599453",
            "top + tl.log2(total)",
            _prefix("merge"),
        ),
        ("rule", "o2 * (e2 / total)", "o2 * e2", _prefix("merge")),
    ),
    *_of(
        "prefix_attention.kernels",
        "gate_grad_kernel",
        ("rule", "tl.sum(dout * o2, 1)", "tl.sum(do2 * o2, 1)", _prefix("gate_and_its_gradient")),
        (
            "race",
            "tl.program_id(1) * tl.num_programs(0) + pid",
            "pid",
            _prefix("gate_and_its_gradient"),
        ),
    ),
    *_of(
        "nf4.kernels",
        "decode_words",
        (
            "rule",
            "4 - (j % 2) * 4",
            "(j % 2) * 4",
            _nf4("dequantises_to_the_bits_of_the_definition"),
        ),
    ),
    *_of(
        "nf4.kernels",
        "block_absmax",
        (
            "scale",
            "absmax += tl.load(offset_ptr)",
            "absmax += 0.0",
            _nf4("dequantises_to_the_bits_of_the_definition"),
        ),
        (
            "tile",
            "block // NESTED_BLOCK",
            "block // (NESTED_BLOCK * 2)",
            _nf4("dequantises_to_the_bits_of_the_definition"),
        ),
    ),
    *_of(
        "nf4.kernels",
        "dequantize_kernel",
        ("stride", "rows * stride_om", "rows * K", _nf4("out_may_be_any_window")),
        (
            "mask",
            "mask_out = offs < numel",
            "mask_out = offs < numel + 1",
            _nf4("dequantises_to_the_bits_of_the_definition"),
        ),
        (
            "race",
            "tl.program_id(0) * BLOCK + ",
            "",
            _nf4("dequantises_to_the_bits_of_the_definition"),
        ),
        (
            "tile",
            "word // (BLOCKSIZE // 8)",
            "word // (BLOCKSIZE // 4)",
            _nf4("dequantises_to_the_bits_of_the_definition"),
        ),
    ),
    *_of(
        "nf4.kernels",
        "quantize_kernel",
        (
            "mask",
            "mask = offs < numel",
            "mask = offs < numel + 1",
            _nf4("quantises_to_the_bits_of_the_definition"),
        ),
        (
            "scale",
            "w * tl.math.div_rn(1.0, divisor)",
            "w * tl.math.div_rn(0.5, divisor)",
            _nf4("quantises_to_the_bits_of_the_definition"),
        ),
        (
            "race",
            "tl.program_id(0).to(tl.int64) * BLOCKS + ",
            "",
            _nf4("quantises_to_the_bits_of_the_definition"),
        ),
        (
            "rule",
            "scaled <= MIDPOINTS[k]",
            "scaled < MIDPOINTS[k]",
            _nf4("quantises_to_the_bits_of_the_definition"),
        ),
    ),
    *_of(
        "int8.kernels",
        "dequantize_kernel",
        ("stride", "columns * stride_ck", "columns", _int8("codes_and_out_may_have_any_strides")),
        (
            "mask",
            "mask_n = offs_n < N",
            "mask_n = offs_n < N + 1",
            _int8("gives_the_bits_of_the_definition"),
        ),
        ("scale", ", 127.0)", ", 128.0)", _int8("gives_the_bits_of_the_definition")),
        ("race", "tl.program_id(1) * BLOCK_K + ", "", _int8("gives_the_bits_of_the_definition")),
        (
            "int32",
            "offs_n.to(tl.int64)[:, None]",
            "offs_n[:, None]",
            _int8("every_byte_is_read_once"),
        ),
    ),
    *_of(
        "quantized_linear.kernels",
        "_finish",
        ("rule", "if share == 0:", "if share >= 0:", _few_rows("any_width")),
        (
            "scale",
            "input_precision=PRECISION) * factor",
            "input_precision=PRECISION)",
            _few_rows("within_the_error_bound"),
        ),
        (
            "race",
            "(share.to(tl.int64) * M + offs_m)",
            "offs_m",
            _few_rows("any_width"),
        ),
        (
            "mask",
            "offs_m < M, offs_n < N",
            "offs_m < M, offs_n < N + 1",
            _few_rows("within_the_error_bound"),
        ),
    ),
    *_of(
        "quantized_linear.kernels",
        "nf4_small_m_kernel",
        (
            "tile",
            "(BLOCKSIZE // BLOCK_K)",
            "(2 * BLOCKSIZE // BLOCK_K)",
            _few_rows("within_the_error_bound"),
        ),
        (
            "int32",
            "offs_n.to(tl.int64)[:, None]",
            "offs_n[:, None]",
            _few_rows("a_stored_byte_is_read_once_by_few_rows"),
        ),
        ("scale", " * absmax[None, :]", "", _few_rows("within_the_error_bound")),
    ),
    *_of(
        "quantized_linear.kernels",
        "int8_small_m_kernel",
        ("stride", "[None, :] * stride_ck", "[None, :]", _few_rows("codes_may_have_any_strides")),
        (
            "mask",
            "mask_k = offs_k < K",
            "mask_k = offs_k < K + 1",
            _few_rows("any_width"),
        ),
        (
            "int32",
            "offs_n.to(tl.int64)[:, None]",
            "offs_n[:, None]",
            _few_rows("offsets_of_rows_do_not_overflow"),
        ),
        ("scale", "row_absmax, 127.0", "row_absmax, 128.0", _few_rows("within_the_error_bound")),
    ),
    *_of(
        "int8_compute_linear.kernels",
        "quantize_kernel",
        (
            "stride",
            "[:, None] * stride_cm",
            "[:, None] * stride_xm",
            _int8_linear("strided_inputs_and_gradients"),
        ),
        (
            "mask",
            "mask_m, mask_r = offs_m < M, offs_r < R",
            "mask_m, mask_r = offs_m < M + 1, offs_r < R",
            _int8_linear("codes_are_those_of_the_definition"),
        ),
        (
            "scale",
            "inverse * 127.0",
            "inverse * 128.0",
            _int8_linear("codes_are_those_of_the_definition"),
        ),
        (
            "race",
            "tl.program_id(0) * BLOCK_M + ",
            "",
            _int8_linear("codes_are_those_of_the_definition"),
        ),
        ("rule", "12582912.0", "12582913.0", _int8_linear("codes_are_those_of_the_definition")),
        (
            "rule",
            "kept(seed, offs_m, k,",
            "kept(seed, offs_m, 0,",
            _int8_linear("one_pass_quantises_and_shrinks"),
        ),
    ),
    *_of(
        "int8_compute_linear.kernels",
        "int8_gemm_kernel",
        (
            "stride",
            "[:, None] * stride_wk",
            "[:, None] * stride_wn",
            _int8_linear("within_the_error_bound"),
        ),
        (
            "mask",
            "mask_k = offs_k < K",
            "mask_k = offs_k < K + 1",
            _int8_linear("within_the_error_bound"),
        ),
        (
            "scale",
            "acc *= tl.load(column_step_ptr + offs_n, mask=mask_n, other=0.0)[None, :]",
            "acc *= 1.0",
            _int8_linear("within_the_error_bound"),
        ),
        ("race", "tile_n * BLOCK_N + ", "", _int8_linear("any_width")),
        (
            "int32",
            "y_ptr + offs_m.to(tl.int64)[:, None]",
            "y_ptr + offs_m[:, None]",
            _int8_linear("offsets_of_rows_do_not_overflow"),
        ),
        (
            "rule",
            "column = tile_n * BLOCK_N",
            "column = 0",
            _int8_linear("any_width"),
        ),
    ),
    *_of(
        "dora.kernels",
        "norm_kernel",
        ("stride", "[None, :] * stride_wk", "[None, :]", _dora("norm_of_strided_weights")),
        ("mask", "mask_k = offs_k < K", "mask_k = offs_k < K + 1", _dora("norm")),
        ("scale", "2.0 * scale * ", "scale * ", _dora("norm")),
        ("tile", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)", _dora("norm")),
        ("race", "tl.program_id(0) * BLOCK_N + ", "", _dora("norm_of_any_size")),
        (
            "int32",
            "offs_n.to(tl.int64)[:, None]",
            "offs_n[:, None]",
            _dora("offsets_of_rows_do_not_overflow"),
        ),
        ("rule", "step * step", "step", _dora("norm")),
    ),
    *_of(
        "dora.kernels",
        "magnitude_grad_kernel",
        ("stride", "rows * stride_dm", "rows * N", _dora("strided_inputs_and_gradients")),
        ("mask", "(offs_m < M)[:, None]", "(offs_m < M + 1)[:, None]", _dora("magnitude_grad")),
        ("race", "pid_m.to(tl.int64) * N + ", "", _dora("magnitude_grad")),
        ("rule", " - bias[None, :]", "", _dora("magnitude_grad")),
    ),
    *_of(
        "dora_scale.kernels",
        "_of_columns",
        ("mask", "ptr + offs_n, mask=mask_n, other=0.0", "ptr + offs_n", _scale("any_shape")),
        ("rule", "(BLOCK_N,), absent", "(BLOCK_N,), 0.0", _scale("absent_parts")),
    ),
    *_of(
        "dora_scale.kernels",
        "scale_kernel",
        ("stride", "rows * stride_zm", "rows * N", _scale("within_the_error_bound")),
        ("mask", "mask_n = offs_n < N", "mask_n = offs_n < N + 1", _scale("any_shape")),
        ("scale", "z * g + bias", "z + bias", _scale("any_shape")),
        ("tile", "% blocks * BLOCK_N", "% blocks * (BLOCK_N - 1)", _scale("any_shape")),
        ("race", "tl.program_id(0) // blocks * BLOCK_M + ", "", _scale("any_shape")),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _scale("offsets_of_rows_do_not_overflow"),
        ),
        ("rule", "z * g + bias", "(z + bias) * g", _scale("any_shape")),
    ),
    *_of(
        "dora_scale.kernels",
        "scale_backward_kernel",
        ("stride", "rows * stride_dym", "rows * N", _scale("within_the_error_bound")),
        ("stride", "(DG + DBIAS) * N", "DBIAS * N", _scale("any_shape")),
        ("mask", "(offs_m < M)[:, None]", "(offs_m < M + 1)[:, None]", _scale("any_shape")),
        ("scale", "(dy * g)", "dy", _scale("any_shape")),
        ("tile", "first + chunk_m), BLOCK_M", "first + chunk_m + 1), BLOCK_M", _scale("any_shape")),
        ("race", "pid_m.to(tl.int64) * (DG + DBIAS) * N + ", "", _scale("any_shape")),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _scale("offsets_of_rows_do_not_overflow"),
        ),
        ("rule", "dbias += dy", "dbias += dy * g", _scale("any_shape")),
        (
            "rule",
            "        offs_s += N\n",
            "    offs_s += N\n",
            _scale("without_a_magnitude_the_gradient_passes_through"),
        ),
    ),
    *_of(
        "dora_scale.kernels",
        "scaled_gate_kernel",
        (
            "stride",
            "rows * stride_um",
            "rows * F",
            _scale("gate_of_strided_inputs_and_gradients"),
        ),
        ("mask", "mask_f = offs_f < F", "mask_f = offs_f < F + 1", _scale("gate_of_any_shape")),
        ("scale", "u * g_u + bias_u", "u + bias_u", _scale("gate_of_any_shape")),
        ("tile", "% blocks * BLOCK_F", "% blocks * (BLOCK_F - 1)", _scale("gate_of_any_shape")),
        ("race", "tl.program_id(0) // blocks * BLOCK_M + ", "", _scale("gate_of_any_shape")),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _scale("offsets_of_rows_do_not_overflow"),
        ),
        ("rule", "e * g_e + bias_e", "e * g_e + bias_u", _scale("gate_of_any_shape")),
    ),
    *_of(
        "dora_scale.kernels",
        "scaled_gate_backward_kernel",
        (
            "stride",
            "rows * stride_dhm",
            "rows * F",
            _scale("gate_of_strided_inputs_and_gradients"),
        ),
        (
            "mask",
            "(offs_m < M)[:, None]",
            "(offs_m < M + 1)[:, None]",
            _scale("gate_of_any_shape"),
        ),
        ("scale", "(du * g_u)", "du", _scale("gate_of_any_shape")),
        (
            "tile",
            "first + chunk_m), BLOCK_M",
            "first + chunk_m - BLOCK_M), BLOCK_M",
            _scale("gate_of_any_shape"),
        ),
        (
            "race",
            "pid_m.to(tl.int64) * (DG_E + DG_U + DBIAS_E + DBIAS_U) * F + ",
            "",
            _scale("gate_of_any_shape"),
        ),
        (
            "int32",
            "offs_m.to(tl.int64)[:, None]",
            "offs_m[:, None]",
            _scale("offsets_of_rows_do_not_overflow"),
        ),
        ("rule", " * slope", "", _scale("gate_of_any_shape")),
        ("rule", "dg_u += du * z_u", "dg_u += du * z_e", _scale("gate_of_any_shape")),
        ("rule", "dbias_e += de", "dbias_e += dh", _scale("gate_of_any_shape")),
    ),
]
