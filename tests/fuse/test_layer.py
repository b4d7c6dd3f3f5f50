"""Whole decoder layers as one op: which layers and which calls, and the same results as the model's own code.

There is no GPU, so the op runs its torch backend here; ``tests/triton/test_lora_decoder_layer.py`` has its kernels.
"""

import copy
from unittest import mock

import pairs
import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    EuroBertConfig,
    EuroBertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama

from peftkit import PrefixConfig, accelerate, explain, restore, wrap
from peftkit.fuse import layer
from peftkit.fuse.compute import LinearParts
from peftkit.fuse.layer import FusedDecoderLayer, LayerParts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 16, "sliding_window": 512}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}
OTHERS = {
    "granite": (GraniteForCausalLM, GraniteConfig, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16}),
    "eurobert": (EuroBertModel, EuroBertConfig, {}),
}


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch):
    """Fuse layers although there is no GPU, and take the op although Triton cannot run."""
    monkeypatch.setattr(layer, "is_counting", lambda: True)
    monkeypatch.setattr(layer, "obstacle", lambda *_: None)


@pytest.fixture
def calls(monkeypatch):
    """The number of layers that ran as one op, as a list with one entry for each."""
    seen = []
    original = layer.lora_decoder_layer

    def counted(*args, **options):
        seen.append(args[0].shape)
        return original(*args, **options)

    monkeypatch.setattr(layer, "lora_decoder_layer", counted)
    return seen


def tiny(family, **changes):
    cls, config, own = (FAMILIES | OTHERS)[family]
    torch.manual_seed(0)
    return cls(config(**SIZES | own | changes))


def fused_pair(family="llama", lora=None, **changes):
    """A stock PEFT model and its fused copy."""
    plain = pairs.adapted(tiny(family, **changes), **(lora or {}))
    return plain, accelerate(copy.deepcopy(plain))


def batch(length=11, seed=1):
    ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def loss_and_grads(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        near(found[name], value)


def near(found, expected):
    """Equal up to float32's rounding, relative to the largest element."""
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_stock_peft(family, use_cache, calls):
    plain, fused = fused_pair(family)
    inputs = batch() | {"use_cache": use_cache}
    assert_close(loss_and_grads(fused, **inputs), loss_and_grads(plain, **inputs))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["down_proj"], ["k_proj", "o_proj", "up_proj"]]
)
def test_some_linears_without_adapter(targets, calls):
    plain, fused = fused_pair(lora={"target_modules": targets})
    assert_close(loss_and_grads(fused, **batch()), loss_and_grads(plain, **batch()))
    assert len(calls) == 2


@pytest.fixture
def remade(monkeypatch):
    """What the backward of each layer makes again."""
    seen = []
    original = layer.lora_decoder_layer

    def noted(*args, **options):
        seen.append(options["remake"])
        return original(*args, **options)

    monkeypatch.setattr(layer, "lora_decoder_layer", noted)
    return seen


def checkpointed_pair(reentrant=False, **options):
    pair = fused_pair(**options)
    for model in pair:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return pair


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointing_makes_again_what_is_cheap(family, reentrant, use_cache, remade):
    plain, fused = checkpointed_pair(reentrant, family=family)
    inputs = batch() | {"use_cache": use_cache}
    assert_close(loss_and_grads(fused, **inputs), loss_and_grads(plain, **inputs))
    assert remade == ["gate", "gate"]  # no layer runs again
    fused.gradient_checkpointing_disable()
    loss_and_grads(fused, **batch())
    assert remade[2:] == ["", ""]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("remake", ["most", None])
def test_checkpointing_that_has_less_memory(monkeypatch, remake, reentrant, remade):
    monkeypatch.setattr(layer, "_affordable", lambda *_: remake)
    plain, fused = checkpointed_pair(reentrant)
    assert_close(loss_and_grads(fused, **batch()), loss_and_grads(plain, **batch()))
    assert remade == (["most"] * 2 if remake else [""] * 4)  # without memory each layer runs again


def test_checkpointing_of_calls_and_layers_that_the_op_does_not_compute(remade):
    plain, fused = checkpointed_pair()
    inputs = batch() | _padded(fused)
    assert_close(loss_and_grads(fused, **inputs), loss_and_grads(plain, **inputs))
    assert not remade
    _hooked("")(plain)
    _hooked("")(fused)
    assert_close(loss_and_grads(fused, **batch()), loss_and_grads(plain, **batch()))
    assert remade.count("gate") == 1  # the layer without a hook
    restore(fused)
    assert_close(loss_and_grads(fused, **batch()), loss_and_grads(plain, **batch()))


