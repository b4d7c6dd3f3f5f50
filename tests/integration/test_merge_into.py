"""``merge_into``: what is trained is what a merge stores, in training and evaluation, or the combination is refused."""

import copy
import pickle

import models
import pairs
import pytest
import torch
import transformers as hf
from bitsandbytes import functional as bnb
from integration.support import fused_calls
from integration.test_bnb_joined import saved, step  # noqa: F401 - a fixture
from torch import nn

from peftkit import (
    BottleneckConfig,
    ContractError,
    LoraConfig,
    PrefixConfig,
    accelerate,
    explain,
    restore,
    wrap,
)
from peftkit_kernels.storage.requantized import RequantizedWeight

LINEARS = 2 * 7
IDS = torch.arange(24).view(2, 12) % 60
BASES = {"nf4": "nf4", "nested": "nf4", "int8": "int8", "float32": "nf4", "float32 ": "int8"}
every_base = pytest.mark.parametrize(("kind", "into"), BASES.items(), ids=BASES)


def load(path, kind, compute=torch.float32, dtype=torch.float32):
    options = {}
    if kind == "int8":
        options = {"quantization_config": hf.BitsAndBytesConfig(load_in_8bit=True)}
    elif kind in ("nf4", "nested"):
        config = hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=kind == "nested",
        )
        options = {"quantization_config": config}
    return hf.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def tuned(path, kind, into, **config):
    """A model in training whose factors are large enough to change codes."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | config
    model = wrap(load(path, kind), LoraConfig(**settings), merge_into=into)
    pairs.fill_factors(model)
    return model.train()


def adapters(model):
    return [row for row in explain(model).layers if row.is_adapter]


def layers_of(model):
    return [m for m in model.modules() if hasattr(m, "lora_A") and isinstance(m, nn.Module)]


def decoded(linear):
    """The weight of a merged linear by bitsandbytes' own functions."""
    weight = linear.weight
    if hasattr(weight, "quant_state"):
        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    return weight.CB.float() * (weight.SCB / 127)[:, None]


