"""Inputs of attention with a prefix, its masks, and every result by name."""

import torch
from attention_bounds import attention_bounds
from lora_cases import gradients

from peftkit_kernels.ops.prefix_attention import prefix_attention

NAMES = ("q", "k", "v", "prefix_k", "prefix_v")
SHAPES = {
    # B, H, H_kv, S, T, P, D
    "native": (2, 2, 2, 64, 64, 16, 32),
    "native, grouped heads, ragged": (2, 6, 2, 70, 70, 5, 64),
    "native, prefix of two blocks": (1, 4, 2, 33, 33, 70, 32),
    "one query": (2, 4, 2, 1, 33, 7, 32),
    "odd head size": (2, 4, 4, 17, 17, 3, 7),
    "odd head size, grouped heads": (1, 4, 2, 5, 20, 2, 12),
}
MASKS = ("none", "causal", "padding", "causal padding", "causal and padding")


def make(shape, dtype=torch.float32, gated=False, prefix_dtype=None, trained=None):
    """The tensors by name, with the strides of attention modules (positions before heads), and the gradient of the output."""
    B, H, G, S, T, P, D = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator)

    leaves = {
        "q": draw(B, S, H, D).to(dtype).transpose(1, 2),
        "k": draw(B, T, G, D).to(dtype).transpose(1, 2),
        "v": draw(B, T, G, D).to(dtype).transpose(1, 2),
        "prefix_k": draw(G, P, D).to(prefix_dtype or dtype),
        "prefix_v": draw(G, P, D).to(prefix_dtype or dtype),
    }
    if gated:
        leaves["gate"] = draw(H).to(prefix_dtype or dtype)
    for name, leaf in leaves.items():
        leaf.requires_grad_(trained is None or name in trained)
    return leaves, draw(B, S, H, D).to(dtype)


def masking(shape, kind):
    """The options of a kind of mask. The last sequence is padded on the left and starts with queries without visible keys."""
    B, _, _, S, T, _, _ = shape
    if kind == "none" or (kind == "causal" and S != T):
        return {}
    if kind == "causal":
        return {"causal": True}
    mask = torch.ones(B, 1, S, T, dtype=torch.bool)
    if kind == "causal padding" or S != T:
        mask = mask.tril(T - S)
    mask[-1, :, :, : T // 3 + 1] = False
    return {"mask": mask} | ({"causal": True} if kind == "causal and padding" and S == T else {})


def run(leaves, dout, op=prefix_attention, **options):
    gate = {"gate": leaves["gate"]} if "gate" in leaves else {}
    D = leaves["q"].shape[-1]
    out = op(*(leaves[name] for name in NAMES), D**-0.5, **gate, **options)
    return {"out": out.detach()} | gradients(out, dout.to(out.dtype), leaves)


def visible(shape, options):
    """``Bool[B, 1, S, T]``: the keys that the options make visible to a query, without the prefix."""
    B, _, _, S, T, _, _ = shape
    seen = options.get("mask", torch.ones(B, 1, S, T, dtype=torch.bool))
    return seen.tril() if options.get("causal") else seen


def check(shape, leaves, dout, **options):
    """Assert that every result is within its bound."""
    actual = run(leaves, dout, **options)
    expected = attention_bounds(leaves, dout, shape[-1] ** -0.5, visible(shape, options))
    assert actual.keys() == expected.keys() == {"out", *leaves}
    for name, value in actual.items():
        expected[name].check(value, name)
        assert value.dtype == leaves.get(name, leaves["q"]).dtype
