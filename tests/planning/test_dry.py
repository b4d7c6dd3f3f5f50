"""Runs without computing: tensors without memory live as long as real ones, and nothing of them is left."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from peftkit.planning.dry import DryRun
from peftkit.planning.ledger import Ledger
from peftkit.planning.tensors import has_no_values
from peftkit_kernels import native
from peftkit_kernels.core import workspace

HUGE = 2**22  # rows of 1,024 float32 numbers: 16 GiB


def live(ledger):
    gc.collect()
    return sum(block.size for block in ledger.blocks())


def test_tensors_larger_than_the_machine_have_sizes_and_plain_types():
    ledger = Ledger()
    with DryRun(ledger.watch):
        x = torch.empty(HUGE, 1024)
        y = F.linear(x, torch.empty(512, 1024)).relu()
    assert type(y) is torch.Tensor
    assert y.shape == (HUGE, 512)
    assert y.is_cpu
    assert y.data_ptr()
    assert has_no_values(y)
    assert live(ledger) == 4 * HUGE * (1024 + 512)


def test_views_and_results_in_place_share_memory_and_free_it_last():
    ledger = Ledger()
    with DryRun(ledger.watch):
        x = torch.empty(1000, 1000)
        view = x[10:].transpose(0, 1)
        same = x.mul_(2)
        assert same is x
        before = live(ledger)
        del x, same
        assert live(ledger) == before == 4_000_000
        del view
    assert live(ledger) == 0


def test_whole_numbers_and_single_numbers_are_computed():
    with DryRun(Ledger().watch):
        ids = torch.arange(1000).remainder(7)
        assert int(ids.max()) == 6
        assert float(torch.tensor(0.5) + 1) == 1.5
        assert bool((ids < 7).all())
        chosen = torch.empty(1000, 4096)[ids == 3]
    assert chosen.shape == (143, 4096)


def test_what_is_kept_for_backward_lives_until_the_backward():
    ledger = Ledger()
    with DryRun(ledger.watch):
        x = torch.empty(512, 512, requires_grad=True)
        y = (x * 2).exp().sum()
        kept = live(ledger)
        y.backward()
        assert live(ledger) == kept  # the result of exp is gone, the gradient is there
        assert x.grad.shape == x.shape


def _deep_sums():
    x = torch.empty(1024, 1024, requires_grad=True)
    y = x * 1
    (y.sin() + y.cos() + y.exp()).sum().backward()


def _gathered():
    x = torch.empty(64, 4096, requires_grad=True)
    (x * 1).gather(1, torch.arange(4096).expand(256, 64, 4096)[0]).sum().backward()


@pytest.mark.parametrize("step", [_deep_sums, _gathered])
def test_allocations_of_the_backward_are_those_of_a_real_run(step):
    """Autograd adds gradients in place in a real run, but not inside a dispatch mode."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    real = [e.nbytes() for e in events if e.name() == "[memory]" and abs(e.nbytes()) > 2**10]
    ledger = Ledger()
    with DryRun(ledger.watch):
        step()
    assert [e.change for e in ledger.events if abs(e.change) > 2**10] == real


def test_native_code_is_not_called_and_buffers_are_put_back():
    if native.obstacle() is not None:
        pytest.skip(native.obstacle())
    buffer = workspace.take((8,), torch.float32, torch.device("cpu")).fill_(3.0)
    weight, eps = torch.ones(64), 1e-6
    with DryRun(Ledger().watch):
        x = torch.empty(4096, 64)
        assert native.supports(x)
        y, _ = native.rms_norm(x, weight, eps, 0.0)
        inside = workspace.take((8,), torch.float32, torch.device("cpu"))
        assert inside.data_ptr() != buffer.data_ptr()
    assert has_no_values(y)
    again = workspace.take((8,), torch.float32, torch.device("cpu"))
    assert again.data_ptr() == buffer.data_ptr()
    assert again.tolist() == [3.0] * 8
    real, _ = native.rms_norm(torch.ones(4, 64), weight, eps, 0.0)
    torch.testing.assert_close(real, torch.ones(4, 64), atol=1e-5, rtol=0)
