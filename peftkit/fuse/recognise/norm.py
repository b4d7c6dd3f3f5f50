"""Recognises RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from peftkit.fuse.plan import Reason
from peftkit.fuse.recognise.graph import Graph, Node
from peftkit.fuse.recognise.trace import DTYPES, Kind, trace
from peftkit.fuse.recognise.verdict import examine
from peftkit.fuse.seal import Seal


class NormFormula(NamedTuple):
    """The formula of a norm over the last axis.

    Attributes:
        kind: ``"rms"``: ``x · rsqrt(mean(x²) + eps) · (offset + weight)``. ``"layer"``:
            ``(x - mean(x)) · rsqrt(var(x) + eps) · weight + bias``.
        eps: Added to the mean square or variance.
        offset: Added to the weight.
        round_first: Whether the normalised value is rounded to the dtype of ``x`` before it is multiplied by the weight.
        width: Elements of a row.
        has_bias: Whether there is a bias.
        dtypes: Dtypes of the input for which the module computes this formula. float64 is not among them if the module computes
            in float32 for every input; only float32 and float64 are if it computes in the dtype of its input.
        in_autocast: Whether 16-bit inputs give the same results under autocast. A function of torch that computes the whole norm
            may give others.
    """

    kind: str
    eps: float
    offset: float = 0.0
    round_first: bool = False
    width: int = 0
    has_bias: bool = False
    dtypes: frozenset[torch.dtype] = frozenset()
    in_autocast: bool = True


def seal_norm(module: nn.Module) -> Seal:
    """The seal of ``module``: the formula if ``frozen_rms_norm`` or ``frozen_layer_norm`` computes this norm, or a reason."""
    weight = module._parameters.get("weight")
    if "parametrizations" in module._modules:
        return Seal(Reason("its weight is parametrised"), seal_norm)
    if weight is None or weight.dim() != 1 or not weight.is_floating_point():
        return Seal(Reason("it has no weight of one axis"), seal_norm)
    if others := [
        *(set(module._parameters) - {"weight", "bias"}),
        *module._modules,
        *module._buffers,
    ]:
        return Seal(Reason(f"it has {', '.join(others)} besides its weight and bias"), seal_norm)
    bias = module._parameters.get("bias")
    if bias is not None and bias.shape != weight.shape:
        return Seal(Reason("its bias has another shape than its weight"), seal_norm)
    width = weight.shape[0]
    key = "norm", width, bias is not None

    def answer(kind: Kind) -> NormFormula | Reason:
        return _formula(module, kind, width, bias is not None)

    return examine(key, module, answer, seal_norm)


def _formula(module: nn.Module, kind: Kind, width: int, has_bias: bool) -> NormFormula | Reason:
    found: dict[torch.dtype, set[NormFormula]] = {}
    foreign: list[str] = []
    for dtype, graph, out in trace(module, kind, width, {}):
        found[dtype] = _matches(graph, out, dtype, has_bias)
        foreign += graph.foreign(out)
    # In float32 there is no cast, so only the 16-bit dtypes show where the module rounds.
    narrow = found[torch.bfloat16] & found[torch.float16]
    common = found[torch.float32] & narrow if narrow else found[torch.float32]
    if not common:
        uses = f" (it uses {', '.join(dict.fromkeys(foreign))})" if foreign else ""
        return Reason(f"its forward is no RMSNorm or LayerNorm that has a fused form{uses}")
    formula = min(common)
    return formula._replace(
        width=width,
        has_bias=has_bias,
        dtypes=frozenset(dtype for dtype in DTYPES if formula in found[dtype]),
        in_autocast=not kind.composites,
    )


def _matches(graph: Graph, out: Node, dtype: torch.dtype, has_bias: bool) -> set[NormFormula]:
    """All formulas whose node is ``out``."""
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
    """The node of a formula, with the casts of the reference in ``peftkit_kernels.ops.frozen_norm``."""
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
