"""Loops over blocks: a dry run of three iterations records what one of all records, and real runs are not shortened."""

import pytest
import torch
from peft import LoraConfig
from planning import cases

from peftkit import plan
from peftkit.planning.dry import DryRun
from peftkit.planning.ledger import Ledger
from peftkit_kernels import low_rank
from peftkit_kernels.core import blocks
from peftkit_kernels.core.blocks import starts

_WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}


def test_a_real_loop_is_whole_and_a_dry_one_counts_what_it_leaves_out():
    assert list(starts(10, 3)) == [0, 3, 6, 9]
    mode = DryRun(Ledger().watch)
    with mode:
        assert list(starts(9, 3)) == [0, 3, 6]
        seen = [(start, mode.times_run) for start in starts(10, 2)]
        assert list(starts(0, 2)) == []
        nested = [mode.times_run for _ in starts(10, 2) for _ in starts(12, 2)]
    assert seen == [(0, 1), (2, 3), (8, 1)]
    assert nested == [1, 4, 1, 3, 12, 3, 1, 4, 1]
    assert mode.times_run == 1


def _fail(mode):
    for start in starts(10, 2):
        if start:
            raise ValueError(mode.times_run)


def test_an_error_in_a_dry_loop_leaves_the_count_as_it_was():
    with DryRun(Ledger().watch) as mode, pytest.raises(ValueError, match="3"):
        _fail(mode)
    assert mode.times_run == 1


def test_values_of_a_real_loop_are_those_of_all_blocks():
    torch.manual_seed(0)
    x, A = torch.randn(4096, 512).bfloat16(), torch.randn(4, 512)
    assert len(list(low_rank.blocks(x))) > 4
    torch.testing.assert_close(low_rank.shrink(x, A), x.float() @ A.t())


@pytest.mark.parametrize(
    ("base", "device", "options"),
    [
        ("bf16", "cpu", {}),
        ("int8", "cpu", {"checkpointing": True}),
        ("nf4", "cpu", {"use_dora": True}),
        ("bf16", "T4", {}),
        ("bf16", "H100", {"use_dora": True}),
    ],
)
def test_a_plan_with_shortened_loops_is_that_of_all_iterations(monkeypatch, base, device, options):
    monkeypatch.setattr(low_rank.torch_impl, "_GPU_BLOCK", 2**18)
    options = dict(options)
    adapters = LoraConfig(r=4, target_modules="all-linear", use_dora=options.pop("use_dora", False))
    config = cases.llama(2, **_WIDE, max_position_embeddings=4096)
    config.dtype = torch.bfloat16
    given = {"base": base, "device": device, "batch_size": 3, "seq_len": 2100} | options
    plan(config, adapters, **given)  # fills caches, which later plans find
    short = plan(config, adapters, **given)
    calls = []
    monkeypatch.setattr(blocks, "innermost_mode", lambda: calls.append(1))
    whole = plan(config, adapters, **given)
    assert calls
    assert short == whole
