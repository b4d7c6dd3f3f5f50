"""The benchmark of the host's time: it takes the way of a GPU, counts every launch, and plans each call once."""

import json
import sys

import pytest
import torch
from test_benchmarks import load_script

from peftkit_kernels.core.launch import Target, counting, runs_dry
from peftkit_kernels.core.plan import Plans
from peftkit_kernels.low_rank import LoRA
from peftkit_kernels.ops import bottleneck, grouped_lora, prefix_attention
from peftkit_kernels.ops.lora_linear import lora_linear

H100 = Target("cuda:90", 132)


@pytest.fixture(scope="module")
def host():
    return load_script("host")


@pytest.fixture
def quick(host, monkeypatch):
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "ROUNDS", 1)
    monkeypatch.setattr(host, "save", lambda result, name: None)
    return host


def test_rows_and_the_launches_of_today(quick, tmp_path, capsys):
    file = tmp_path / "host.json"
    quick.run(quick.argparse.Namespace(json=file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == list(quick.CASES)
    assert all(row["peftkit_us"] > 0 and row["peft_us"] > 0 for row in rows)
    launches = [row["launches"] for row in rows]
    assert launches[0] <= 8
    assert launches[2] <= 42
    assert capsys.readouterr().out.count("|") == 6 * (2 + len(rows))


def _linear():
    x = torch.randn(8, 32, requires_grad=True)
    lora = LoRA(torch.randn(4, 32).requires_grad_(), torch.randn(16, 4).requires_grad_(), 1.0)
    return x, torch.randn(16, 32), lora


def test_counting_takes_the_way_of_a_gpu_on_any_device():
    x, weight, lora = _linear()
    with counting(H100) as counter:
        assert runs_dry()
        lora_linear(x, weight, None, lora).sum().backward()
        first = counter.launches
        lora_linear(x, weight, None, lora).sum().backward()
    assert not runs_dry()
    assert counter.launches == 2 * first > 0
    assert lora.A.grad.shape == lora.A.shape


def test_a_repeated_call_does_not_run_the_schedule_again(monkeypatch):
    x, weight, lora = _linear()
    with counting(H100):
        lora_linear(x, weight, None, lora).sum().backward()
        monkeypatch.setattr(Plans, "_record", None)
        lora_linear(x, weight, None, lora).sum().backward()


def _bottleneck():
    h, down, up = torch.randn(8, 32), torch.randn(4, 32), torch.randn(32, 4)
    return lambda: bottleneck.bottleneck(h, down.requires_grad_(), None, up, None)


def _grouped_lora():
    x, A, B = torch.randn(8, 32), torch.randn(2, 4, 32), torch.randn(2, 16, 4)
    plan, y = grouped_lora.plan_groups(torch.arange(8) % 2, 2), torch.randn(8, 16)
    return lambda: grouped_lora.grouped_lora(y, x, A.requires_grad_(), B, torch.ones(2), plan)


def _prefix_attention():
    # of tensors that share memory no plan is made
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    prefix_k, prefix_v = torch.randn(2, 3, 8).requires_grad_(), torch.randn(2, 3, 8)
    return lambda: prefix_attention.prefix_attention(q, k, v, prefix_k, prefix_v, 0.3)


@pytest.mark.parametrize(
    ("op", "make"),
    [
        (bottleneck, _bottleneck),
        (grouped_lora, _grouped_lora),
        (prefix_attention, _prefix_attention),
    ],
    ids=["bottleneck", "grouped_lora", "prefix_attention"],
)
def test_a_repeated_call_is_not_checked_again(op, make, monkeypatch):
    call, module = make(), sys.modules[f"{op.__name__}.op"]
    with counting(H100) as counter:
        call().sum().backward()
        first = counter.launches
        monkeypatch.setattr(module, "choose_backend", None)
        call().sum().backward()
        assert counter.launches == 2 * first > 0
        # another signature is checked
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError):
            call()
