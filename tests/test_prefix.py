"""KV prefixes on plain models: against caches filled with the prefix, against sums written out in float64, and in every mode."""

import math
from types import SimpleNamespace

import families
import models
import oracles
import pytest
import torch
from prefix_models import EAGER_ONLY, P, doubled, first, prefixed
from torch import nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama import modeling_llama

from lab.testing import assert_no_worse_than
from peftkit.compatibility.rounding import same_up_to_rounding
from peftkit.find.points import probe_inputs
from peftkit.prefix import Prefix, PrefixConfig, PrefixSite, add_prefixes, remove_prefixes
from peftkit.prefix.attention import prefix_attention
from peftkit.prefix.inject import attach, head_sizes

REFUSING = ("gptj", "bloom", "falcon", "deberta_v2")
DISPATCHING = tuple(name for name in families.NAMES if name not in REFUSING)
MIXTURES = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("name", REFUSING)
def test_architectures_that_compute_attention_themselves_are_named(name):
    with pytest.raises(
        ValueError, match=r"cannot have a KV prefix: its \w+Attention .*BottleneckConfig"
    ):
        add_prefixes(families.family(name), PrefixConfig())


@pytest.mark.parametrize("name", DISPATCHING)
def test_a_closed_gate_changes_no_bit_and_removing_leaves_no_trace(name):
    model = families.family(name)
    inputs, keys = probe_inputs(model), set(model.state_dict())
    classes = {n: type(m) for n, m in model.named_modules()}
    with torch.no_grad():
        expected = first(model(**inputs))
        names = add_prefixes(model, PrefixConfig(num_virtual_tokens=P, gate=True, init_std=1.0))
        assert torch.equal(first(model(**inputs)), expected)
    added = {n for n, p in model.named_parameters() if p.requires_grad}
    assert added == set(model.state_dict()) - keys
    assert added == {
        f"{n}.virtual_tokens.adapters.default.{part}"
        for n in names
        for part in ("key", "value", "gate")
    }
    assert all(
        type(m).__name__ == classes.get(n, type(m)).__name__ for n, m in model.named_modules()
    )
    assert list(remove_prefixes(model)) == names
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*models.CAUSAL_NAMES, "qwen2", "phi", "granite", "gpt_neox"])
def test_decoders_equal_a_cache_filled_with_the_prefix(name, implementation):
    """The base model itself, with the prefix as its past and positions that start at zero."""
    model = prefixed(name, implementation)
    ids = torch.randint(3, 96, (2, 4), generator=torch.Generator().manual_seed(1))

    def with_cache() -> torch.Tensor:
        cache = DynamicCache()
        for layer, site in enumerate(sites.values()):
            prefix = site.adapters["default"].to(model.dtype)
            cache.update(
                prefix.key.expand(2, -1, -1, -1), prefix.value.expand(2, -1, -1, -1), layer
            )
        # OPT counts its positions from the mask unless they are given
        return model(
            input_ids=ids,
            past_key_values=cache,
            position_ids=torch.arange(4).expand(2, -1),
            attention_mask=torch.ones(2, P + 4, dtype=torch.long),
        ).logits

    with torch.no_grad():
        actual = model(input_ids=ids).logits
        sites = remove_prefixes(model)
        plain, expected = model(input_ids=ids).logits, with_cache()
        model.double()
        assert not same_up_to_rounding(actual, plain)
        assert_no_worse_than(actual, expected, with_cache())


def attention_module(implementation: str, causal: bool, heads: int = 4) -> nn.Module:
    config = LlamaConfig(hidden_size=32, num_attention_heads=heads, num_key_value_heads=2)
    config._attn_implementation = implementation
    module = modeling_llama.LlamaAttention(config, 0)
    module.is_causal = causal
    return module.eval()


