"""Predictions: the published tables and volumes, and the rule of bytes they are made with."""

import pytest
import torch

from lab import check, predict, volumes
from lab.case import Sizes
from lab.cases import OPERATIONS, build
from lab.devices import A100, DEVICES, H100
from lab.inventory import OPS
from lab.l2sim import gemm_volume
from peftkit_kernels.core.launch import Target, recording
from peftkit_kernels.low_rank import passes

# speedup over eager torch on each of DEVICES, overhead over the frozen layer
SPEEDUPS = {
    ("lora_linear", 4096, 0.0): (1.17, 1.26, 1.20),
    ("lora_linear", 4096, 0.1): (1.25, 1.38, 1.29),
    ("lora_linear", 1024, 0.0): (1.27, 1.38, 1.31),
    ("lora_linear", 1024, 0.1): (1.55, 1.77, 1.62),
    ("lora_qkv", 4096, 0.0): (1.35, 1.53, 1.41),
    ("lora_qkv", 4096, 0.1): (1.51, 1.77, 1.60),
    ("lora_swiglu_mlp", 14336, 0.0): (1.19, 1.28, 1.22),
    ("lora_swiglu_mlp", 14336, 0.1): (1.23, 1.35, 1.27),
}
OVERHEADS = {
    ("lora_linear", 4096): (0.09, 0.14, 0.11),
    ("lora_linear", 1024): (0.25, 0.40, 0.30),
    ("lora_qkv", 4096): (0.07, 0.12, 0.09),
    ("lora_swiglu_mlp", 14336): (0.02, 0.04, 0.03),
}
PRINTED = 0.015
"""The table is printed to 0.01 (half of that is rounding); filling the GPU with shorter chunks, which it left out, costs 0.01."""


@pytest.mark.parametrize(("op", "N", "p"), [key for key in SPEEDUPS if key[0] in OPS], ids=str)
def test_the_table_of_the_specification(op, N, p):
    for device, speedup in zip(DEVICES, SPEEDUPS[op, N, p], strict=True):
        row = predict.predict(op, op, Sizes(8192, 4096, N, p=p), device)
        assert row["speedup"] == pytest.approx(speedup, abs=PRINTED), device.name
        assert row["unique_bytes"] < 0.7 * row["eager_unique_bytes"]
        if not p:
            overhead = OVERHEADS[op, N][DEVICES.index(device)]
            assert row["overhead"] == pytest.approx(overhead, abs=PRINTED), device.name


@pytest.mark.parametrize(
    ("width", "eager_gib", "fused_gib"),
    [(4096, 2.008, 1.258), (5120, 2.771, 1.836), (8192, 5.289, 4.044)],
)
def test_published_dram_volumes(width, eager_gib, fused_gib):
    """Profiler volumes (H100, 8192 rows, rank 16, dropout, forward and backward) published with LoRAFusion.

    Eager torch's are those of its own ops here. LoRAFusion's kernels are not ours: besides the two products they drop x into a
    copy and a mask, read that copy, and in the backward dy once more and x and the mask.
    """
    case = build(
        "lora_linear",
        "lora_linear",
        Sizes(8192, width, width, p=0.1),
        dtype=torch.bfloat16,
        device="meta",
    )
    eager = predict.kernels_of_torch(case.eager, case, H100)
    assert sum(k.dram_bytes for k in eager) / 2**30 == pytest.approx(eager_gib, rel=0.08)
    x, mask = 8192 * width * 2, 8192 * width
    fused = 2 * gemm_volume(8192, width, width).total_bytes + (2 * x + mask) + x + 2 * x + mask
    assert fused / 2**30 == pytest.approx(fused_gib, rel=0.08)


def test_a_prediction_knows_what_limits_a_kernel():
    streaming = predict.Kernel("copy", 10**9, 10**9, 0)
    assert streaming.seconds(A100) == pytest.approx(1e9 / A100.bytes_per_second)
    product = predict.Kernel("mm", 1, 1, 10**12)
    assert product.seconds(A100) == pytest.approx(1 / (312 * 0.83))
    assert predict.seconds([streaming, product], A100) == pytest.approx(
        streaming.seconds(A100) + product.seconds(A100)
    )


