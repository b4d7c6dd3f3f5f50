"""Fuses every norm and gated MLP of an architecture of transformers, and compares the results with the module's own forward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from peftkit.compatibility.tiny import shrink, tiny_model
from peftkit.fuse.norm import fuse_norms
from peftkit.fuse.plan import Reason
from peftkit.fuse.recognise import NormFormula, recognise_gated_mlp, recognise_norm
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MLP_NAMES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))


def build(model_type: str) -> nn.Module | None:
    """A tiny model, with a head if the type has one; ``None`` if no model can be built."""
    try:
        return tiny_model(model_type).requires_grad_(False)
    except Exception:  # an unknown architecture may raise anything for small sizes
        names = MODEL_MAPPING_NAMES.get(model_type, ())
    for name in (names,) if isinstance(names, str) else names:
        try:
            config = AutoConfig.for_model(model_type)
            shrink(config)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return getattr(transformers, name)(config).eval().requires_grad_(False)
        except Exception:
            continue
    return None


def kinds(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Name, module and linears (none for a norm) of one norm or gated MLP for each class and settings."""
    seen = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        names = next((n for n in MLP_NAMES if all(k in module._modules for k in n)), ())
        is_norm = "norm" in type(module).__name__.lower()
        if not names and not (is_norm and weight is not None and weight.dim() == 1):
            continue
        settings = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str))}
        sizes = [tuple(p.shape) for p in module.parameters()] if names else list(weight.shape)
        act = str(vars(module).get("act_fn", module._modules.get("act_fn")))
        key = (type(module), str(settings), str(sizes), act)
        if key not in seen:
            seen.add(key)
            yield name, module, names


def verdict(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The formula that a module was recognised as."""
    return recognise_gated_mlp(module, names) if names else recognise_norm(module)


def wrong(module: nn.Module, names: tuple[str, ...], answer: Any) -> list[str]:
    """The results in which a recognised module and its fused form differ by more than their roundings."""
    if isinstance(answer, Reason):
        return []
    check = _wrong_mlp if names else _wrong_norm
    return [
        found for dtype in DTYPES for found in check(copy.deepcopy(module), names, answer, dtype)
    ]


def _draw(width: int, scale: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, width, generator=generator) + 0.3
    x[0, 0, 0] = 50.0  # the residual stream has such channels
    return (scale * x).to(dtype)


def _wrong_norm(
    norm: Any, names: tuple[str, ...], formula: NormFormula, dtype: torch.dtype
) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.data[0] = 20.0
    norm = norm.to(dtype)
    fused = copy.deepcopy(norm)
    if not fuse_norms(fused):
        return [] if dtype not in formula.dtypes else [f"{dtype}: not fused"]
    found = []
    for scale in (1e-4, 1.0, 1e3):
        x = _draw(norm.weight.shape[0], scale, dtype)
        own, y = norm(x), fused(x)
        # Two roundings, each to one of two neighbours: the result and the value before the weight. Statistics are in float32.
        bias = 0.0 if norm._parameters.get("bias") is None else norm.bias.double().abs()
        wide = x.double() - (x.double().mean(-1, keepdim=True) if formula.kind == "layer" else 0.0)
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + formula.eps)
        weight = (norm.weight.double() + formula.offset).abs()
        largest = weight * x.double().abs().amax(-1, keepdim=True) * root + bias
        eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        smallest = torch.finfo(dtype).smallest_normal * eps
        allowed = 2 * eps * (own.double().abs() + 2 * bias) + 16 * eps32 * largest
        allowed = allowed + smallest * (1 + weight)
        difference = (y.double() - own.double()).abs()
        if y.dtype is not own.dtype or not (difference <= allowed).all():
            found.append(f"{dtype}, scale {scale}: off by {(difference / allowed).max():.3g}")
    return found


def _wrong_mlp(mlp: Any, names: tuple[str, ...], act: str, dtype: torch.dtype) -> list[str]:
    mlp = mlp.to(dtype)
    exact = copy.deepcopy(mlp).double()
    parts = [getattr(mlp, name) for name in names]
    width = parts[0].in_features
    found = []
    for scale in (1e-2, 1.0, 30.0):
        x = _draw(width, scale, dtype)
        truth, own, y = exact(x.double()), mlp(x), _fused_mlp(mlp, names, act, x)
        both = _fused_mlp(exact, names, act, x.double())
        if (both - truth).abs().max() > 1e-12 * truth.abs().max():
            found.append(f"float64, scale {scale}: another function")
        finite = own.isfinite() & truth.isfinite()
        errors = [(z.double() - truth)[finite].abs().max() for z in (y, own)]
        floor = torch.finfo(dtype).eps * truth[finite].abs().max()
        if y.dtype is not own.dtype or errors[0] > 2 * errors[1] + floor:
            found.append(f"{dtype}, scale {scale}: error {errors[0]:.3g}, own {errors[1]:.3g}")
    return found


def _fused_mlp(mlp: Any, names: tuple[str, ...], act: str, x: Tensor) -> Tensor:
    parts = [getattr(mlp, name) for name in names]
    weights, biases = [p.weight for p in parts], [p.bias for p in parts]
    if len(parts) == 2:
        weights = [*weights[0].chunk(2), weights[1]]
        biases = [*((None, None) if biases[0] is None else biases[0].chunk(2)), biases[1]]
    return lora_swiglu_mlp(x, weights, biases, [None] * 3, act)