def written_out(q, k, v, pk, pv, bias, scale, gate=None) -> torch.Tensor:
    """Attention of one query at a time over prefix and tokens, with additive ``bias [B, S, T]``; ``[B, S, H, D]``."""
    B, H, S, _ = q.shape
    out = torch.zeros(B, S, H, v.shape[-1], dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(S):
                own = [scale * float(q[b, h, i] @ pk[g, j]) for j in range(pk.shape[1])]
                tokens = [
                    scale * float(q[b, h, i] @ k[b, g, j]) + float(bias[b, h, i, j])
                    for j in range(k.shape[2])
                ]
                sums = [own, tokens] if gate is not None else [own + tokens]
                values = [pv[g], v[b, g]] if gate is not None else [torch.cat([pv[g], v[b, g]])]
                factors = [math.tanh(float(gate[h])), 1.0] if gate is not None else [1.0]
                for scores, rows, factor in zip(sums, values, factors, strict=True):
                    weights = [math.exp(score) for score in scores]
                    mean = sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
                    out[b, i, h] += factor * mean
    return out


CASES = {
    # queries, keys, causal, mask
    "causal without a mask": (5, 5, True, None),
    "causal, static cache longer than the queries": (3, 6, True, None),
    "bidirectional": (4, 4, False, None),
    "cross-attention": (3, 6, False, None),
    "decoding": (1, 6, True, None),
    "boolean mask": (5, 5, True, "bool"),
    "additive mask": (5, 5, True, "float"),
    "padded keys": (1, 6, True, "bool"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_sum_written_out(case, implementation, gated, dtype):
    queries, keys, causal, kind = CASES[case]
    if implementation == "eager" and causal and kind is None and queries > 1:
        return_mask = "bool"  # eager functions get the causal mask from the model
    else:
        return_mask = kind
    g = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(2, h, n, 8, generator=g, dtype=torch.float64)
        for h, n in ((4, queries), (2, keys), (2, keys))
    )
    seen = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    if causal and queries > 1:
        seen = seen.tril()
    if kind is not None:
        seen = seen.clone()
        seen[1, ..., :1] = False  # padding on the left; its own query then sees the prefix alone
    bias = torch.zeros(2, 4, queries, keys).masked_fill(~seen, -1e9)
    mask = None
    if return_mask is not None:
        as_bool = return_mask == "bool" and implementation == "sdpa"
        mask = seen if as_bool else bias[:, :1].to(dtype)
    if gated and kind is not None and queries > 1:
        seen[1, ..., :1, 0] = True  # without the shared softmax a query must see a token
        bias = torch.zeros(2, 4, queries, keys).masked_fill(~seen, -1e9)
        mask = seen if mask.dtype is torch.bool else bias[:, :1].to(dtype)
    module = attention_module(implementation, causal)
    prefix = Prefix(2, P, 8, 8, 1.0, 4 if gated else None, dtype=dtype)
    if gated:
        nn.init.normal_(prefix.gate)
    site = PrefixSite()
    site.adapters["default"] = prefix
    attach(module, site)
    actual, _ = prefix_attention(
        module, q.to(dtype), k.to(dtype), v.to(dtype), mask, dropout=0.0, scaling=0.4
    )
    with torch.no_grad():
        expected = written_out(
            q, k, v, prefix.key.double(), prefix.value.double(), bias, 0.4, prefix.gate
        )
    # transformers' eager functions take the softmax in float32 whatever the dtype
    oracles.assert_equals(actual, expected, torch.float32 if implementation == "eager" else dtype)


def test_position_bias_of_t5_is_zero_for_the_prefix():
    module = attention_module("sdpa", causal=False)
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, h, 4, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    bias = torch.randn(1, 4, 4, 4, generator=g, dtype=torch.float64)
    prefix = Prefix(2, P, 8, 8, 1.0, dtype=torch.float64)
    site = PrefixSite()
    site.adapters["default"] = prefix
    attach(module, site)
    actual, _ = prefix_attention(module, q, k, v, None, scaling=0.4, position_bias=bias)
    with torch.no_grad():
        expected = written_out(q, k, v, prefix.key, prefix.value, bias.expand(2, -1, -1, -1), 0.4)
    oracles.assert_equals(actual, expected)


@pytest.mark.parametrize("name", DISPATCHING)
def test_eager_and_sdpa_agree(name):
    if name in EAGER_ONLY:
        model = prefixed(name, "eager")
        assert model.config._attn_implementation == "eager"
        assert torch.isfinite(first(model(**probe_inputs(model)))).all()
        return
    model = prefixed(name)
    inputs = probe_inputs(model)
    with torch.no_grad():
        sdpa = first(model(**inputs))
        model.set_attn_implementation("eager")
        eager = first(model(**inputs))
        if name in MIXTURES:
            model.set_experts_implementation("eager")  # the grouped product has no float64
        model.double()
        assert_no_worse_than(sdpa, eager, first(model(**doubled(inputs))))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "mistral", "gpt2", "opt", "qwen3_moe", "gpt_oss"]
)
def test_generation_with_any_cache_equals_generation_without(name, gate):
    """Longer than the sliding windows of 8; the second prompt is padded on the left."""
    model = prefixed(name, "eager" if name in EAGER_ONLY else "sdpa", gate=gate)
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"input_ids": ids, "attention_mask": mask}
    without = model.generate(**settings, use_cache=False)
    assert torch.equal(model.generate(**settings), without)
    assert torch.equal(model.generate(**settings, cache_implementation="static"), without)
    beams = model.generate(**settings, num_beams=3)
    assert torch.equal(beams, model.generate(**settings, num_beams=3, use_cache=False))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        remove_prefixes(model)
        assert not same_up_to_rounding(model(input_ids=ids).logits, logits)


