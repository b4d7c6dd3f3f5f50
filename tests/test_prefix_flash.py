"""KV prefixes in transformers' flash attention, flash-attn itself as its docstrings define it, against the eager attention."""

import itertools

import flash_cases
import pairs
import pytest
import torch
from prefix_models import prefixed
from torch import nn
from transformers import StaticCache
from transformers.integrations import flash_attention

from lab.testing import assert_no_worse_than
from peftkit.find.points import probe_inputs
from peftkit.prefix import remove_prefixes
from peftkit.prefix.attention import prefix_attention

LENGTH = 7
"""Less than the sliding windows of 8, and with a prefix more."""


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    flash_cases.install(monkeypatch)


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(side: str) -> torch.Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(3) if side == "left" else slice(-3, None)] = 0
    return mask


def three_ways(model: nn.Module, run) -> tuple:
    """What ``run`` gives by flash, by eager and in float64."""
    actual = run(flash_cases.use(model))
    model.set_attn_implementation("eager")
    plain = run(model)
    model.set_attn_implementation("sdpa")
    return actual, plain, run(model.double())


BATCHES = {
    "one": {"input_ids": tokens(1)},
    "one with positions": {"input_ids": tokens(1), "position_ids": torch.arange(LENGTH)[None]},
    "one, padded, with positions that start anew": {
        "input_ids": tokens(1),
        "attention_mask": padded("left")[1:],
        "position_ids": torch.tensor([[0, 0, 0, 0, 1, 2, 3]]),
    },
    "two": {"input_ids": tokens()},
    "padded on the left": {"input_ids": tokens(), "attention_mask": padded("left")},
    "padded on the right": {"input_ids": tokens(), "attention_mask": padded("right")},
}


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("gate", [False, True], ids=["shared", "gated"])
@pytest.mark.parametrize("name", ["llama", "mistral", "roberta"])
@pytest.mark.parametrize("kind", BATCHES)
def test_every_query_sees_the_prefix(kind, name, gate, gradients):
    model, inputs = prefixed(name, gate=gate), BATCHES[kind]
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()

    def run(model):
        model.zero_grad()
        with torch.set_grad_enabled(gradients):
            output = model(**inputs)[0][seen]
        if gradients:
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
            (output.flatten() * weights).sum().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return {"output": output}

    actual, plain, truth = three_ways(model, run)
    pairs.assert_near_enough([(actual, plain, truth)])
    if not gradients:
        remove_prefixes(model)
        without = run(model)["output"]
        assert (without - truth["output"]).abs().max() > 1e-3 * truth["output"].abs().max()


@torch.no_grad
@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_cross_attention_without_padding(name):
    model = prefixed(name)
    inputs = probe_inputs(model)

    def run(model):
        dtype = model.dtype
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        return model(**cast).logits

    assert_no_worse_than(*three_ways(model, run))


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "mistral"])
def test_generation_equals_eager(name):
    """Longer than the sliding windows, of which a cache keeps no more; the second prompt is padded on the left."""
    model = prefixed(name, "eager")
    mask = padded("left")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"input_ids": tokens(), "attention_mask": mask}
    expected = model.generate(**settings)
    assert torch.equal(flash_cases.use(model).generate(**settings), expected)


@torch.no_grad
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_static_caches_equal_eager(name):
    """In pieces of several tokens and of one, in a cache with room left."""
    model, mask, ids = prefixed(name), padded("left"), tokens()

    def run(model):
        cache, results = StaticCache(model.config, max_cache_len=LENGTH + 1), []
        for start, end in itertools.pairwise((0, 4, 6, 7)):
            settings = {"attention_mask": mask[:, :end], "past_key_values": cache}
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            output = model(input_ids=ids[:, start:end], position_ids=positions, **settings)
            results.append(output.logits)
        return torch.cat(results, 1)[mask.bool()]

    assert_no_worse_than(*three_ways(model, run))


def test_soft_caps_hold_for_the_prefix_too():
    model = prefixed("gemma2", "eager")
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    with torch.no_grad():
        plain = model(input_ids=tokens()).logits
        actual = flash_cases.use(model)(input_ids=tokens()).logits
        # the written out softmax is of float64 there, the eager one of float32
        assert_no_worse_than(actual, plain, model.double()(input_ids=tokens()).logits)


