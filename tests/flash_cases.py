"""flash-attn's two functions in plain torch, as its docstrings define them. Transformers finds them instead of the library.

Source: ``flash_attn_func`` and ``flash_attn_varlen_func`` of flash-attn 2.8. The causal mask aligns the last query with the last key. A
window is relative to this position. A query without visible keys gives zero.
"""

import torch
from torch import nn
from transformers import modeling_flash_attention_utils as utils

NAME = "flash_attention_2"


def one(q, k, v, scale, causal, window, softcap):
    """Attention of one sequence: queries ``[S, H, D]`` over keys ``[T, H_kv, D]``."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("shd,thd->hst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    own = torch.arange(len(q))[:, None] + len(k) - len(q)
    key, (left, right) = torch.arange(len(k)), window
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if causal:
        seen &= key <= own
    if left >= 0:
        seen &= key >= own - left
    if right >= 0:
        seen &= key <= own + right
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hst,thd->shd", weights.where(seen.any(-1, keepdim=True), 0.0), v)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    assert dropout_p == 0.0
    options = softmax_scale, causal, window_size, softcap
    return torch.stack([one(*tensors, *options) for tensors in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    assert dropout_p == 0.0
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(queries), max(keys)) == (int(max_seqlen_q), int(max_seqlen_k))
    options = softmax_scale, causal, window_size, softcap
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([one(*tensors, *options) for tensors in parts])


def install(monkeypatch) -> None:
    """Let transformers find the two functions, only by the name that a model's config gives."""

    def find(name, *_, **__):
        if name != NAME:
            raise ValueError(f"there is no kernel {name!r}")
        return flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input

    monkeypatch.setattr(utils, "_lazy_imports", find)
    monkeypatch.setattr(utils, "_loaded_implementation", None)


def use(model: nn.Module) -> nn.Module:
    """Select flash attention in a model's configs. ``set_attn_implementation`` would require the library and a GPU."""
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None:
            config._attn_implementation = NAME
    return model
