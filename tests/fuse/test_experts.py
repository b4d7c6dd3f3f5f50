"""LoRA on stacked expert weights and on bare weights gives PEFT's numbers without computing ``W + B A``."""

import copy

import families
import models
import pairs
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lab.testing import Made
from peftkit import accelerate, explain, restore, wrap
from peftkit.fuse import experts as implementation
from peftkit.fuse.experts import FusedParamWrapper, grouped_product

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("mixtral", "qwen3_moe", "gpt_oss")
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def eager(model):
    """Use transformers' own loop over the experts, the only implementation that supports float64."""
    model.set_experts_implementation("eager")
    return model


def pair(name, dtype=torch.float64, **config):
    """A mixture of experts with PEFT's LoRA on its stacks, and a fused copy."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": [], "target_parameters": STACKS}
    base = eager(families.family(name).to(dtype))
    plain = get_peft_model(base, LoraConfig(**settings | config))
    pairs.fill_factors(plain)
    plain.train()
    return plain, accelerate(copy.deepcopy(plain), logit_free=False)


def step(model, seed=0):
    return pairs.step(model, models.batch("llama", seed), pairs.loss_from_logits)


def logits(model):
    with torch.no_grad():
        return model(**models.batch("llama")).logits


@pytest.fixture
def counted(monkeypatch):
    """How often the fused experts and PEFT's own forward of a wrapper ran."""
    calls = {"fused": 0, "peft": 0}

    def counting(key, function):
        def call(*args, **kwargs):
            calls[key] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(implementation, "routed", counting("fused", implementation.routed))
    # PEFT's forward calls this first. Replacing the forward itself would be detected.
    check = ParamWrapper._check_forward_args
    monkeypatch.setattr(ParamWrapper, "_check_forward_args", counting("peft", check))
    return calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [STACKS, STACKS[:1], STACKS[1:]], ids=["both", "up", "down"])
def test_a_step_equals_pefts(name, targets, counted):
    plain, fused = pair(name, target_parameters=targets)
    actual = step(fused)
    assert counted == {"fused": 1 if name == "qwen3_moe" else 2, "peft": 0}
    pairs.assert_close(actual, step(plain), 1e-10)
    assert counted["peft"] > 0
    paths = {(r.method, r.path, r.reason) for r in explain(fused).layers if r.is_adapter}
    assert paths == {("LoRA", "fused:torch", "")}


def test_shared_experts_are_adapted_and_their_gate_is_not():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = hf.Qwen2MoeConfig(
        **sizes, **heads, vocab_size=96, num_experts=4, num_experts_per_tok=2
    )
    model = wrap(eager(hf.Qwen2MoeForCausalLM(config).double()), logit_free=False)
    report = explain(model)
    mlp = "base_model.model.model.layers.0.mlp"
    adapted = {r.name.removeprefix(f"{mlp}.") for r in report.layers if r.is_adapter}
    shared = {f"shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert shared | {"experts", "experts.base_layer"} <= adapted
    assert {name.rpartition("mlp.")[2] for name in report.left_out} == {
        *("gate", "shared_expert_gate", "lm_head")
    }
    assert report.fused_fraction == 1.0
    pairs.fill_factors(model)
    plain = restore(copy.deepcopy(model))
    pairs.assert_close(step(model), step(plain), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_generation_equal_pefts(name):
    plain, fused = (model.eval() for model in pair(name))
    torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-10, atol=1e-10)
    ids = models.batch("llama")["input_ids"][:1]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = plain.generate(input_ids=ids, **settings)
    assert torch.equal(fused.generate(input_ids=ids, **settings), expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_near_to_float64_as_peft(name, dtype):
    """The choice of experts is fixed, because a router chooses differently in bfloat16 and in float64."""
    plain, fused = (
        m.get_submodule("base_model.model.model.layers.0.mlp.experts") for m in pair(name, dtype)
    )
    truth, runs = copy.deepcopy(plain).double(), []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(23, models.HIDDEN_SIZE, generator=generator).to(dtype)
        chosen = torch.rand(23, 4, generator=generator).topk(2).indices
        weights = torch.rand(23, 2, generator=generator).to(dtype)
        results = []
        for module in (fused, plain, truth):
            kind = next(module.parameters()).dtype
            x, w = (t.to(kind, copy=True).requires_grad_() for t in (hidden, weights))
            module.zero_grad()
            y = module(x, chosen, w)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(kind)).sum().backward()
            grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
            results.append({"y": y.detach(), "x": x.grad, "weights": w.grad} | grads)
        runs.append(tuple(results))
    pairs.assert_near_enough(runs, dtype)


def test_names_file_and_class_equal_pefts(tmp_path):
    plain, fused = pair("mixtral")
    pairs.assert_equal(fused.state_dict(), plain.state_dict())
    for model in (plain, fused):
        model.save_pretrained(tmp_path / str(model is fused))
    files = [tmp_path / str(kind) / "adapter_model.safetensors" for kind in (False, True)]
    assert files[0].read_bytes() == files[1].read_bytes()
    wrappers = [m for m in fused.modules() if isinstance(m, ParamWrapper)]
    assert all(isinstance(m, FusedParamWrapper) for m in wrappers)
    assert {type(m).__name__ for m in wrappers} == {"ParamWrapper"}
    again = PeftModel.from_pretrained(eager(families.family("mixtral").double()), tmp_path / "True")
    torch.testing.assert_close(logits(again), logits(fused.eval()), rtol=1e-10, atol=1e-10)
    twin = copy.deepcopy(fused)
    assert torch.equal(logits(twin), logits(fused))


def test_merging_disabling_switching_and_unloading(counted):
    plain, fused = pair("mixtral")
    for model in (plain, fused):
        model.add_adapter("second", LoraConfig(r=3, target_modules=[], target_parameters=STACKS))
        model.set_adapter("second")
        pairs.fill_factors(model, seed=5)
    pairs.assert_close(step(fused), step(plain), 1e-10)
    for action in ("merge_adapter", "unmerge_adapter"):
        for model in (plain, fused):
            getattr(model, action)()
        torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-10, atol=1e-10)
    with plain.disable_adapter(), fused.disable_adapter():
        counted["fused"] = 0
        assert torch.equal(logits(fused), logits(plain))
        assert counted["fused"] == 0
        assert {r.reason for r in explain(fused).layers if r.is_adapter} == {
            "adapters are disabled"
        }
    merged = [model.merge_and_unload() for model in (plain, fused)]
    assert torch.equal(logits(merged[1]), logits(merged[0]))
    assert not any(isinstance(m, ParamWrapper) for m in merged[1].modules())