def test_copies_of_a_checkpointed_model_are_checkpointed(remade):
    _, fused = checkpointed_pair()
    twin = copy.deepcopy(fused)
    loss_and_grads(twin, **batch())
    assert remade == ["gate", "gate"]


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "first", "last"),
    [(40, "gate", "gate"), (20, "most", "gate"), (1, None, "gate"), (0.01, None, None)],
)
def test_how_much_is_made_again_depends_on_the_free_memory(monkeypatch, free, first, last):
    """32 layers of Llama-3.1-8B, 1 x 8192: they keep 16 GiB if the gate is made again, 6 GiB if most is."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int((free - 0.005) * GIB), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int(0.5 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: int(0.495 * GIB))
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    shapes += [(14336, 4096), (14336, 4096), (4096, 14336)]
    linears = [LinearParts(torch.empty(shape, device="meta"), None, None) for shape in shapes]
    parts = LayerParts([], linears, "silu", 1.0)
    x = mock.Mock(is_cuda=True, shape=torch.Size((1, 8192, 4096)), device="cuda:0")
    x.element_size.return_value = 2
    found = []
    for number in (0, 31):
        attention = mock.Mock(layer_idx=number)
        attention.config.num_hidden_layers = 32
        found.append(layer._affordable(x, parts, attention))
    assert found == [first, last]


def test_the_cache_and_its_gradients_are_those_of_the_model(calls):
    results = []
    for model in fused_pair():
        cache = DynamicCache(config=model.config)
        out = model(**batch(), past_key_values=cache, use_cache=True)
        keys = [entry.keys for entry in cache.layers]
        values = [entry.values for entry in cache.layers]
        loss = out.loss + sum(t.square().sum() for t in (*keys, *values))
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, trained)
        results.append([*keys, *values, *grads])
    assert len(calls) == 2
    for expected, found in zip(*results, strict=True):
        near(found, expected)


@pytest.mark.parametrize("gate", [False, True])
def test_a_layer_with_a_prefix_runs_its_own_code(gate, calls):
    model = wrap(tiny("llama"), PrefixConfig(num_virtual_tokens=3, gate=gate, init_std=0.5))
    assert "prefix" in next(r.reason for r in explain(model).layers if r.method == "decoder layer")
    found = loss_and_grads(model.train(), **batch())
    assert not calls
    assert sum("virtual_tokens" in name for name in found) == (6 if gate else 4)


@pytest.mark.parametrize("family", OTHERS)
def test_other_formulas_are_not_fused_as_layers(family):
    model = accelerate(pairs.adapted(tiny(family)))
    assert not any(isinstance(m, FusedDecoderLayer) for m in model.modules())
    if family != "gemma2":  # it has other norms, so it is no candidate
        assert any(
            "is not" in row.reason for row in explain(model).layers if row.method == "decoder layer"
        )


def _padded(model):
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, -4:] = 0
    return {"attention_mask": mask}


def _hooked(path):
    def hook(model):
        inner = model.base_model.model.model.layers[0].get_submodule(path)
        inner.register_forward_hook(lambda *_: None)
        return {}

    return hook


def _packed(model):
    positions = torch.cat([torch.arange(5), torch.arange(6)]).expand(2, 11)
    return {"position_ids": positions, "use_cache": False}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_padded, 0),
        (_packed, 0),
        (_hooked("self_attn"), 1),
        (_hooked("self_attn.q_proj"), 1),
        (_hooked("mlp"), 1),
        (_hooked("mlp.act_fn"), 1),
        (_hooked("input_layernorm"), 1),
        (lambda model: {"output_attentions": False}, 2),
    ],
    ids=["padded", "packed", "attention", "q_proj", "mlp", "act", "norm", "harmless"],
)
def test_calls_that_the_op_does_not_compute(change, expected, calls):
    plain, fused = fused_pair()
    change(plain)
    inputs = batch() | change(fused)
    assert_close(loss_and_grads(fused, **inputs), loss_and_grads(plain, **inputs))
    assert len(calls) == expected


@pytest.mark.parametrize("change", ["hooked", "trained", "with another eps"])
def test_norms_of_heads_that_the_op_does_not_compute(change, calls):
    plain, fused = fused_pair("qwen3")
    for model in (plain, fused):
        norm = model.base_model.model.model.layers[0].self_attn.q_norm
        if change == "hooked":
            norm.register_forward_hook(lambda *_: None)
        elif change == "trained":
            norm.weight.requires_grad_()
        else:
            norm.variance_epsilon = 0.1
    assert_close(loss_and_grads(fused, **batch()), loss_and_grads(plain, **batch()))
    assert len(calls) == 1


def test_hidden_states_and_attentions_are_those_of_the_model(calls):
    plain, fused = fused_pair()
    for model in (plain, fused):
        model.set_attn_implementation("eager")
    kinds = {"output_hidden_states": True, "output_attentions": True}
    expected, found = plain(**batch(), **kinds), fused(**batch(), **kinds)
    assert not calls
    for name in ("hidden_states", "attentions"):
        for one, other in zip(expected[name], found[name], strict=True):
            near(other, one)


def test_hidden_states_are_those_of_the_model(calls):
    plain, fused = fused_pair()
    expected = plain(**batch(), output_hidden_states=True).hidden_states
    found = fused(**batch(), output_hidden_states=True).hidden_states
    assert not calls  # from now on transformers has hooks on every attention
    for one, other in zip(expected, found, strict=True):
        near(other, one)


def test_a_replaced_rotation_runs(monkeypatch, calls):
    plain, fused = fused_pair()

    def other(q, k, cos, sin, unsqueeze_dim=1):
        return q * 0.5, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    assert_close(loss_and_grads(fused, **batch()), loss_and_grads(plain, **batch()))
    assert not calls
    row = next(row for row in explain(fused).layers if row.method == "decoder layer")
    assert "is not Llama's rotation" in row.reason


def test_generation_and_restore(calls):
    plain, fused = fused_pair()
    ids = batch()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = plain.eval().generate(ids, **options)
    assert torch.equal(fused.eval().generate(ids, **options), expected)
    assert not calls
    restored = restore(fused).train()
    assert not any(isinstance(m, FusedDecoderLayer) for m in restored.modules())


def test_dropout_draws_one_seed_a_linear_and_differs_between_calls(calls):
    _, fused = fused_pair(lora={"lora_dropout": 0.5})
    first, second = (fused(**batch()).loss.item() for _ in range(2))
    torch.manual_seed(3)
    third = fused(**batch()).loss.item()
    torch.manual_seed(3)
    assert fused(**batch()).loss.item() == third
    assert first != second
    assert len(calls) == 8


def test_a_trained_norm_or_dora_runs_its_own_code(calls):
    plain, fused = fused_pair(lora={"use_dora": True})
    assert_close(loss_and_grads(fused, **batch()), loss_and_grads(plain, **batch()))
    plain, fused = fused_pair()
    for model in (plain, fused):
        model.base_model.model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    assert_close(loss_and_grads(fused, **batch()), loss_and_grads(plain, **batch()))
    assert len(calls) == 1


def test_attention_dropout_runs_the_layers_own_code(calls):
    _, fused = fused_pair(attention_dropout=0.5)
    fused(**batch())
    assert not calls
    fused.eval()
    fused(**batch())
    assert len(calls) == 2


def test_copies_and_pickles_stay_fused(calls, tmp_path):
    _, fused = fused_pair()
    expected = fused(**batch()).loss
    assert copy.deepcopy(fused)(**batch()).loss == expected
    assert len(calls) == 4


def test_digests_see_code_and_not_its_form():
    def one(x, y):
        """Doc."""
        z: int = x + y
        return z

    def two(x: int, y: int) -> int:
        z = (x +
             y)  # fmt: skip
        return z

    def three(x, y):
        z = x - y
        return z

    assert layer.digest(one) == layer.digest(two) != layer.digest(three)
    assert layer.digest(nn.Linear.forward) != layer.digest(None) == ""


def test_under_torch_compile_the_layer_runs_its_own_operations(calls):
    plain, fused = fused_pair()
    inputs = batch() | {"use_cache": False}
    expected = plain(**inputs).loss
    compiled = torch.compile(fused, backend="eager")
    near(compiled(**inputs).loss.detach(), expected.detach())
    assert not calls
