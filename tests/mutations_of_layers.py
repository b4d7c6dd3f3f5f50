"""Bugs for the kernels between the products of a decoder layer: the norms, the rotation and the gate."""

from mutation import bugs_of, tests_of

_norm = tests_of("frozen_norm")
_ROTATE = tests_of("lora_decoder_layer")("the_rotation_in_place_and_its_transpose")
_HEADS = tests_of("lora_decoder_layer")("norms_of_heads_before_the_rotation_and_their_gradient")
_gate = tests_of("lora_swiglu_mlp")

MUTATIONS_OF_LAYERS = [
    *bugs_of(
        "ops.lora_decoder_layer.kernels",
        "rotate_kernel",
        ("stride", "rows[:, None] * stride_km", "rows[:, None] * stride_qm", _ROTATE),
        ("tile", "(head - q_heads) * D", "head * D", _ROTATE),
        ("stride", "raw_k_ptr, stride_rkm", "raw_k_ptr, stride_rqm", _HEADS),
        ("mask", "(offs_d < half)[None, :]", "(offs_d < D)[None, :]", _ROTATE),
        ("race", "tl.program_id(0) * BLOCK_M", "tl.program_id(0) * BLOCK_M // 2", _ROTATE),
        ("int32", "rows = offs_m.to(tl.int64)", "rows = offs_m", _ROTATE),
    ),
    *bugs_of(
        "ops.lora_decoder_layer.kernels",
        "_rotate",
        ("stride", "rows % S * stride_cs", "rows * stride_cs", _ROTATE),
        ("scale", "second * sin_second", "second * sin_first", _ROTATE),
        ("rule", "second * cos_second + first", "second * cos_second - first", _ROTATE),
        ("rule", "first * cos_first - second", "first * cos_first + second", _ROTATE),
        ("tile", "tl.load(sin_ptrs + half", "tl.load(sin_ptrs", _ROTATE),
        (
            "stride",
            "rows[:, None] * stride_rm",
            "rows[:, None] * column",
            _HEADS,
        ),
        ("tile", "w_ptr + half, offs_d", "w_ptr, offs_d", _HEADS),
        ("scale", "dots / (2 * half)", "dots / half", _HEADS),
        ("rule", "new_second - n_second * mean", "new_second", _HEADS),
        ("rule", "tl.sum(n_second * n_second, 1)", "tl.sum(n_first * n_first, 1)", _HEADS),
    ),
    *bugs_of(
        "ops.frozen_norm.kernels",
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
        (
            "rule",
            "x = total.to(tl.float32)",
            "x = x",
            _norm("residuals_are_added_in_the_same_pass"),
        ),
        (
            "stride",
            "rows * stride_rm",
            "rows * stride_xm",
            _norm("residuals_are_added_in_the_same_pass"),
        ),
    ),
    *bugs_of(
        "ops.frozen_norm.kernels",
        "norm_backward_kernel",
        ("stride", "rows * stride_dym", "rows * stride_dxm", _norm("within_the_error_bound")),
        ("scale", "dx *= rstd", "dx *= 1.0", _norm("within_the_error_bound")),
        (
            "stride",
            "rows * stride_rm",
            "rows * stride_xm",
            _norm("residuals_are_added_in_the_same_pass"),
        ),
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
    *bugs_of(
        "ops.lora_swiglu_mlp.kernels",
        "gate_forward_kernel",
        (
            "stride",
            "up_ptr + rows * stride_up_m",
            "up_ptr + rows * F",
            _gate("within_the_error_bound"),
        ),
        ("mask", "mask_f = offs_f < F", "mask_f = offs_f < F + 1", _gate("within_the_error_bound")),
        ("scale", "(s_down * factor)", "s_down", _gate("within_the_error_bound")),
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
    *bugs_of(
        "ops.lora_swiglu_mlp.kernels",
        "gate_backward_kernel",
        (
            "stride",
            "rows * stride_dm",
            "rows * stride_gate_m",
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
        ("rule", "dh * up * slope", "dh * up", _gate("within_the_error_bound")),
    ),
]
