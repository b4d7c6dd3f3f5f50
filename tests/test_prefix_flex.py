"""KV prefixes without a gate in flex attention, against the eager attention with the same prefixes.

Most tests let torch write flex attention out instead of compiling it, which takes ten seconds a shape; one runs the kernel.
"""

import gc
import itertools
import weakref

import families
import models
import pairs
import pytest
import torch
from prefix_models import EAGER_ONLY, P, doubled, first, prefixed
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex
from transformers import AttentionInterface, LlamaConfig, StaticCache
from transformers.models.llama import modeling_llama

from lab.testing import assert_no_worse_than
from peftkit.find.points import probe_inputs
from peftkit.prefix import Prefix, PrefixConfig, PrefixSite, add_prefixes, remove_prefixes
from peftkit.prefix.attention import prefix_attention
from peftkit.prefix.inject import attach
from peftkit.prefix.masks import widen

pytestmark = [
    # how transformers 5.23 makes its masks
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

LENGTH = 12
"""More than the sliding windows of 8."""
FAMILIES = (
    *("llama", "gemma3", "mistral", "opt", "bert", "t5", "gemma2", "gpt_neox"),
    *("modernbert", "whisper", "qwen3_moe", "clip"),
)


@pytest.fixture
def written_out():
    """Functions that were compiled run as they are."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def any_device(monkeypatch):
    """No refusal by torch of gradients of flex attention on the CPU, which the written out form has."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


def three_ways(model: nn.Module, name: str, run) -> tuple:
    """What ``run`` gives by flex, by eager and in float64."""
    model.set_attn_implementation("flex_attention")
    actual = run(torch.float32)
    model.set_attn_implementation("eager")
    plain = run(torch.float32)
    if name not in EAGER_ONLY:
        model.set_attn_implementation("sdpa")  # eager functions take the softmax in float32
    if name == "qwen3_moe":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    model.double()
    return actual, plain, run(torch.float64)


def tokens(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad
@pytest.mark.parametrize("name", FAMILIES)
def test_models_agree_with_eager(name, written_out):
    model = prefixed(name, "flex_attention")
    inputs = probe_inputs(model)
    if inputs.get("input_ids") is not None and name != "clip":
        inputs["input_ids"] = tokens(1)[: len(inputs["input_ids"])]

    def run(dtype):
        return first(model(**(inputs if dtype is torch.float32 else doubled(inputs))))

    actual, plain, truth = three_ways(model, name, run)
    assert_no_worse_than(actual, plain, truth)
    remove_prefixes(model)
    assert (run(torch.float64) - truth).abs().max() > 1e-3 * truth.abs().max()


def padded(count: int, side: str) -> torch.Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(count) if side == "left" else slice(-count, None)] = 0
    return mask


def window(dtype: torch.dtype) -> torch.Tensor:
    """Added to the scores: causal, and each token sees two more."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-2)
    return torch.zeros(2, 1, LENGTH, LENGTH, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


MASKS = {
    "none": lambda dtype: {},
    "padded on the left": lambda dtype: {"attention_mask": padded(5, "left")},
    "padded on the right": lambda dtype: {"attention_mask": padded(5, "right")},
    "packed": lambda dtype: {
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1),
        "use_cache": False,
    },
    "added to the scores": lambda dtype: {"attention_mask": window(dtype)},
}


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_mean_what_they_mean_in_eager(kind, name, gradients, written_out, any_device):
    model = prefixed(name, "flex_attention")

    def run(dtype):
        model.zero_grad()
        with torch.set_grad_enabled(gradients):
            output = model(input_ids=tokens(2), **MASKS[kind](dtype)).logits
        if gradients:
            weights = torch.linspace(-1, 1, output.numel(), dtype=dtype)
            (output.flatten() * weights).sum().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return {"logits": output}

    actual, plain, truth = three_ways(model, name, run)
    pairs.assert_near_enough([(actual, plain, truth)])


@torch.no_grad
def test_soft_caps_hold_for_the_prefix_too(written_out):
    model = prefixed("gemma2", "flex_attention")

    def run(dtype):
        return model(input_ids=tokens(3)).logits

    uncapped = run(torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    actual, plain, truth = three_ways(model, "gemma2", run)
    assert_no_worse_than(actual, plain, truth)
    assert (actual - uncapped).abs().max() > 1e-3 * truth.abs().max()


@torch.no_grad
def test_heads_that_are_no_power_of_two(written_out):
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
    model = families.hf.LlamaForCausalLM(
        LlamaConfig(**models._DECODER | sizes, attn_implementation="flex_attention")
    ).eval()
    add_prefixes(model, PrefixConfig(num_virtual_tokens=P, init_std=0.7))
    assert_no_worse_than(
        *three_ways(model, "llama", lambda dtype: model(input_ids=tokens(4)).logits)
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gemma2"])
def test_generation_equals_eager(name, written_out):
    """Longer than the sliding windows; the second prompt is padded on the left."""
    model = prefixed(name, "eager")
    ids = tokens(5, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"input_ids": ids, "attention_mask": mask}
    expected = model.generate(**settings)
    model.set_attn_implementation("flex_attention")
    assert torch.equal(model.generate(**settings), expected)
    assert torch.equal(model.generate(**settings, use_cache=False), expected)


@torch.no_grad
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_static_caches_equal_eager(name, written_out):
    """Called as ``generate`` would; that of transformers 5.23 takes no block mask for them."""
    model = prefixed(name, "flex_attention")
    ids, mask = tokens(5), padded(2, "left")

    def run(dtype):
        cache, results = StaticCache(model.config, max_cache_len=LENGTH + 3), []
        for start, end in itertools.pairwise((0, 6, *range(7, LENGTH + 1))):
            settings = {"attention_mask": mask[:, :end], "past_key_values": cache}
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            output = model(input_ids=ids[:, start:end], position_ids=positions, **settings)
            results.append(output.logits)
        return torch.cat(results, 1)

    assert_no_worse_than(*three_ways(model, name, run))


def attention_module(implementation: str, prefix: Prefix) -> nn.Module:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = implementation
    module = modeling_llama.LlamaAttention(config, 0).eval()
    site = PrefixSite()
    site.adapters["default"] = prefix
    attach(module, site)
    return module


def seeing(queries: int, length: int, back: int, ahead: int):
    """Sees that many tokens back and ahead of each query's own; the second sequence is padded on the left."""
    present = torch.arange(length) >= torch.tensor([0, 21])[:, None]

    def sees(batch, head, query, key):
        own = query + length - queries
        return present[batch, key] & (key > own - back) & (key <= own + ahead)

    return sees


@torch.no_grad
@pytest.mark.slow
def test_the_kernel_reads_the_widened_blocks(one_thread):
    """Blocks that are skipped, whole and partial, in a window; the prefix is longer than half a block."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(6)
    length, before = 400, 70
    q, k, v = (torch.randn(2, h, length, 8, generator=generator) for h in (4, 2, 2))
    sees = seeing(length, length, 300, 0)
    mask = flex.create_block_mask(sees, 2, None, length, length, device="cpu")
    seen = flex.create_mask(sees, 2, None, length, length, device="cpu")
    prefix = Prefix(2, before, 8, 8, 1.0)

    def run(implementation, mask, dtype):
        module = attention_module(implementation, prefix.to(dtype))
        q_, k_, v_ = (t.to(dtype) for t in (q, k, v))
        return prefix_attention(module, q_, k_, v_, mask, scaling=0.4)[0]

    added = torch.zeros(2, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    actual = run("flex_attention", mask, torch.float32)
    plain = run("eager", added, torch.float32)
    assert_no_worse_than(actual, plain, run("sdpa", seen, torch.float64))
    wide = widen(mask, before)
    assert 0 < int(wide.full_kv_num_blocks.sum()) < int(wide.to_dense().sum())
    assert not wide.to_dense().all()


@pytest.mark.parametrize("blocks", [16, (8, 16)], ids=str)
def test_widened_blocks_leave_out_nothing_and_take_for_whole_only_what_is(blocks):
    windows = (7, 0), (200, 0), (200, 200)
    for queries, length, before, (back, ahead) in itertools.product(
        (1, 32, 40), (5, 32, 100), (1, 16, 33), windows
    ):
        sees = seeing(queries, length, back, ahead)
        options = {"device": "cpu", "BLOCK_SIZE": blocks}
        wide = widen(flex.create_block_mask(sees, 2, 1, queries, length, **options), before)
        own = flex.create_block_mask(wide.mask_mod, 2, 1, queries, before + length, **options)
        assert wide.shape == own.shape
        assert wide.BLOCK_SIZE == own.BLOCK_SIZE
        seen = flex.create_mask(wide.mask_mod, 2, 1, queries, before + length, device="cpu")
        assert seen[..., :before].all()
        tokens = flex.create_mask(sees, 2, 1, queries, length, device="cpu")
        assert torch.equal(seen[..., before:], tokens)
        for ours, torchs in (
            ((wide.kv_num_blocks, wide.kv_indices), (own.kv_num_blocks, own.kv_indices)),
            ((wide.q_num_blocks, wide.q_indices), (own.q_num_blocks, own.q_indices)),
        ):
            assert [t.shape for t in ours] == [t.shape for t in torchs]
            assert [t.dtype for t in ours] == [t.dtype for t in torchs]
        assert (wide.to_dense() >= own.to_dense()).all()
        assert (whole(wide) <= whole(own)).all()
        assert not (whole(wide) & partial(wide)).any()
        if before % wide.BLOCK_SIZE[1] == 0:  # the same blocks, moved
            assert torch.equal(wide.to_dense(), own.to_dense())
            assert torch.equal(whole(wide), whole(own))


def whole(mask: flex.BlockMask) -> torch.Tensor:
    found = flex.BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    return found.to_dense().bool()


def partial(mask: flex.BlockMask) -> torch.Tensor:
    return flex.BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices).to_dense().bool()


def causal(batch, head, query, key):
    return key <= query


def test_masks_without_whole_blocks_are_widened():
    options = {"device": "cpu", "BLOCK_SIZE": 16, "separate_full_blocks": False}
    mask = flex.create_block_mask(causal, 1, 1, 40, 40, **options)
    assert mask.full_kv_num_blocks is None
    own = flex.create_block_mask(widen(mask, 5).mask_mod, 1, 1, 40, 45, **options)
    assert (widen(mask, 5).to_dense() >= own.to_dense()).all()
    assert int(widen(mask, 5).full_kv_num_blocks.sum()) == 0


@torch.no_grad
def test_the_layers_share_one_widened_mask_that_goes_with_the_models(monkeypatch, written_out):
    seen = []

    def record(module, query, key, value, mask, **kwargs):
        seen.append(mask)
        return AttentionInterface._global_mapping["eager_like"](
            module, query, key, value, mask, **kwargs
        )

    interface = modeling_llama.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "eager_like", interface["flex_attention"]
    )
    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", record)
    model = prefixed("llama", "flex_attention")
    mask = flex.create_block_mask(causal, 2, None, LENGTH, LENGTH, device="cpu")
    for _ in range(2):
        model(input_ids=tokens(7), attention_mask=mask)
    assert len(seen) == 4
    assert all(wide is seen[0] for wide in seen)
    assert widen(mask, P) is seen[0]
    assert widen(mask, P + 1).shape[-1] == LENGTH + P + 1
    held, known = weakref.ref(mask), weakref.ref(seen[0])
    seen.clear()
    gc.disable()
    try:
        del mask
        assert held() is None
        assert known() is None
    finally:
        gc.enable()


@torch.no_grad
def test_one_graph_under_the_compiler(one_thread):
    torch.compiler.reset()
    counters.clear()
    model = prefixed("llama", "flex_attention")
    # a ready mask: that which transformers 5.23 makes itself breaks the base model's graph too
    mask = flex.create_block_mask(causal, 2, None, LENGTH, LENGTH, device="cpu")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(input_ids=tokens(8), attention_mask=mask, use_cache=False).logits
    assert counters["stats"]["unique_graphs"] == 1
    model.set_attn_implementation("eager")
    plain = model(input_ids=tokens(8)).logits
    model.set_attn_implementation("sdpa")
    assert_no_worse_than(actual, plain, model.double()(input_ids=tokens(8)).logits)


def test_on_the_cpu_torch_refuses_the_gradient_and_explain_says_so(written_out):
    model = prefixed("llama", "flex_attention")
    site = model.model.layers[0].self_attn.virtual_tokens
    assert site.peftkit_verdict() == (
        "torch",
        "concatenated with the keys: the model's attention is flex_attention, which has no backward in torch on the CPU",
    )
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(input_ids=tokens(9))
    elsewhere = site.to("meta")
    elsewhere.joined_because = None
    assert elsewhere.peftkit_verdict()[1].endswith("the model's attention is flex_attention")