def test_explain_names_what_kept_a_call_from_merged_passes():
    """Known before the first call, or since the last one; a call that can be merged takes the reason away."""
    model = prefixed("llama")
    site = model.model.layers[0].self_attn.virtual_tokens
    ids = torch.arange(3, 9)[None]
    assert site.peftkit_verdict() == ("fused:torch", "")
    additive = torch.zeros(1, 1, 6, 6).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -1e9)
    with torch.no_grad():
        merged = model(input_ids=ids).logits
        joined = model(input_ids=ids, attention_mask=additive).logits
        assert site.peftkit_verdict() == (
            "torch",
            "concatenated with the keys: its mask is torch.float32 (1, 1, 6, 6), not bool with one head",
        )
        model(input_ids=ids)
        assert site.peftkit_verdict() == ("fused:torch", "")
        assert same_up_to_rounding(merged, joined)
    model.set_attn_implementation("eager")
    model.model.layers[0].self_attn.virtual_tokens.joined_because = None
    assert site.peftkit_verdict()[1] == "concatenated with the keys: the model's attention is eager"


def test_dropout_of_the_attention_is_drawn_over_joined_keys():
    model = prefixed("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.arange(3, 9)[None]
    one, two = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert not torch.equal(one, two)
    site = model.model.layers[0].self_attn.virtual_tokens
    assert site.peftkit_verdict()[1] == "concatenated with the keys: attention dropout is on"


def test_decoding_does_not_copy_the_cache():
    from lab.testing import Made

    module = attention_module("sdpa", causal=True)
    site = PrefixSite()
    site.adapters["default"] = Prefix(2, P, 8, 8, 1.0)
    attach(module, site)
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 500, 8), torch.randn(1, 2, 500, 8)
    with torch.no_grad(), Made(q, k, v, *site.parameters()) as made:
        prefix_attention(module, q, k, v, None, scaling=0.4)
    assert 0 < made.largest_bytes < k.nbytes


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_of_encoder_decoders(name):
    model = prefixed(name)
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(2))
    settings = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**settings), model.generate(**settings, use_cache=False))


@pytest.mark.parametrize("gate", [False, True])
def test_packed_sequences_equal_separate_ones(gate):
    model = prefixed("llama", gate=gate)
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        parts = ids[:, :4], ids[:, 4:]
        separate = torch.cat([model(input_ids=part).logits for part in parts], 1)
        model.double()
        truth = torch.cat([model(input_ids=part).logits for part in parts], 1)
    assert_no_worse_than(packed, separate, truth)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_checkpointing_gives_the_same_gradients(name, use_reentrant):
    def gradients(checkpointing: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = prefixed(name).train().to(dtype)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**models.batch(name)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False, torch.float32), gradients(True, torch.float32)
    truth = gradients(False, torch.float64)
    assert plain
    for n in plain:  # T5 sums the gradients of its encoder in another order
        assert_no_worse_than(checkpointed[n], plain[n], truth[n], n, factor=3.0)


