"""One small case of every op, for the tests of what all ops promise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lora_cases import Shape, draw

from peftkit_kernels.ops.bottleneck import bottleneck
from peftkit_kernels.ops.dora import dora_linear
from peftkit_kernels.ops.dora_scale import Scale, dora_gate, dora_scale
from peftkit_kernels.ops.frozen_norm import frozen_layer_norm, frozen_rms_norm
from peftkit_kernels.ops.grouped_lora import grouped_lora, plan_groups
from peftkit_kernels.ops.int8_compute_linear import int8_compute_linear
from peftkit_kernels.ops.lora_linear import lora_linear
from peftkit_kernels.ops.lora_qkv import lora_qkv
from peftkit_kernels.ops.lora_swiglu_mlp import lora_swiglu_mlp
from peftkit_kernels.ops.quantized_linear import fp8_linear, int8_linear, nf4_linear
from peftkit_kernels.storage.fp8 import quantize_fp8
from peftkit_kernels.storage.int8 import quantize_int8
from peftkit_kernels.storage.nf4 import quantize_nf4

WIDTH, INNER = 33, 21


@dataclass(frozen=True)
class Case:
    """An op applied to tensors by name. All tensors except the weights require a gradient.

    ``made_from`` names the tensors of which the op saves a derived tensor instead. ``stored`` is another input of the op that is no
    leaf, such as a quantised weight.
    """

    leaves: dict[str, torch.Tensor]
    apply: Callable
    made_from: tuple[str, ...] = ()
    stored: Any = None

    def outputs(self, **options):
        """The results of the op as a tuple."""
        outputs = self.apply(self.leaves, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def at(self, **leaves):
        """The same op on other tensors."""
        return replace(self, leaves=self.leaves | leaves)

    @property
    def trained(self):
        """The tensors that require a gradient, by name."""
        return {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}

    def run(self, **options):
        """Every output and gradient by name."""
        return self.gradients(self.outputs(**options))

    def gradients(self, outputs):
        """``outputs`` and the gradients of a fixed weighted sum of them, by name."""
        trained = self.trained
        grads = torch.autograd.grad(outputs, list(trained.values()), weights(outputs))
        values = {f"output{i}": y.detach() for i, y in enumerate(outputs)}
        return values | dict(zip(trained, grads, strict=True))

    def to(self, dtype, names=None):
        """The same case with the named tensors (default: all) cast."""

        def cast(name, leaf):
            if names is not None and name not in names:
                return leaf
            return leaf.detach().to(dtype).requires_grad_(leaf.requires_grad)

        return replace(self, leaves={name: cast(name, leaf) for name, leaf in self.leaves.items()})


def weights(outputs):
    """A gradient for every output, different in each element."""
    generator = torch.Generator().manual_seed(1)
    return [draw(tuple(y.shape), y.dtype, generator) for y in outputs]


def _parts(leaves, loras, suffix):
    lora = replace(loras[suffix], A=leaves["A" + suffix], B=leaves["B" + suffix])
    return leaves["weight" + suffix], leaves["bias" + suffix], lora


def _case(shape, sizes, op):
    x = shape.input()
    projections = {suffix: shape.projection(*size, suffix) for suffix, size in sizes.items()}
    loras = {suffix: part.lora for suffix, part in projections.items()}
    leaves = {"x": x}
    for suffix, part in projections.items():
        leaves |= {name + suffix: tensor for name, tensor in part.tensors().items()}

    def apply(leaves, **options):
        parts = [_parts(leaves, loras, suffix) for suffix in sizes]
        return op(leaves["x"], *zip(*parts, strict=True), **options)

    return Case(leaves, apply)


def _linear(x, weights, biases, loras, **options):
    return lora_linear(x, weights[0], biases[0], loras[0], **options)


def _quantized(shape, op, quantize):
    """A linear on a quantised weight, which is no tensor and therefore no leaf."""
    x, part = shape.input(), shape.projection(29, WIDTH)
    stored = quantize(part.weight.float())
    leaves = {"x": x, "bias": part.bias, "A": part.lora.A, "B": part.lora.B}

    def apply(leaves, **options):
        lora = replace(part.lora, A=leaves["A"], B=leaves["B"])
        return op(leaves["x"], stored, leaves["bias"], lora, **options)

    return Case(leaves, apply, stored=stored)


def bottleneck_leaves(shape):
    """``h`` and the four parameters of a bottleneck, by the names of its arguments."""
    width, dtype = shape.x[-1], shape.factors or shape.dtype
    leaves = {"x": shape.input()}
    sizes = {
        "down": (shape.rank, width),
        "bias_down": (shape.rank,),
        "up": (width, shape.rank),
        "bias_up": (width,),
    }
    for name, size in sizes.items():
        values = draw(size, dtype, shape.generator) / max(1, size[-1]) ** 0.5
        leaves[name] = values.requires_grad_(shape.trains(name))
    return leaves


def _bottleneck(shape):
    def apply(leaves, **options):
        parts = (leaves[name] for name in ("x", "down", "bias_down", "up", "bias_up"))
        return bottleneck(*parts, shape.scale, "gelu", **options)

    return Case(bottleneck_leaves(shape), apply)


def _dora(shape):
    """DoRA with a frozen magnitude. With a trained magnitude the output is saved and must not be changed in place."""
    x, part = shape.input(), shape.projection(29, WIDTH)
    magnitude = draw((29,), shape.factors or shape.dtype, shape.generator).abs() + 0.5
    leaves = {"x": x, **part.tensors(), "magnitude": magnitude}

    def apply(leaves, **options):
        lora = replace(part.lora, A=leaves["A"], B=leaves["B"])
        parts = leaves["weight"], leaves["bias"], lora, leaves["magnitude"]
        return dora_linear(leaves["x"], *parts, **options)

    return Case(leaves, apply)


def _scale_of(shape, suffix=""):
    """The leaves of one ``Scale``, and its norm, which is not a leaf."""
    dtype = shape.factors or shape.dtype
    leaves = {
        f"magnitude{suffix}": draw((WIDTH,), dtype, shape.generator).requires_grad_(),
        f"bias{suffix}": draw((WIDTH,), shape.dtype, shape.generator).requires_grad_(),
    }
    wide = torch.promote_types(dtype, torch.float32)
    return leaves, draw((WIDTH,), wide, shape.generator).abs() + 0.5


def _dora_scale(shape):
    leaves, norm = _scale_of(shape)

    def apply(leaves, **options):
        return dora_scale(leaves["x"], Scale(leaves["magnitude"], norm, leaves["bias"]), **options)

    return Case({"x": shape.input(), **leaves}, apply, made_from=("magnitude",))


def _dora_gate(shape):
    (gate, gate_norm), (up, up_norm) = _scale_of(shape, "_gate"), _scale_of(shape, "_up")

    def apply(leaves, **options):
        scales = (
            Scale(leaves["magnitude_gate"], gate_norm, leaves["bias_gate"]),
            Scale(leaves["magnitude_up"], up_norm, leaves["bias_up"]),
        )
        x = leaves["x"]
        return dora_gate((x, leaves["z_up"].reshape(x.shape)), scales, **options)

    leaves = {"x": shape.input(), "z_up": shape.input(), **gate, **up}
    return Case(leaves, apply, made_from=("magnitude_gate", "magnitude_up"))


def _grouped(shape):
    adapters, dtype = 3, shape.factors or shape.dtype
    leaves = {
        "x": shape.input(),
        "bias_y": draw((*shape.x[:-1], 29), shape.dtype, shape.generator),
        "A": draw((adapters, 4, WIDTH), dtype, shape.generator) / WIDTH**0.5,
        "B": draw((adapters, 29, 4), dtype, shape.generator) / 2,
    }
    for name in "AB":
        leaves[name].requires_grad_()
    scale = torch.tensor([0.5, -2.0, 1.0])
    plan = plan_groups(torch.arange(leaves["x"].numel() // WIDTH) % adapters, adapters)

    def apply(leaves, **options):
        x, y, A, B = leaves.values()
        return grouped_lora(y.reshape(*x.shape[:-1], 29), x, A, B, scale, plan, **options)

    return Case(leaves, apply, stored=scale.tolist())


def _norm(shape, op, names):
    x = shape.input()
    affine = {name: draw((shape.x[-1],), shape.dtype, shape.generator) for name in names}

    def apply(leaves, **options):
        return op(*leaves.values(), 1e-5, **options)

    return Case({"x": x, **affine}, apply)


def _rms(x, weight, eps, **options):
    return frozen_rms_norm(x, weight, eps, offset=1.0, **options)


_QKV = {"_q": (40, WIDTH), "_k": (12, WIDTH), "_v": (7, WIDTH)}
_MLP = {"_gate": (INNER, WIDTH), "_up": (INNER, WIDTH), "_down": (WIDTH, INNER)}
_BUILDERS = {
    "lora_linear": lambda shape: _case(shape, {"": (29, WIDTH)}, _linear),
    "lora_qkv": lambda shape: _case(shape, _QKV, lora_qkv),
    "lora_swiglu_mlp": lambda shape: _case(shape, _MLP, lora_swiglu_mlp),
    "nf4_linear": lambda shape: _quantized(shape, nf4_linear, quantize_nf4),
    "fp8_linear": lambda shape: _quantized(shape, fp8_linear, quantize_fp8),
    "int8_linear": lambda shape: _quantized(shape, int8_linear, quantize_int8),
    "int8_compute_linear": lambda shape: _quantized(shape, int8_compute_linear, quantize_int8),
    "bottleneck": _bottleneck,
    "dora_linear": _dora,
    "dora_scale": _dora_scale,
    "dora_gate": _dora_gate,
    "grouped_lora": _grouped,
    "frozen_rms_norm": lambda shape: _norm(shape, _rms, ["weight"]),
    "frozen_layer_norm": lambda shape: _norm(shape, frozen_layer_norm, ["weight", "bias"]),
}
NAMES = tuple(_BUILDERS)
LORA_NAMES = NAMES[:7]
LARGE_NAMES = ("lora_qkv", "lora_swiglu_mlp", "dora_linear")
"""Ops whose graphs take torch's compiler longest."""
LINEAR_NAMES = (*NAMES[:2], *NAMES[3:7], "dora_linear", "dora_scale", "grouped_lora")
"""Ops whose input gradient does not depend on their input."""


def build(name, leading=(3, 5), **options):
    """The case of an op. Options are those of ``lora_cases.Shape``."""
    return _BUILDERS[name](Shape(x=(*leading, WIDTH), **options))
