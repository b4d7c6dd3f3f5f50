"""KV prefixes beside the fused attention: one native pass, gated or not, in either order of adding them."""

import copy
import pickle

import pytest
import torch
from markers import needs_native
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from lab.testing import assert_no_worse_than
from peftkit import accelerate, restore
from peftkit.fuse.attention import FusedAttention
from peftkit.prefix import Prefix, PrefixConfig, add_prefixes, attention, remove_prefixes
from peftkit.prefix.module import PrefixAttention

pytestmark = needs_native

P = 3


def wide_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).eval()


def gated_llama(gate, fused):
    """``wide_llama`` with prefixes behind gates."""
    model = wide_llama()
    torch.manual_seed(1)
    add_prefixes(model, PrefixConfig(num_virtual_tokens=P, init_std=0.7, gate=True))
    for module in model.modules():
        if isinstance(module, Prefix):
            nn.init.constant_(module.gate, gate)
    return accelerate(model) if fused else model


def padded(ids, kind):
    """The inputs of a batch whose second sequence may be padded, with its labels."""
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    own = {"attention_mask": mask} if kind == "padded" else {}
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)} | own


@pytest.mark.parametrize("kind", ["causal", "padded"])
def test_a_gated_prefix_is_one_pass_with_the_fused_attention(kind, monkeypatch):
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    batch, results = padded(ids, kind), []
    truth = gated_llama(0.4, fused=False).double()
    for model in (gated_llama(0.4, fused=True), gated_llama(0.4, fused=False), truth):
        site = model.model.layers[0].self_attn.virtual_tokens
        before = site.peftkit_verdict()
        with monkeypatch.context() as patch:
            if before[0] == "fused:torch":
                patch.setattr(attention, "gated_attention", None)
            output = model(**batch)
        assert site.peftkit_verdict() == before
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(output.loss, parameters.values())
        assert any("gate" in name for name in parameters)
        results.append({"loss": output.loss.detach()} | dict(zip(parameters, grads, strict=True)))
    sites = [m.model.layers[0].self_attn.virtual_tokens for m in (gated_llama(0.4, True), model)]
    assert [site.peftkit_verdict()[0] for site in sites] == ["fused:torch", "torch"]
    fused, plain, exact = results
    for name, value in exact.items():
        assert_no_worse_than(fused[name], plain[name], value, name)


def test_a_closed_gate_changes_no_bit_of_the_fused_attention():
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    base = accelerate(wide_llama().requires_grad_(False))
    for kind in ("causal", "padded"):
        inputs = padded(ids, kind)
        with torch.no_grad():
            model = gated_llama(0.0, fused=True)
            assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_several_gated_prefixes_and_few_queries_are_added():
    ids = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(1))
    model = gated_llama(0.4, fused=True)
    site = model.model.layers[0].self_attn.virtual_tokens
    site.adapters["second"] = Prefix(2, P, 32, 32, 1.0, 4)
    assert site.peftkit_verdict()[1].endswith("added to the model's: 2 prefixes are active")
    model = gated_llama(0.4, fused=True)
    site = model.model.layers[0].self_attn.virtual_tokens
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        part = model(input_ids=ids[:, :39], use_cache=True)
        assert site.peftkit_verdict() == ("fused:torch", "")
        last = model(input_ids=ids[:, 39:], past_key_values=part.past_key_values).logits
        assert site.peftkit_verdict() == ("fused:torch", "")
        truth = model.double()(input_ids=ids).logits
    assert_no_worse_than(last[:, -1], whole[:, -1], truth[:, -1])


@pytest.mark.parametrize("prefix_first", [False, True])
def test_with_the_fused_attention_in_either_order(prefix_first):
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    plain = wide_llama()
    torch.manual_seed(1)
    add_prefixes(plain, PrefixConfig(num_virtual_tokens=P, init_std=0.7))
    model = wide_llama()
    if not prefix_first:
        accelerate(model)
    torch.manual_seed(1)
    add_prefixes(model, PrefixConfig(num_virtual_tokens=P, init_std=0.7))
    if prefix_first:
        accelerate(model)
    module = model.model.layers[0].self_attn
    assert isinstance(module, FusedAttention)
    assert isinstance(module, PrefixAttention)
    assert module.config._attn_implementation == "peftkit_prefix"
    assert module.peftkit_function() == "peftkit_sdpa"
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected, truth = plain(input_ids=ids).logits, plain.double()(input_ids=ids).logits
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_no_worse_than(twin(input_ids=ids).logits, expected, truth)
        restore(model)
        assert not isinstance(module, FusedAttention)
        assert torch.equal(model(input_ids=ids).logits, expected)
        remove_prefixes(model)
    assert type(module) is modeling_llama.LlamaAttention