def test_a_small_layer_is_predicted_as_one_kernel():
    case = build(
        "lora_linear", "lora_linear", Sizes(8192, 1024, 1024), dtype=torch.bfloat16, device="meta"
    )
    found = {k.name: k for k in predict.kernels_of_op(case, A100)}
    gemm = found["gemm_lora_kernel"]
    assert gemm.flops == 2 * 8192 * 1024 * 1024
    assert gemm.triton_gemm
    assert gemm.dram_bytes >= gemm.unique_bytes
    assert "mm" not in found
    assert "addmm_" not in found


def test_what_is_changed_in_place_moves_twice():
    y, s, B = (torch.empty(shape, device="meta") for shape in ((64, 48), (64, 16), (48, 16)))
    with recording(Target("cuda:80", 108)) as launches:
        passes.expand(s, B, 1.0)
        passes.expand(s, B, 1.0, out=y, add=True)
    fresh, added = (
        predict.moved_bytes("expand_kernel", predict.arguments_of(launch)) for launch in launches
    )
    assert fresh == 4 * (64 * 48 + 64 * 16 + 48 * 16)
    assert added == fresh + 4 * 64 * 48


def test_launches_are_named_by_their_arguments():
    with recording(Target("cuda:80", 108)) as launches:
        passes.shrink(torch.empty(64, 48, device="meta"), torch.empty(8, 48, device="meta"))
    arguments = predict.arguments_of(launches[0])
    assert (arguments["M"], arguments["K"], arguments["R"]) == (64, 48, 8)
    assert arguments["DROPOUT"] is False


def test_every_op_with_kernels_has_a_case():
    assert OPS.keys() <= OPERATIONS.keys()


@pytest.mark.parametrize("op", OPS)
def test_every_launch_moves_what_the_rule_says(op):
    rows = volumes.rows([op])
    launches = [row for row in rows if row["kernel"].endswith("_kernel")]
    assert launches
    for row in rows:
        assert row["as_formula"], row
        assert row["unique_bytes"] <= row["formula_bytes"]
        assert row["requested_bytes"] >= row["unique_bytes"]
    for row in rows:
        if row["kernel"] == "sum":
            # LayerNorm is one kernel in torch too
            assert row["unique_bytes"] < 1.01 * row["eager_bytes"]


def test_more_or_less_than_the_rule_says_is_noticed(monkeypatch):
    monkeypatch.setattr(volumes, "moved_bytes", lambda kernel, arguments: 17)
    launched, summed = volumes.rows(["int8"])[0::2]
    assert not launched["as_formula"]
    assert not summed["as_formula"]


QUICK_OPS = ("lora_linear", "int8")
"""The values of every op are the matter of its own tests; the rest is checked by `make slow`."""


@pytest.mark.parametrize(
    "op", [op if op in QUICK_OPS else pytest.param(op, marks=pytest.mark.slow) for op in OPS]
)
def test_kernels_pass_their_check(op):
    for row in check.rows([op]):
        assert row["problems"] == []
        assert row["launches"] > 0
        assert 0 <= row["error_over_allowed"] <= 1


def test_a_wrong_value_is_a_problem(monkeypatch):
    monkeypatch.setattr(passes, "keep_scale", lambda p: 1.01 / (1 - p))
    for row in check.rows(["lora_linear"]):
        if row["dtype"] == "float32":
            assert any("has an error of" in problem for problem in row["problems"])


def test_an_exception_is_a_problem(monkeypatch):
    monkeypatch.setattr(passes, "block_r", lambda R: 3)
    rows = check.rows(["lora_linear"])
    assert all(row["problems"] for row in rows)


def test_an_unknown_op_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="op='lora' is unknown; use one of lora_linear, lora_qkv"):
        check.rows(["lora"])
