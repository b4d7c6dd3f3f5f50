"""LoRA on stacks of experts in four bits: the numbers of the decoded stacks, without keeping them."""

import copy

import expert_cases as cases
import models
import pairs
import pytest
import torch
from peft import LoraConfig

from peftkit import ContractError, explain, load_adapter, load_base, restore, wrap
from peftkit.fuse import packed as implementation

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes):
    return LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **changes)


def adapted(model, **changes):
    torch.manual_seed(1)
    return wrap(model, config(**changes), logit_free=False).train()


def second_config(model):
    """For another adapter of the same layers; plain PEFT does not know peftkit's all-linear."""
    first = model.peft_config["default"]
    return config(
        target_modules=first.target_modules, target_parameters=list(first.target_parameters)
    )


def packed(name, folder):
    return load_base(cases.saved(name, folder), "nf4")


def step(model, seed=0):
    return pairs.step(model, models.batch("llama", seed), pairs.loss_from_logits)


def logits(model):
    with torch.no_grad():
        return model.train()(input_ids=models.batch("llama")["input_ids"]).logits


@pytest.mark.parametrize("name", cases.NAMES)
@pytest.mark.parametrize(
    "targets",
    [None, ["experts.gate_up_proj"], ["experts.down_proj"]],
    ids=["all linear", "up", "down"],
)
def test_a_step_equals_that_on_the_decoded_stacks(name, targets, tmp_path):
    """The same sums of the same products; ``test_experts`` compares them with PEFT's."""
    base = packed(name, tmp_path)
    dense = cases.decoded(base, tmp_path)
    changes = {} if targets is None else {"target_modules": [], "target_parameters": targets}
    model, twin = adapted(base, **changes), adapted(dense, **changes)
    report = explain(model)
    assert report.fused_fraction == 1.0
    assert not report.trained_in_full
    assert report.left_out.keys() == explain(twin).left_out.keys()
    actual, expected = step(model), step(twin)
    # the linears around the experts decode in tiles, so they round differently
    pairs.assert_close(actual, expected, 1e-5 if targets is None else 1e-6)
    assert any(".experts." in key for key in actual)


@pytest.mark.parametrize("name", cases.NAMES)
def test_experts_without_adapters_are_fused_too(name, tmp_path):
    base = packed(name, tmp_path)
    dense = cases.decoded(base, tmp_path)
    classes = {n: type(m) for n, m in cases.experts_of(base).items()}
    changes = {"target_modules": ["q_proj"]}
    model, twin = adapted(base, **changes), restore(adapted(dense, **changes))
    rows = {(r.method, r.path) for r in explain(model).layers if r.name.endswith("experts")}
    assert rows == {("experts in 4 bits", "fused:torch")}
    pairs.assert_close(step(model), step(twin), 1e-4)
    restore(model)
    assert {n: type(m) for n, m in cases.experts_of(model.get_base_model()).items()} == classes
    pairs.assert_close(step(model), step(twin), 1e-4)


def test_an_adapter_of_the_experts_is_added_later(tmp_path):
    base = packed("mixtral", tmp_path)
    dense = cases.decoded(base, tmp_path)
    models_ = [adapted(m, target_modules=["q_proj"]) for m in (base, dense)]
    for model in models_:
        torch.manual_seed(2)
        names = ["experts.gate_up_proj", "experts.down_proj"]
        model.add_adapter("second", config(target_modules=[], target_parameters=names))
        model.set_adapter("second")
    pairs.assert_close(step(models_[0]), step(models_[1]), 1e-6)


@pytest.mark.parametrize("targets", [None, ["q_proj"]], ids=["all linear", "attention"])
def test_no_decoded_stack_is_kept_for_the_backward(targets, tmp_path):
    model = adapted(packed("mixtral", tmp_path), target_modules=targets)
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = pairs.loss_from_logits(model, models.batch("llama"))
    assert max(sizes) < 4 * 64 * 128, "as large as the smaller stack"
    loss.backward()


def test_the_product_of_gpus_equals_that_of_cpus(monkeypatch, tmp_path):
    """Torch's grouped product also runs on the CPU."""
    base = packed("qwen3_moe", tmp_path)
    model = adapted(base)
    expected = step(model)
    monkeypatch.setattr(implementation, "_by_expert", implementation.by_grouped_mm)
    pairs.assert_close(step(model), expected, 1e-5)


def test_adapters_fit_both_kinds_of_stacks(tmp_path):
    """PEFT names the factors of the second stack like a base layer, so their order must be the same."""
    model = adapted(packed("qwen3_moe", tmp_path / "base"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load_base(tmp_path / "base", "nf4"), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    dense = load_adapter(cases.decoded(again.unload(), tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)


def test_adapters_are_switched_disabled_and_removed(tmp_path):
    base = packed("mixtral", tmp_path)
    start = logits(base)
    model = adapted(base)
    first = logits(model)
    model.add_adapter("second", second_config(model))
    model.set_adapter("second")
    second = logits(model)
    assert explain(model).fused_fraction == 1.0
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), start, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(copy.deepcopy(model)), first)
    torch.testing.assert_close(logits(model.unload()), start, rtol=1e-5, atol=1e-6)


def test_checkpointing_and_autocast(tmp_path):
    model = adapted(packed("qwen3_moe", tmp_path))
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    pairs.assert_close(step(model), expected, 1e-6)
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(model)
    # two layers of products with inputs rounded to 8 bits
    assert (rounded - exact).norm() / exact.norm() < 10 * 2**-8


def test_peft_would_leave_an_adapter_out(tmp_path):
    """Its forward reads the second stack while the decoded one is cached; so nothing falls back to it without an error."""
    model = adapted(packed("mixtral", tmp_path))
    experts = cases.experts_of(model.get_base_model())["model.layers.0.mlp.experts"]
    handle = experts.get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.raises(ContractError, match="cannot be fused: its experts have hooks"):
        logits(model)
    handle.remove()
    logits(model)
    model.add_adapter("second", second_config(model))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ContractError, match="2 adapters are active"):
        logits(model)


def test_merging_in_memory_is_refused(tmp_path):
    targets = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    model = adapted(packed("mixtral", tmp_path / "base"), **targets)
    before = logits(model)
    with pytest.raises(ContractError, match="PEFT's merge would change a decoded copy"):
        model.merge_adapter()
    with pytest.raises(ContractError, match="PEFT's merge would change a decoded copy"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
