"""The dense products by either library, and the rule that chooses between them."""

import pytest
import torch

from lab.testing import Bound
from peftkit_kernels import gemm

SIZES = [(0, 5, 7), (1, 1, 1), (3, 17, 5), (64, 64, 64), (65, 257, 31), (200, 33, 129)]


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def library(request, monkeypatch):
    """Both choices, whatever this processor's own is."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: request.param)
    return request.param


def operands(M, N, K, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    x, w, y = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for size in ((M, K), (N, K), (M, N))
    )
    if layout == "transposed":
        x, w = x.t().contiguous().t(), w.t().contiguous().t()
    if layout == "wide_rows":
        x, w = torch.cat([x, x], 1)[:, :K], torch.cat([w, w], 1)[:, :K]
    return x, w, y


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "wide_rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_within_the_error_bound(library, size, dtype, layout):
    x, w, y = operands(*size, dtype, layout)
    product = Bound.of(x) @ Bound.of(w).T
    product.round(dtype).check(gemm.matmul_nt(x, w), "matmul_nt")
    product.round(dtype).check(gemm.matmul_nn(x, w.t()), "matmul_nn")
    bias = y[:1].sum(0)
    biased = Bound.of(bias).addmm(Bound.of(x), Bound.of(w).T).round(dtype)
    biased.check(gemm.matmul_nt(x, w, bias), "matmul_nt with a bias")
    total = Bound.of(y).addmm(Bound.of(x), Bound.of(w).T).round(dtype)
    total.check(gemm.addmm_nt(y.clone(), x, w), "addmm_nt")
    total.check(gemm.addmm_nn(y.clone(), x, w.t()), "addmm_nn")


def test_large_float32_products_alone_go_to_onednn(library):
    ops = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        sees_native_calls = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func.overloadpacket._qualified_op_name)
            return func(*args, **(kwargs or {}))

    def used(size, dtype):
        x, w, y = operands(*size, dtype, "contiguous")
        ops.clear()
        with Recorder():
            gemm.matmul_nt(x, w)
            gemm.addmm_nt(y, x, w)
        return [op.startswith("mkldnn") for op in ops if not op.endswith("::t")]

    assert used((64, 64, 64), torch.float32) == [library, library]
    assert used((64, 64, 63), torch.float32) == [False, False]
    assert used((64, 64, 64), torch.float64) == [False, False]
    assert used((64, 64, 64), torch.bfloat16) == [False, False]


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX512_VNNI", True, True),
        ("GenuineIntel", "AVX512", True, False),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
    ],
)
def test_the_processor_decides(monkeypatch, vendor, capability, mkl, expected):
    monkeypatch.setattr(gemm, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert gemm.prefers_onednn.__wrapped__() == expected


def test_vendor_is_read_where_there_is_one(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: x\n")
    monkeypatch.setattr(gemm, "Path", lambda _: cpuinfo)
    assert gemm.cpu_vendor.__wrapped__() == "AuthenticAMD"
    cpuinfo.write_text("processor\t: 0\n")
    monkeypatch.setattr(gemm.platform, "processor", lambda: "aarch64")
    assert gemm.cpu_vendor.__wrapped__() == "aarch64"


@pytest.mark.parametrize("K", [33, 34, 64, 88])
def test_what_stands_between_rows_of_bfloat16_has_no_effect(K):
    """On processors with AMX, oneDNN multiplies it by zero, and zero times NaN is NaN."""
    wide = torch.full((17, K + 5), torch.nan, dtype=torch.bfloat16)
    wide[:, :K] = torch.randn(17, K)
    x, w = wide[:, :K], torch.randn(29, K, dtype=torch.bfloat16)
    rows = x.contiguous()
    sums = torch.randn(17, 29, dtype=torch.bfloat16)
    for padded, whole in (
        (gemm.matmul_nt(x, w), gemm.matmul_nt(rows, w)),
        (gemm.matmul_nn(x, w.t().contiguous()), gemm.matmul_nn(rows, w.t().contiguous())),
        (gemm.addmm_nt(sums.clone(), x, w), gemm.addmm_nt(sums.clone(), rows, w)),
    ):
        torch.testing.assert_close(padded, whole)
