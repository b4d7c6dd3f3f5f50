"""Adapters on a base that their start has changed: saved and loaded rightly, or refused with a way out."""

import init_cases as cases
import pytest
import torch
import transformers as hf
from peft import PeftModel

from peftkit import ContractError, initialise, load_adapter, load_base, merge

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.saved(tmp_path_factory.mktemp("base"))


def loaded(folder, base="nf4"):
    return load_base(folder, base, dtype="float32")


@pytest.mark.parametrize("base", ["nf4", "int8", "fp32"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2"])
def test_load_adapter_repeats_the_start(folder, base, init, tmp_path):
    model = cases.adapted(folder, base)
    initialise(model, init)
    expected = cases.logits(cases.trained(model))
    model.save_pretrained(tmp_path)
    again = load_adapter(loaded(folder, base), tmp_path)
    assert torch.equal(cases.logits(again), expected)
    # saved again, it still names its base
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(
        cases.logits(load_adapter(loaded(folder, base), tmp_path / "again")), expected
    )


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("weights", [False, True], ids=["decoded", "original"])
def test_the_changed_base_is_saved_and_loaded_with_the_adapter(folder, base, weights, tmp_path):
    model = cases.adapted(folder, base)
    initialise(model, "pissa", folder if weights else None)
    expected = cases.logits(cases.trained(model))
    model.save_pretrained(tmp_path / "adapter")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "plain")
    model.unload().save_pretrained(tmp_path / "base")
    again = load_adapter(load_base(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(cases.logits(again), expected)
    # plain PEFT, whose forward rounds differently
    stock = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, tmp_path / "plain")
    torch.testing.assert_close(cases.logits(stock), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["nf4", "fp32"])
def test_plain_peft_refuses_the_adapter_on_the_unchanged_base(folder, base, tmp_path):
    model = cases.adapted(folder, base)
    initialise(model, "pissa")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="Unknown initialization init_lora_weights='residual:pissa:"
    ):
        PeftModel.from_pretrained(loaded(folder, base), tmp_path)


def test_another_base_is_refused_and_left_unchanged(folder, tmp_path):
    model = cases.adapted(folder, "nf4")
    initialise(model, "pissa", folder)
    cases.trained(model).save_pretrained(tmp_path / "from weights")
    model = cases.adapted(folder, "nf4", "pissa")
    cases.trained(model).save_pretrained(tmp_path / "decoded")
    for name, base, message in (
        ("from weights", "nf4", "needs the base weights with the fingerprint"),
        ("decoded", "int8", "Repeating the initialisation on this base and machine gave"),
        ("decoded", "fp32", "Repeating the initialisation on this base and machine gave"),
    ):
        target = loaded(folder, base)
        before = cases.logits(target)
        with pytest.raises(ContractError, match=message):
            load_adapter(target, tmp_path / name)
        assert torch.equal(cases.logits(target), before)
        assert not hasattr(target, "peft_config")


@pytest.mark.filterwarnings("ignore:.path_initial_model_for_weight_conversion. only works")
def test_conversion_to_plain_lora_is_exact_on_dense_bases_and_refused_on_quantised_ones(
    folder, tmp_path
):
    for base in ("fp32", "nf4"):
        model = cases.adapted(folder, base)
        initialise(model, "pissa")
        mark = model.peft_config["default"].init_lora_weights
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / f"start {base}")
        model.peft_config["default"].init_lora_weights = mark
        expected = cases.logits(cases.trained(model))
        start = {"path_initial_model_for_weight_conversion": str(tmp_path / f"start {base}")}
        if base == "nf4":
            with pytest.raises(ContractError, match="would lack that rounding"):
                model.save_pretrained(tmp_path / base, **start)
            assert torch.equal(cases.logits(model), expected)
            continue
        model.save_pretrained(tmp_path / base, **start)
        converted = load_adapter(loaded(folder, base), tmp_path / base)
        torch.testing.assert_close(cases.logits(converted), expected, rtol=1e-4, atol=1e-4)


def test_loftq_adapters_are_plain_lora(folder, tmp_path):
    model = cases.adapted(folder)
    initialise(model, "loftq", folder)
    expected = cases.logits(cases.trained(model))
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(loaded(folder), tmp_path)
    torch.testing.assert_close(cases.logits(stock), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(cases.logits(load_adapter(loaded(folder), tmp_path)), expected)


def test_merging_a_requantised_base(folder, tmp_path):
    model = cases.trained(cases.adapted(folder, "nf4", "pissa"))
    expected = cases.logits(model)
    found = merge(model, tmp_path / "merged", "fp32")
    assert found.recovery > 0.9999
    merged = cases.logits(load_base(tmp_path / "merged"))
    # a recovery of 0.9999 is an error of a hundredth of the effect
    assert (merged - expected).norm() < 0.01 * found.outputs.effect * expected.norm()


@pytest.mark.parametrize(
    ("init", "base", "reason"),
    [
        ("pissa_niter_4", "fp32", "other random numbers"),
        ("lora_ga", "fp32", "does not subtract the start"),
        ("pissa", "nf4", "trained on a base that is not quantised"),
    ],
)
def test_starts_that_peft_does_not_repeat(folder, init, base, reason, tmp_path):
    model = cases.adapted(folder, "fp32")
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(tmp_path)
    target = loaded(folder, base)
    with pytest.raises(ContractError, match=reason):
        load_adapter(target, tmp_path)
    assert not hasattr(target, "peft_config")
