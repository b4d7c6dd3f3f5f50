"""The traffic counter: exact bytes, and each kind of fault found."""

import lab_kernels as kernels
import pytest
import torch
import torch.nn.functional as F
from triton.runtime.errors import InterpreterError

from lab.eager import EagerTraffic
from lab.interp import faithful
from lab.traffic import Traffic

M, N, K, BLOCK = 96, 80, 72, 32


def matmul(x, w, y, *, K=K, stride_x=None, stride_y=N, rows=M):
    stride_x = x.stride(0) if stride_x is None else stride_x
    sizes = rows, N, K, stride_x, w.stride(0), stride_y
    grid = -(-rows // BLOCK), -(-N // BLOCK)
    kernels.matmul_nt[grid](x, w, y, *sizes, BLOCK, BLOCK, BLOCK, "ieee")


def operands(dtype=torch.float32):
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.zeros(M, N, dtype=dtype)


def findings(launch):
    return {(found.kind, found.argument) for found in launch.findings}


def test_counts_are_exact():
    x, w, y = operands(torch.bfloat16)
    with Traffic() as traffic, faithful():
        matmul(x, w, y)
    (launch,) = traffic.check().launches
    x, w, y = (launch.arguments[name] for name in ("x_ptr", "w_ptr", "y_ptr"))
    assert x.load.requested_bytes == 2 * M * K * 3
    assert x.load.unique_bytes == 2 * M * K
    assert w.load.requested_bytes == 2 * N * K * 3
    assert y.store.requested_bytes == y.store.unique_bytes == 2 * M * N
    assert x.store.requested_bytes == y.load.requested_bytes == 0
    assert traffic.unique_bytes == launch.total() == 2 * (M * K + N * K + M * N)
    assert launch.grid == (3, 3, 1)
    assert launch.dot_flops == 2 * 96 * 96 * 96  # issued, padding included
    assert x.load.lanes == 3 * M * 96
    assert x.load.active_lanes == 3 * M * K


def test_sectors_show_what_does_not_coalesce():
    x, y = torch.randn(64, 8), torch.zeros(64, 8)
    column = torch.zeros(64, 16)[:, 3:4]
    with Traffic() as traffic, faithful():
        kernels.copy_row[(64,)](x, y, 8, 8, 8, True)
        kernels.copy_row[(64,)](column, torch.zeros(64, 16)[:, :1], 1, 16, 8, True)
    rows, columns = (launch.arguments["x_ptr"].load for launch in traffic.check().launches)
    assert rows.sector_bytes == rows.requested_bytes == 64 * 8 * 4
    assert (columns.requested_bytes, columns.sector_bytes) == (64 * 4, 64 * 32)


def test_reading_beyond_the_rows_of_a_view_is_found():
    wide = torch.randn(M, K + 8)
    _, w, y = operands()
    with Traffic() as traffic, faithful(), pytest.raises(InterpreterError, match="outside"):
        matmul(wide[:, :K], w, y, K=K + 4)
    (launch,) = traffic.launches
    assert ("out of bounds", "x_ptr") in findings(launch)
    assert "gaps of a strided view" in launch.findings[0].message
    with pytest.raises(AssertionError, match="matmul_nt: out of bounds on x_ptr"):
        launch.check()


def test_touching_foreign_memory_is_refused():
    x, w, y = operands()
    with Traffic() as traffic, faithful(), pytest.raises(InterpreterError, match="outside every"):
        matmul(x, w, y, rows=M + BLOCK)
    assert ("out of bounds", "x_ptr") in findings(traffic.launches[0])
    with pytest.raises(AssertionError, match="bytes from its start"):
        traffic.check()


def test_two_programs_storing_to_one_element_race():
    with Traffic() as traffic, faithful():
        kernels.write_program_id[(3,)](torch.zeros(8), 8)
        x, w, y = operands()
        matmul(x, w, y, stride_y=0)
    assert findings(traffic.launches[0]) == {("race", "y_ptr")}
    assert findings(traffic.launches[1]) == {("race", "y_ptr"), ("duplicate", "y_ptr")}


@pytest.mark.parametrize("order", [None, "reverse"])
def test_reading_what_another_program_stores_is_a_race(order):
    with Traffic() as traffic, faithful(order=order):
        kernels.shift[(3,)](torch.randn(32), 8)
    assert findings(traffic.launches[0]) == {("race", "x_ptr")}


def test_atomics_may_meet_each_other_only():
    x = torch.ones(32)
    for plain in (False, True):
        n = torch.zeros(1)
        with Traffic() as traffic, faithful():
            kernels.count[(4,)](x, n, 8, plain)
        assert findings(traffic.launches[0]) == ({("race", "n_ptr")} if plain else set())
        atomic = traffic.launches[0].arguments["n_ptr"].atomic
        assert (atomic.requested_bytes, atomic.unique_bytes) == (16, 4)
    assert n.item() == 0.0


def test_interleaved_views_are_told_apart():
    pair = torch.zeros(64, 2, 8)
    x = torch.randn(64, 8)
    with Traffic() as traffic, faithful():
        kernels.copy_row[(64,)](pair[:, 0], pair[:, 1], 8, 16, 8, True)
        kernels.copy_row[(64,)](x, pair[:, 1], 8, 8, 8, True)
    good, bad = traffic.launches
    assert good.check().arguments["y_ptr"].store.unique_bytes == 64 * 8 * 4
    assert ("out of bounds", "y_ptr") in findings(bad)


def test_no_launch_is_no_proof():
    with Traffic() as traffic:
        pass
    with pytest.raises(AssertionError, match="no kernel was launched"):
        traffic.check()


def test_torch_ops_are_counted_by_the_same_rule():
    x, weight = torch.randn(64, 48), torch.randn(80, 48)
    with EagerTraffic() as traffic:
        y = F.silu(F.linear(x, weight)) * 2.0
        y.t().reshape(-1)[:1].zero_()
        y.addmm_(x, weight.t())
    names = [op.name for op in traffic.ops]
    assert names == ["mm", "silu", "mul", "clone", "zero_", "addmm_"]
    product, silu, _, clone, zero, addmm = traffic.ops
    assert product.flops == addmm.flops == 2 * 64 * 48 * 80 == traffic.flops // 2
    assert product.read_bytes == 4 * (64 * 48 + 80 * 48)
    assert silu.read_bytes == silu.written_bytes == clone.written_bytes == 4 * 64 * 80
    assert (zero.read_bytes, zero.written_bytes) == (0, 4)
    assert addmm.read_bytes == 4 * (64 * 80 + 64 * 48 + 80 * 48)


def test_torch_ops_on_meta_tensors_are_counted():
    x = torch.empty(8192, 4096, device="meta", dtype=torch.bfloat16)
    with EagerTraffic() as traffic:
        F.linear(x, torch.empty(1024, 4096, device="meta", dtype=torch.bfloat16))
        x.new_empty(1, 4096).expand(8192, 4096) + x
    product, addition = traffic.ops
    assert product.flops == 2 * 8192 * 4096 * 1024
    assert addition.read_bytes == 2 * (4096 + 8192 * 4096)


def test_products_are_counted_below_autograd_too():
    x, weight = torch.randn(64, 48), torch.randn(80, 48)
    with torch._C._AutoDispatchBelowAutograd(), EagerTraffic() as traffic:
        F.linear(x, weight)
        x @ weight.t()
    assert [op.product for op in traffic.ops] == [(64, 80, 48)] * 2
    assert traffic.flops == 2 * 2 * 64 * 48 * 80
    with torch._C._AutoDispatchBelowAutograd(), EagerTraffic() as traffic:
        torch.ops.aten.silu_backward(x, x)  # taken apart by some, and one kernel all the same
    assert [op.name for op in traffic.ops] == ["silu_backward"]


def test_torch_ops_in_place_of_a_sum_without_its_start():
    x = torch.randn(8, 8)
    with EagerTraffic() as traffic:
        torch.addmm(x, x.clone(), x.clone(), beta=0)
        torch.ones(3).copy_(torch.zeros(3))
    assert traffic.ops[2].read_bytes == 2 * 4 * 64
    assert (traffic.ops[-1].read_bytes, traffic.ops[-1].written_bytes) == (12, 12)


def test_of_our_own_ops_what_they_are_made_of_is_counted():
    from peftkit_kernels.low_rank import LoRA
    from peftkit_kernels.ops.lora_linear import lora_linear

    x, A, B = torch.zeros(2, 2100, requires_grad=True), torch.zeros(1, 2100), torch.zeros(3, 1)
    weight, lora = torch.zeros(3, 2100), LoRA(A.requires_grad_(), B.requires_grad_(), 1.0)
    with EagerTraffic() as torch_ops, Traffic() as traffic, faithful():
        y = lora_linear(x, weight, None, lora, backend="triton")
        torch.autograd.grad(y, (x, lora.A, lora.B), torch.ones_like(y))
    kernels_run = [launch.kernel for launch in traffic.check().launches]
    assert {"shrink_kernel", "expand_kernel", "tall_kernel"} <= set(kernels_run)
    products = [op for op in torch_ops.ops if op.flops]
    assert [op.product for op in products] == [(2, 3, 2100), (2, 2100, 3)]