PACKED = torch.cat([torch.arange(n) for n in (3, 6, 1, 2)])[None]
LENGTHS = torch.tensor([0, 3, 9, 10, 12], dtype=torch.int32)
VARLEN = {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS, "max_length_q": 6, "max_length_k": 6}


@pytest.mark.parametrize("gate", [False, True], ids=["shared", "gated"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("told", ["positions", "lengths"])
def test_each_of_packed_sequences_sees_the_prefix(told, name, gate):
    """Together they are longer than the window, each of them is not."""
    model, inputs = prefixed(name, gate=gate), {"input_ids": tokens(1, 12), "position_ids": PACKED}

    def run(model):
        model.zero_grad()
        varlen = told == "lengths" and model.config._attn_implementation == flash_cases.NAME
        output = model(**inputs, use_cache=False, **(VARLEN if varlen else {})).logits
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
        (output.flatten() * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return {"output": output.detach()} | gradients

    actual, plain, truth = three_ways(model, run)
    pairs.assert_near_enough([(actual, plain, truth)])


REFUSED = {
    "a window": (
        {"input_ids": tokens(length=9)},
        "its window of 8 tokens would hide the prefix, because the text has 9 tokens",
    ),
    "a window of packed sequences": (
        {
            "input_ids": tokens(1, 12),
            "position_ids": torch.cat([torch.arange(3), torch.arange(9)])[None],
            "use_cache": False,
        },
        "its window of 8 tokens would hide the prefix, because the text has 9 tokens",
    ),
    "packed sequences in rows": (
        {"input_ids": tokens(2, 6), "use_cache": False, **VARLEN},
        "its packed sequences are in 2 rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_hide_a_prefix_is_refused_without_a_gate(case):
    inputs, reason = REFUSED[case]
    with pytest.raises(
        NotImplementedError, match=rf"cannot run in 'flash_attention_2' attention: {reason}.*gate="
    ):
        flash_cases.use(prefixed("mistral"))(**inputs)


@torch.no_grad
def test_a_gate_is_open_to_windows():
    model = prefixed("mistral", gate=True)
    assert_no_worse_than(*three_ways(model, lambda model: model(input_ids=tokens(2, 12)).logits))


def test_padding_of_other_keys_than_the_queries_own_is_refused():
    module = flash_cases.use(prefixed("bart")).model.decoder.layers[0].encoder_attn
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, LENGTH, 8)
    with pytest.raises(NotImplementedError, match="padding of 7 keys to 5 queries"):
        prefix_attention(module, q, k, k, padded("right"), scaling=0.4)


@torch.no_grad
def test_one_query_sees_the_prefix_and_keys_that_are_padded():
    module = prefixed("bart").model.decoder.layers[0].encoder_attn
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 4, LENGTH, 8), torch.randn(2, 4, LENGTH, 8)
    seen = padded("right")

    def run(name, mask, dtype):
        module.config._attn_implementation = name
        tensors = (t.to(dtype) for t in (q, k, v))
        return prefix_attention(module.to(dtype), *tensors, mask, scaling=0.4)[0]

    added = torch.zeros(2, 1, 1, LENGTH).masked_fill(seen[:, None, None] == 0, -torch.inf)
    actual, plain = run(flash_cases.NAME, seen, q.dtype), run("eager", added, q.dtype)
    truth = run("sdpa", seen[:, None, None].bool(), torch.float64)
    assert_no_worse_than(actual, plain, truth)


def test_masks_aligned_to_the_first_key_are_refused(monkeypatch):
    monkeypatch.setattr(flash_attention, "_use_top_left_mask", True)
    with pytest.raises(NotImplementedError, match="aligns its causal mask to the first key"):
        flash_cases.use(prefixed("llama"))(input_ids=tokens())
    assert flash_cases.use(prefixed("bert"))(input_ids=tokens())[0].isfinite().all()


def test_paged_keys_are_refused():
    module = flash_cases.use(prefixed("llama")).model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="its keys are in a paged cache"):
        prefix_attention(module, q, k, k, None, scaling=0.4, cache=object())


def test_explain_says_where_a_forward_raises():
    site = flash_cases.use(prefixed("llama")).model.layers[0].self_attn.virtual_tokens
    assert site.peftkit_verdict() == (
        "torch",
        "concatenated with the keys: the model's attention is flash_attention_2, which raises an error "
        "if a text is longer than a sliding window",
    )
