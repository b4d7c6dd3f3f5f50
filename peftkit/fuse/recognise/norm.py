"""Which norm a module computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from peftkit.fuse.plan import Reason
from peftkit.fuse.recognise.graph import Graph, Node
from peftkit.fuse.recognise.trace import Kind, trace
from peftkit.fuse.recognise.verdict import examine
from peftkit.fuse.seal import Seal, own_class


class NormFormula(NamedTuple):
    """The formula of a norm over the last axis.

    Attributes:
        kind: ``"rms"``: ``x · rsqrt(mean(x²) + eps) · (offset + weight)``. ``"layer"``:
            ``(x - mean(x)) · rsqrt(var(x) + eps) · weight + bias``.
        eps: Added to the mean square or variance.
        offset: Added to the weight.
        round_first: Whether the normalised value is rounded to the dtype of ``x`` before it is multiplied by the weight.
        in_float64: Whether float64 inputs are computed in float64; if not, the module computes them in float32.
    """

    kind: str
    eps: float
    offset: float = 0.0
    round_first: bool = False
    in_float64: bool = True


def seal_norm(module: nn.Module) -> Seal:
    """Whether ``module`` is a norm that ``frozen_rms_norm`` or ``frozen_layer_norm`` computes, and what that relies on."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or not weight.is_floating_point():
        return Seal(Reason("it has no weight of one axis"))
    if "parametrizations" in module._modules:
        return Seal(Reason("its weight is parametrised"))
    if others := [
        *(set(module._parameters) - {"weight", "bias"}),
        *module._modules,
        *module._buffers,
    ]:
        return Seal(Reason(f"it has {', '.join(others)} besides its weight and bias"))
    bias = module._parameters.get("bias")
    if bias is not None and bias.shape != weight.shape:
        return Seal(Reason("its bias has another shape than its weight"))
    width = weight.shape[0]
    key = "norm", own_class(module), width, bias is not None, tuple(module._parameters)
    return examine(key, module, lambda kind: _formula(module, kind, width, bias is not None))


def _formula(module: nn.Module, kind: Kind, width: int, has_bias: bool) -> NormFormula | Reason:
    found: dict[torch.dtype, set[NormFormula]] = {}
    unmatched = None
    for dtype, graph, out in trace(module, kind, width, {}):
        found[dtype] = _matches(graph, out, dtype, has_bias)
        if not found[dtype] and dtype is not torch.float64:
            unmatched = unmatched or graph
    narrow = [formulas for dtype, formulas in found.items() if dtype is not torch.float64]
    common = set.intersection(*narrow)
    if len(common) != 1:
        return Reason(
            "its forward is neither RMSNorm nor LayerNorm with the casts that can be fused"
        )
    (formula,) = common
    return formula._replace(in_float64=formula in found[torch.float64])


def _matches(graph: Graph, out: Node, dtype: torch.dtype, has_bias: bool) -> set[NormFormula]:
    """All formulas that are the node ``out``."""
    numbers = graph.constants("add")
    offsets = [0.0, *numbers]
    candidates = [
        *(
            NormFormula("rms", eps, offset, first)
            for eps in numbers
            for offset in offsets
            for first in (True, False)
        ),
        *(NormFormula("layer", eps) for eps in numbers),
    ]
    return {f for f in candidates if _node(graph, f, dtype, has_bias) is out}


def _node(graph: Graph, formula: NormFormula, dtype: torch.dtype, has_bias: bool) -> Node:
    """The node of a formula: the definition of ``peftkit_kernels.frozen_norm`` cast by cast."""
    wide = torch.promote_types(dtype, torch.float32)

    def cast(node: Node, to: torch.dtype) -> Node:
        return node if wide is dtype else graph.cast(node, to)

    def shifted(weight: Node) -> Node:
        return graph.add(weight, formula.offset) if formula.offset else weight

    x, weight, bias = graph.node("x"), graph.node("parameter", "weight"), None
    if has_bias:
        bias = graph.node("parameter", "bias")
    h = cast(x, wide)
    if formula.kind == "layer":
        centred = graph.sub(h, graph.mean(h))
        normed = graph.mul(centred, graph.rsqrt(graph.add(graph.variance(h), formula.eps)))
        y = graph.mul(normed, cast(weight, wide))
        return cast(y if bias is None else graph.add(y, cast(bias, wide)), dtype)
    normed = graph.mul(h, graph.rsqrt(graph.add(graph.mean(graph.square(h)), formula.eps)))
    if formula.round_first:
        return graph.mul(shifted(weight), cast(normed, dtype))
    return cast(graph.mul(normed, shifted(cast(weight, wide))), dtype)
