"""Values of a config that cannot work are named."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig

from peftkit import ContractError
from peftkit.adapter_config import check_sizes, check_values, largest_size, odd_fields, ranks

_FILE = Path("folder/adapter_config.json")


def _raises(*parts: str):
    return pytest.raises(ContractError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@pytest.mark.parametrize("r", [0, -1, 8.0, "16", True, None, [8]])
def test_ranks_that_are_no_ranks(r):
    with _raises("folder/adapter_config.json: r=", repr(r), "at least 1"):
        check_values(_FILE, {"peft_type": "LORA", "r": r})
    with _raises("rank_pattern['q_proj']=", repr(r)):
        check_values(_FILE, {"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": r}})


def test_orthogonal_adapters_have_a_rank_of_zero_if_their_blocks_have_a_size():
    check_values(_FILE, {"peft_type": "OFT", "r": 0, "oft_block_size": 8})
    with _raises("r=-1"):
        check_values(_FILE, {"peft_type": "OFT", "r": -1})


@pytest.mark.parametrize("value", ["16", None, True, [1]])
def test_factors_that_are_no_numbers(value):
    for field in ("lora_alpha", "alpha"):
        with _raises(f"{field}={value!r}", "must be a number"):
            check_values(_FILE, {field: value})
    with _raises("alpha_pattern['a']="):
        check_values(_FILE, {"lora_alpha": 1, "alpha_pattern": {"a": value}})


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.1", True])
@pytest.mark.parametrize("field", ["lora_dropout", "module_dropout"])
def test_probabilities_that_are_none(field, value):
    with _raises(f"{field}={value!r}", "from 0 to 1"):
        check_values(_FILE, {field: value})


@pytest.mark.parametrize("value", ["(", "[", "*a", "a{99999999999}"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_broken_regular_expressions(field, value):
    with _raises(f"{field}={value!r}", "regular expression"):
        check_values(_FILE, {field: value})


def test_values_that_work():
    for written in (
        LoraConfig(r=4, lora_dropout=0.5, target_modules=".*q", rank_pattern={"a": 2}).to_dict(),
        {"lora_alpha": 0.5, "lora_dropout": 1, "target_modules": ["("], "hidden_dropout": None},
        {},
    ):
        check_values(_FILE, written)


def test_sizes_beyond_the_checkpoint():
    with _raises("r=1000000", "have only 100 elements in all"):
        check_sizes(_FILE, {"r": 10**6}, 100)
    with _raises("nested['a']=1000000"):
        check_sizes(_FILE, {"nested": {"a": [1, 10**6]}}, 100)
    check_sizes(_FILE, {"r": 10**6}, 10**7)
    check_sizes(_FILE, {"projection_prng_key": 10**9, "lora_alpha": 10**6, "seed": 10**9}, 100)


def test_sizes_and_ranks_of_a_config():
    written = {"peft_type": "LORA", "r": 8, "rank_pattern": {"q": 64}, "lora_alpha": 999, "a": True}
    assert largest_size(written) == 64
    assert ranks(written) == {8, 64}
    assert ranks({**written, "peft_type": "LOHA"}) == set()


def test_fields_of_another_type_are_named_with_the_type():
    good = {
        k: list(v) if isinstance(v, set) else v
        for k, v in LoraConfig(target_modules=["q"]).to_dict().items()
    }
    assert odd_fields(LoraConfig, {**good, "unknown": object()}) == []
    odd = odd_fields(
        LoraConfig, {**good, "r": "16", "rank_pattern": 3, "use_dora": "yes", "bias": 1}
    )
    assert sorted(entry.partition(":")[0] for entry in odd) == [
        "bias=1",
        "r='16'",
        "rank_pattern=3",
        "use_dora='yes'",
    ]
    assert "r='16': PEFT expects int" in odd