REASONS = {
    "gate_up_proj is trained": lambda m: m.get_base_layer().gate_up_proj.requires_grad_(),
    "its experts have hooks": lambda m: m.get_base_layer().register_forward_hook(
        lambda *args: args[-1] * 1.5
    ),
    "its lora_A has hooks": lambda m: m.lora_A["default"].register_forward_hook(lambda *args: None),
    "2 adapters are active": lambda m: m.set_adapter(["default", "second"]),
}


@pytest.mark.parametrize("reason", REASONS)
def test_unsupported_cases_run_pefts_forward_with_a_reason(reason, counted):
    plain, fused = pair("mixtral")
    for model in (plain, fused):
        model.add_adapter("second", LoraConfig(r=3, target_modules=[], target_parameters=STACKS))
        pairs.fill_factors(model)
        outer = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
        REASONS[reason](outer)
        if reason.startswith("2"):
            REASONS[reason](outer.base_layer)
    expected = logits(plain)
    counted.update(fused=0, peft=0)
    torch.testing.assert_close(logits(fused), expected, rtol=1e-10, atol=1e-10)
    assert counted == {"fused": 1, "peft": 2}
    first, *_ = [r for r in explain(fused).layers if r.is_adapter]
    assert first.path == "peft"
    assert reason in first.reason


def test_experts_without_a_row_get_no_gradient():
    plain, fused = pair("mixtral")
    for model in (plain, fused):
        for module in model.modules():
            if type(module).__name__ == "MixtralTopKRouter":
                with torch.no_grad():
                    module.weight.zero_()  # all scores are equal, and the same two experts win every tie
    actual, expected = step(fused), step(plain)
    pairs.assert_close(actual, expected, 1e-10)
    A = next(grad for name, grad in actual.items() if "lora_A" in name)
    assert A.view(4, -1).any(1).sum() == 2


def test_no_tensor_of_the_size_of_the_stack_is_allocated():
    sizes = []
    for model in pair("mixtral", torch.float32):
        wrapper = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
        stack = wrapper.get_base_layer().gate_up_proj
        hidden = torch.randn(4, stack.shape[-1])
        chosen, weights = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1]]), torch.full((4, 2), 0.5)
        with Made(*model.parameters()) as made:
            wrapper(hidden, chosen, weights).sum().backward()
        sizes.append(made.largest_bytes)
    assert sizes[0] >= stack.numel() * 4
    assert sizes[1] < stack.numel() * 4


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(transposed):
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([2, 0, 3, 1])
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    weight = weight.mT.contiguous() if transposed else weight
    owners = torch.repeat_interleave(torch.arange(4), counts)
    expected = torch.einsum("mk,mnk->mn", x, (weight.mT if transposed else weight)[owners])
    actual = grouped_product(x, weight, counts, transposed)
    torch.testing.assert_close(actual, expected)
    dy = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad(y, x, dy)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_a_bare_weight_of_a_linear_is_a_fused_linear(monkeypatch):
    targets = ["q_proj.weight", "up_proj.weight", "down_proj.weight"]
    plain = pairs.stock("llama", torch.float64, target_modules=[], target_parameters=targets)
    fused = accelerate(copy.deepcopy(plain), logit_free=False)
    with pairs.counted(monkeypatch) as calls:
        actual = step(fused)
    assert calls["lora_linear"] == 2
    assert calls["lora_swiglu_mlp"] == 2
    pairs.assert_close(actual, step(plain), 1e-10)
    reports = [r for r in explain(fused).layers if r.is_adapter]
    assert {(r.path, r.reason) for r in reports} == {("fused:torch", "")}


def test_a_parameter_of_something_else_runs_pefts_forward():
    base = nn.Sequential(nn.Embedding(5, 4))
    plain = get_peft_model(base, LoraConfig(target_modules=[], target_parameters=["0.weight"]))
    fused = accelerate(copy.deepcopy(plain))
    ids = torch.arange(5)
    assert torch.equal(fused(ids), plain(ids))
    (report,) = [r for r in explain(fused).layers if r.is_adapter]
    assert "weight belongs to a Embedding" in report.reason
