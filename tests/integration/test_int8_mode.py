"""``int8_mode``: 8-bit linears multiplied in 8 bits in both directions, or decoded, in training and evaluation."""

import copy

import models
import pairs
import pytest
import torch
from integration.test_bnb_joined import loaded, pair, saved, step  # noqa: F401 - a fixture

from peftkit import ContractError, LoraConfig, accelerate, explain, restore, wrap
from peftkit_kernels.storage.int8 import Int8ComputeWeight
from peftkit_kernels.storage.int8.product import torch_impl as products

LINEARS = 2 * 7


def adapters(model):
    return [row for row in explain(model).layers if row.is_adapter]


@pytest.fixture
def counted(monkeypatch):
    """How often inputs and gradients were quantised."""
    calls = {"quantize_input": 0, "input_grad": 0}

    def counting(name, run):
        def count(*args):
            calls[name] += 1
            return run(*args)

        return count

    for name in calls:
        monkeypatch.setattr(products, name, counting(name, getattr(products, name)))
    return calls


def test_products_in_8_bits_in_both_directions(saved, counted):  # noqa: F811
    stock, fused = pair(saved, 8)
    expected = step(fused)
    assert counted == {"quantize_input": 0, "input_grad": 0}
    accelerate(fused, int8_mode="compute", strict=True)
    found = step(fused)
    # the inputs of q, k and v; of o; of gate and up; of down. Nothing trained is below the first q, k and v
    assert counted == {"quantize_input": 2 * 4, "input_grad": LINEARS - 3}
    for name, value in expected.items():
        assert not torch.equal(found[name], value)
        cosine = torch.cosine_similarity(found[name].flatten(), value.flatten(), dim=0)
        assert cosine > 0.99, name
    assert step(stock).keys() == found.keys()


@pytest.mark.parametrize("mode", ["compute", "weight-only"])
def test_a_mode_holds_in_evaluation_too(saved, mode):  # noqa: F811
    _, fused = pair(saved, 8)
    ids = torch.arange(24).view(2, 12) % 60
    accelerate(fused, int8_mode=mode)
    trained = fused(input_ids=ids).logits
    fused.eval()
    assert {row.path for row in adapters(fused)} == {"fused:torch"}
    assert torch.equal(fused(input_ids=ids).logits, trained)
    restore(fused)
    assert not any("int8_mode" in key for m in fused.modules() for key in m.__dict__)


def test_without_a_mode_evaluation_is_that_of_bitsandbytes(saved):  # noqa: F811
    _, fused = pair(saved, 8)
    fused.eval()
    assert all("int8_mode" in row.reason for row in adapters(fused))


def test_a_mode_is_kept_by_copies_and_by_later_calls(saved):  # noqa: F811
    model = wrap(loaded(saved, 8), LoraConfig(r=4), int8_mode="compute")
    again = accelerate(copy.deepcopy(model))
    for one in (model, again):
        layer = one.base_model.model.model.layers[0].mlp.down_proj
        weight = layer.peftkit_plan(torch.zeros(2, 128)).weight
        assert type(weight) is Int8ComputeWeight
        assert weight.backward_in_8_bits
        assert weight.threshold == 6.0


def test_dora_decodes_the_weight(saved):  # noqa: F811
    _, fused = pair(saved, 8, use_dora=True)
    accelerate(fused, int8_mode="compute", strict=True)
    expected = step(fused)
    accelerate(fused, int8_mode="weight-only", strict=True)
    pairs.assert_equal(step(fused), expected)


def test_dora_is_evaluated_more_than_once(saved):  # noqa: F811
    # Stock PEFT 0.21 cannot on a CPU: the second forward finds no row factors.
    _, fused = pair(saved, 8, use_dora=True)
    ids = torch.arange(12)[None]
    trained = step(fused)
    fused.eval()
    with torch.no_grad():
        first, second = (fused(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)
    fused.train()
    pairs.assert_equal(step(fused), trained)


def test_under_autocast(saved):  # noqa: F811
    _, fused = pair(saved, 8)
    accelerate(fused, int8_mode="compute", strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(fused)
    for name, value in step(fused).items():
        cosine = torch.cosine_similarity(found[name].float().flatten(), value.flatten(), dim=0)
        assert cosine > 0.97, name


@pytest.mark.parametrize(
    ("mode", "bits", "message"),
    [
        ("fast", 8, r"int8_mode='fast' is unknown; use one of 'compute', 'weight-only', or None"),
        ("compute", 4, r"int8_mode='compute', but the model has no 8-bit linear of bitsandbytes"),
    ],
)
def test_a_mode_that_means_nothing_is_refused(saved, mode, bits, message):  # noqa: F811
    model = loaded(saved, bits)
    with pytest.raises(ContractError, match=message):
        wrap(model, LoraConfig(r=4), int8_mode=mode)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_model_without_bitsandbytes_is_refused():
    with pytest.raises(ContractError, match="no 8-bit linear"):
        wrap(models.tiny("llama"), LoraConfig(r=4), int8_mode="weight-only")
