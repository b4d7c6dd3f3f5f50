"""Which backend runs, and the sentences saying why another one cannot."""

import importlib.util

import pytest
import torch
from triton import knobs

from peftkit_kernels.core import dispatch
from peftkit_kernels.core.dispatch import choose_backend, triton_obstacle

X = torch.zeros(2, 2)


@pytest.fixture(autouse=True)
def _asked_anew():
    dispatch._cached_device_obstacle.cache_clear()
    yield
    dispatch._cached_device_obstacle.cache_clear()


def test_the_interpreter_runs_on_the_cpu_when_asked():
    assert triton_obstacle("op", X) is None
    assert choose_backend("op", "triton", X) == "triton"
    assert choose_backend("op", "auto", X) == "torch"
    assert choose_backend("op", "reference", X) == "reference"


@pytest.mark.parametrize(
    ("tensors", "rank", "sentence"),
    [
        ((), 0, "op has no Triton kernel in this release"),
        ((X.double(),), 0, "its input is torch.float64; the kernels compute in bfloat16, float16"),
        ((X, None, X.to("meta")), 0, "its tensors are on cpu and meta; a kernel needs them on one"),
        ((X,), 513, "the rank is 513; its kernels compute up to 512"),
        ((X.to("meta"),), 0, "its tensors are on meta, where Triton runs only in its interpreter"),
    ],
)
def test_obstacles(tensors, rank, sentence):
    assert triton_obstacle("op", *tensors, rank=rank).startswith(sentence)
    with pytest.raises(
        ValueError, match=f"^backend='triton': op cannot run on it: .*{sentence[:20]}"
    ):
        choose_backend("op", "triton", *tensors, rank=rank)
    assert choose_backend("op", "auto", *tensors, rank=rank) == "torch"


def test_ops_that_hold_all_ranks_in_registers_have_a_lower_limit():
    for op in ("grouped_lora", "linear_cross_entropy"):
        assert "up to 128" in triton_obstacle(op, X, rank=129)


def test_an_obstacle_only_the_op_knows():
    assert triton_obstacle("op", X, own_obstacle="its rows are long") == "its rows are long"
    with pytest.raises(ValueError, match="op cannot run on it: its rows are long; use"):
        choose_backend("op", "triton", X, own_obstacle="its rows are long")
    assert choose_backend("op", "auto", X, own_obstacle="its rows are long") == "torch"


def test_without_the_interpreter_the_cpu_is_one(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert "TRITON_INTERPRET=1, set before triton is imported" in triton_obstacle("op", X)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_obstacle("op", X) == "Triton is not installed"


@pytest.mark.parametrize(
    ("capability", "dtype", "has_dot", "sentence"),
    [
        ((8, 0), torch.bfloat16, True, None),
        ((7, 5), torch.float16, False, None),
        ((7, 5), torch.bfloat16, False, "this GPU (sm_75) has no bfloat16 arithmetic"),
        ((7, 5), torch.float16, True, "Triton has no tensor-core products on this GPU (sm_75)"),
    ],
)
def test_old_gpus(monkeypatch, capability, dtype, has_dot, sentence):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    found = dispatch._device_obstacle("cuda", 0, dtype, has_dot)
    assert found is None if sentence is None else found.startswith(sentence)


def test_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch._device_obstacle("cuda", 0, torch.bfloat16, True) is None