def test_gradients_pass_gradcheck():
    module = attention_module("sdpa", causal=True)
    for gated in (None, 4):
        prefix = Prefix(2, P, 8, 8, 1.0, gated, dtype=torch.float64)
        site = PrefixSite()
        site.adapters["default"] = prefix
        attach(module, site)
        if gated:
            nn.init.normal_(prefix.gate)
        inputs = [
            torch.randn(1, h, 3, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)
        ]
        parameters = tuple(prefix.parameters())

        def call(q, k, v, *_):
            return prefix_attention(module, q, k, v, None, scaling=0.4)[0]

        assert torch.autograd.gradcheck(call, (*inputs, *parameters))
        remove_prefixes(module)


def test_text_gives_the_keys_and_values_of_the_base_model():
    """A prefix made of tokens 5 and 7 is what a cache holds after reading them."""
    model = families.family("llama")
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 7, 5]]), past_key_values=cache)
    config = PrefixConfig(num_virtual_tokens=3, init="text", init_token_ids=[5, 7])
    add_prefixes(model, config)
    for layer, held in zip(model.model.layers, cache.layers, strict=True):
        prefix = layer.self_attn.virtual_tokens.adapters["default"]
        assert torch.equal(prefix.key, held.keys[0])
        assert torch.equal(prefix.value, held.values[0])
    model = families.family("t5")
    add_prefixes(
        model, config := PrefixConfig(num_virtual_tokens=2, init="text", init_token_ids=[5])
    )
    assert len(config.target_modules) == 6
    with pytest.raises(ValueError, match="the input of ViTForImageClassification is not tokens"):
        add_prefixes(families.family("vit"), PrefixConfig(init="text", init_token_ids=[1]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"attention": ["encoder"]},
            {"encoder.block.0.layer.0.SelfAttention", "encoder.block.1.layer.0.SelfAttention"},
        ),
        ({"attention": ["cross"], "layers": [1]}, {"decoder.block.1.layer.1.EncDecAttention"}),
        ({"attention": ["decoder"], "layers": [0]}, {"decoder.block.0.layer.0.SelfAttention"}),
    ],
)
def test_choice_of_attentions_and_layers(fields, expected):
    model = families.family("t5")
    assert set(add_prefixes(model, PrefixConfig(num_virtual_tokens=2, **fields))) == expected


class _PerLayer:
    """A config that refuses to say one number for all layers, as those of transformers do whose layers differ."""

    per_layer_config = (
        SimpleNamespace(num_attention_heads=4),
        SimpleNamespace(num_attention_heads=8),
    )

    @property
    def num_attention_heads(self):
        raise RuntimeError("a per-layer attribute")


def test_layers_may_have_other_numbers_of_heads():
    for layer, heads in ((0, 4), (1, 8)):
        module = nn.Module()
        module.config, module.layer_idx, module.head_dim = _PerLayer(), layer, 16
        module.k_proj = nn.Linear(32, 32)
        assert head_sizes(module) == (2, heads, 16, 16)


def test_other_attention_functions_are_refused_without_a_gate():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("lengths_only", sdpa_attention_forward)
    for gate in (False, True):
        model = prefixed("llama", gate=gate)
        model.config._attn_implementation = "lengths_only"
        if gate:
            assert torch.isfinite(model(input_ids=torch.arange(5)[None]).logits).all()
        else:
            site = model.model.layers[0].self_attn.virtual_tokens
            assert site.peftkit_verdict() == (
                "torch",
                "concatenated with the keys: the model's attention is lengths_only, whose masks would hide a prefix: a forward raises an error",
            )
            with pytest.raises(NotImplementedError, match=r"'lengths_only' attention.*gate=True"):
                model(input_ids=torch.arange(5)[None])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 is below 1"),
        ({"init": "zeros"}, "init='zeros' is unknown"),
        ({"init": "text"}, "give init_token_ids with init='text'"),
        ({"attention": ["both"]}, "is not a list of encoder, decoder, cross"),
        ({"layers": [5]}, r"layer 5 has no attention; the layers with attentions are \[0, 1\]"),
        ({"target_modules": ["attn"]}, "'attn' is not a module of"),
    ],
)
def test_errors_name_the_argument_and_a_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        add_prefixes(models.tiny("llama"), PrefixConfig(**fields))