@every_base
def test_training_and_evaluation_use_the_weight_that_is_stored(saved, kind, into):  # noqa: F811
    model = tuned(saved, kind, into)
    assert {(row.path, row.method) for row in adapters(model)} == {
        ("fused:torch", f"LoRA merged into {into}")
    }
    assert len(adapters(model)) == LINEARS
    trained = model(input_ids=IDS).logits
    model.eval()
    assert torch.equal(model(input_ids=IDS).logits, trained)
    plain = tuned(saved, kind, None)
    changed = (plain(input_ids=IDS).logits - trained).norm() / trained.norm()
    assert changed > 1000 * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_pefts_own_merge_stores_the_trained_weight(saved, kind):  # noqa: F811
    model = tuned(saved, kind, BASES[kind])
    weights = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "peftkit_plan") and hasattr(layer, "lora_A"):
            weight = layer.peftkit_plan(torch.zeros(1, layer.in_features)).weight
            assert type(weight) is RequantizedWeight
            layer.__dict__["probe"] = torch.eye(layer.in_features)
            weights[name.removeprefix("base_model.model.")] = layer(layer.__dict__["probe"]).T
    logits = model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    assert len(weights) == LINEARS
    for name, weight in weights.items():
        # products with the identity are exact
        assert torch.equal(decoded(merged.get_submodule(name)), weight), name
    if kind != "int8":  # bitsandbytes would quantise the input too
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "float32 "])
def test_a_dense_base_is_trained_as_it_is_quantised_after_the_merge(saved, kind, tmp_path):  # noqa: F811
    into = BASES[kind]
    model = tuned(saved, kind, into)
    logits = model(input_ids=IDS).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    plain = load(tmp_path, into)
    # training mode: decoded weights in 8 bits
    quantised = wrap(plain, LoraConfig(r=1, target_modules="all-linear")).train()
    torch.testing.assert_close(quantised(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_step_is_fused_across_linears_and_its_gradients_are_straight_through(saved):  # noqa: F811
    model = tuned(saved, "nested", "nf4")
    with fused_calls() as calls:
        found = step(model)
    assert calls["lora_swiglu_mlp"] == 2
    assert calls["lora_qkv"] == 2 + 2  # q, k and v; the output projection
    assert len(found) == 1 + 2 * LINEARS
    # LoRA on the merged weights minus the updates has the same values and the same gradients
    restored = load(saved, "float32")
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        weight = layer(torch.eye(layer.in_features)).T.detach()
        target = restored.get_submodule(name.removeprefix("base_model.model."))
        target.weight.data = weight - layer.get_delta_weight("default").detach()
    plain = wrap(restored, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    pairs.fill_factors(plain)
    pairs.assert_close(found, step(plain.train()), 1e-4)


def train(path, kind, into, steps=25):
    """A tuned model, with the losses before the first and after the last step."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear")
    model = wrap(load(path, kind), config, merge_into=into).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(steps + 1):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        optimiser.zero_grad()
        losses[-1].backward()
        if len(losses) <= steps:
            optimiser.step()
    return model, losses[0].item(), losses[-1].item()


@every_base
def test_tunes_as_far_as_without_rounding(saved, kind, into):  # noqa: F811
    _, first, plain = train(saved, kind, None)
    _, _, aware = train(saved, kind, into)
    assert plain < first - 1
    assert first - aware > 0.95 * (first - plain)


def test_float32_activations_and_16_bit_products(saved):  # noqa: F811
    """A base that computes in bfloat16: the merged weight is decoded in bfloat16, and linears stay joined."""
    settings = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    model = wrap(load(saved, "nf4", torch.bfloat16), settings, merge_into="nf4")
    pairs.fill_factors(model)
    with fused_calls() as calls:
        found = step(model.train())
    assert calls["lora_swiglu_mlp"] == 2
    truth = step(tuned(saved, "nf4", "nf4"))
    for name, value in truth.items():
        cosine = torch.cosine_similarity(found[name].flatten(), value.flatten(), dim=0)
        assert cosine > 0.98, name


def test_under_autocast_and_checkpointing(saved):  # noqa: F811
    model = tuned(saved, "nested", "nf4")
    expected = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model)
    for name, value in expected.items():
        cosine = torch.cosine_similarity(found[name].float().flatten(), value.flatten(), dim=0)
        assert cosine > 0.98, name
    model.gradient_checkpointing_enable({"use_reentrant": False})
    pairs.assert_close(step(model), expected, 1e-5)


def test_layers_without_an_adapter_are_unaffected(saved):  # noqa: F811
    model = tuned(saved, "nf4", "nf4", target_modules=["v_proj", "down_proj"])
    assert len(adapters(model)) == 4
    inner = model.base_model.model.model.layers[0]
    plan = inner.mlp.peftkit_plan(torch.zeros(2, 64))
    assert [type(part.weight) is RequantizedWeight for part in plan] == [False, False, True]
    assert step(model)["loss"].isfinite()


def test_the_choice_is_kept_by_copies_later_calls_and_new_adapters(saved):  # noqa: F811
    model = tuned(saved, "nf4", "nf4", target_modules=["v_proj"])
    for twin in (accelerate(copy.deepcopy(model)), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert {row.method for row in adapters(twin)} == {"LoRA merged into nf4"}
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj", "o_proj"]))
    model.set_adapter("second")
    assert [row.method for row in adapters(model)] == ["LoRA merged into nf4"] * 4


def test_restore_forgets_the_choice(saved):  # noqa: F811
    for kind, into in (("nf4", "nf4"), ("int8", "int8")):
        model = restore(tuned(saved, kind, into))
        left = [key for m in model.modules() for key in m.__dict__ if key.startswith("_peftkit")]
        assert not left
        assert {row.method for row in adapters(accelerate(model))} == {"LoRA"}


def test_a_disabled_adapter_gives_the_base(saved):  # noqa: F811
    model = tuned(saved, "nf4", "nf4")
    base = load(saved, "nf4")(input_ids=IDS).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=1e-5, atol=1e-5)


REFUSED = {
    "dropout": ("nf4", "nf4", {"lora_dropout": 0.1}, r"lora_dropout=0.1 drops inputs"),
    "DoRA": ("nf4", "nf4", {"use_dora": True}, r"DoRA scales rows.*use_dora=False"),
    "bias of the adapter": (
        "nf4",
        "nf4",
        {"lora_bias": True},
        r"bias of its own \(lora_bias=True\)",
    ),
    "trained bias": ("float32", "nf4", {"bias": "lora_only"}, "its base layer is trained"),
    "4 bits into 8": ("nf4", "int8", {}, r'stored as nf4; use merge_into="nf4"'),
    "8 bits into 4": ("int8", "nf4", {}, r'stored as int8; use merge_into="int8"'),
    "embeddings": ("nf4", "nf4", {"target_modules": ["embed_tokens"]}, "embed_tokens: .*Embedding"),
    "unknown": (
        "nf4",
        "int4",
        {},
        r"merge_into='int4' is unknown; use one of 'nf4', 'int8', or None",
    ),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused(saved, name):  # noqa: F811
    kind, into, config, message = REFUSED[name]
    model = load(saved, kind)
    if name == "trained bias":
        model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(64))
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4} | config
    before = {m: type(m) for m in model.modules()}
    with pytest.raises(ContractError, match=message):
        wrap(model, LoraConfig(**settings), merge_into=into)
    assert before == {m: type(m) for m in model.modules()}
    assert not any("lora" in n for n, _ in model.named_parameters())
    assert not any(k.startswith("_peftkit") for m in model.modules() for k in m.__dict__)


@pytest.mark.parametrize(
    "other", [PrefixConfig(num_virtual_tokens=2), BottleneckConfig()], ids=repr
)
def test_methods_that_are_not_linear_are_refused(saved, other):  # noqa: F811
    with pytest.raises(ContractError, match="cannot be merged into a quantised linear"):
        wrap(load(saved, "nf4"), LoraConfig(r=4), other, merge_into="nf4")


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ContractError, match=r"columns are no multiple of the block size 64"):
        wrap(models.tiny("llama"), LoraConfig(r=4), merge_into="nf4")
    assert wrap(models.tiny("llama"), LoraConfig(r=4), merge_into="int8")


def test_transposed_linears_are_refused():
    with pytest.raises(ContractError, match="Conv1D, which bitsandbytes does not quantise"):
        wrap(models.tiny("gpt2"), LoraConfig(r=4, target_modules=["c_attn"]), merge_into="int8")


def test_products_in_8_bits_are_refused_in_either_order(saved):  # noqa: F811
    config = LoraConfig(r=4)
    with pytest.raises(ContractError, match=r'int8_mode="weight-only"'):
        wrap(load(saved, "int8"), config, int8_mode="compute", merge_into="int8")
    model = tuned(saved, "int8", "int8")
    with pytest.raises(ContractError, match=r'int8_mode="weight-only"'):
        accelerate(model, int8_mode="compute")
    assert {row.path for row in adapters(model)} == {"fused:torch"}


def test_a_forward_that_would_not_round_raises(saved):  # noqa: F811
    """Each of these changes makes PEFT's own forward run, which adds an unrounded adapter."""
    model = tuned(saved, "nf4", "nf4", target_modules=["o_proj"])
    model.add_adapter("dropped", LoraConfig(r=2, target_modules=["o_proj"], lora_dropout=0.2))
    expected = model(input_ids=IDS).logits
    model.set_adapter("dropped")
    with pytest.raises(ContractError, match=r"lora_dropout=0\.2"):
        model(input_ids=IDS)
    model.base_model.set_adapter(["default", "dropped"])
    with pytest.raises(ContractError, match="2 adapters are active"):
        model(input_ids=IDS)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=IDS).logits, expected)
    hook = layers_of(model)[0].lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.raises(ContractError, match="lora_A has hooks"):
        model(input_ids=IDS)
    hook.remove()
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(ContractError, match="the model has no adapter layer"):
        accelerate(models.tiny("llama"), merge_into="int8")
