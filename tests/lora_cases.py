"""Inputs for the LoRA ops, every output and gradient by name, and the error bound of each."""

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lab.testing import Bound
from peftkit_kernels.core.dropout import dropout_mask, keep_scale
from peftkit_kernels.low_rank import LoRA

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXED = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))
LAYOUTS = ("contiguous", "wide_rows", "transposed", "expanded")


def subsets(names):
    """Every subset of ``names`` but the empty one."""
    sizes = range(1, len(names) + 1)
    return [subset for n in sizes for subset in itertools.combinations(names, n)]


def draw(shape, dtype, generator, layout="contiguous"):
    """A tensor of normal numbers. The layout ``wide_rows`` is a view of a wider tensor at an odd offset."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "contiguous" or len(shape) < 2:
        return values
    if layout == "wide_rows":
        wide = torch.full((*shape[:-1], shape[-1] + 5), torch.nan, dtype=dtype)
        wide[..., 3:-2] = values
        return wide[..., 3:-2]
    if layout == "transposed":
        return values.mT.contiguous().mT
    return values[:1].expand(shape)


@dataclass
class Projection:
    """One frozen linear and its adapter."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora: LoRA | None

    def tensors(self):
        """The parameters by name, without those that are ``None``."""
        factors = {} if self.lora is None else {"A": self.lora.A, "B": self.lora.B}
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"weight": self.weight, **bias, **factors}


@dataclass
class Shape:
    """Sizes and options of one case. No tile size divides the defaults, and the defaults have every part."""

    x: tuple = (3, 5, 33)
    rank: int = 4
    dtype: torch.dtype = torch.float32
    factors: torch.dtype | None = None
    bias: bool = True
    scale: float = -0.7
    p: float = 0.0
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    trained: tuple | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def input(self):
        """The input ``x``."""
        x = draw(self.x, self.dtype, self.generator, self.layout)
        return x.requires_grad_(self.trains("x"))

    def projection(self, N, K, suffix=""):
        """A projection. A tensor is trained if ``trained`` contains its name with ``suffix``."""
        bias = draw((N,), self.dtype, self.generator) if self.bias else None
        if bias is not None:
            bias.requires_grad_(self.trains("bias" + suffix))
        weight = draw((N, K), self.dtype, self.generator, self.weight_layout) / K**0.5
        return Projection(weight, bias, self.lora(N, K, suffix) if self.rank else None)

    def lora(self, N, K, suffix=""):
        """An adapter."""
        dtype = self.factors or self.dtype
        A = draw((self.rank, K), dtype, self.generator) / K**0.5
        B = draw((N, self.rank), dtype, self.generator) / self.rank**0.5
        seed = 2**62 + 7 * N
        A.requires_grad_(self.trains("A" + suffix))
        B.requires_grad_(self.trains("B" + suffix))
        return LoRA(A, B, self.scale, self.p, seed if self.p else 0)

    def trains(self, name):
        """Whether the tensor of this name requires a gradient. By default all tensors except the weights do."""
        return self.trained is None or name in self.trained


def gradients(outputs, grads, leaves):
    """The gradient of every leaf that requires one, by name."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    values = torch.autograd.grad(outputs, list(wanted.values()), grads, allow_unused=True)
    return dict(zip(wanted, values, strict=True))


class Linear:
    """The steps of a linear with its adapter on rows ``[M, K]``, with the roundings of the torch schedule."""

    def __init__(self, x: Bound, part: Projection, dtype: torch.dtype):
        self.x, self.part, self.dtype = x, part, dtype
        self.weight = Bound.of(part.weight)
        if part.lora is not None:
            lora = part.lora
            self.A, self.B = (Bound.of(t) for t in (lora.A, lora.B))
            self.factors = lora.A.dtype
            self.wide = torch.promote_types(dtype, self.factors)

    def drop(self, value: Bound) -> Bound:
        """The adapter's dropout applied to a value of its input's shape."""
        p, seed = self.part.lora.p, self.part.lora.seed
        if not p:
            return value
        mask = dropout_mask(*value.value.shape, p, seed)
        return (value * keep_scale(p) * mask).round(self.wide)

    def forward(self) -> Bound:
        """The output."""
        y = self.x @ self.weight.T
        if self.part.bias is not None:
            y = Bound.of(self.part.bias).addmm(self.x, self.weight.T)
        y = y.round(self.dtype)
        if self.part.lora is None:
            return y
        self.s = (self.drop(self.x) @ self.A.T).round(self.wide)
        return y.addmm(self.s, self.B.T, self.part.lora.scale).round(self.dtype)

    def backward(self, dy: Bound) -> dict[str, Bound]:
        """The gradients of the parameters. ``ds`` is kept for ``input_grad``."""
        grads = {"bias": dy.sum(0).round(self.dtype)}
        if self.part.lora is None:
            return grads
        self.ds = ((dy @ self.B).round(self.wide) * self.part.lora.scale).round(self.wide)
        product = self.parameter(dy.T @ self.s)
        grads["B"] = (product * self.part.lora.scale).round(self.factors)
        grads["A"] = self.parameter(self.ds.T @ self.drop(self.x))
        return grads

    def parameter(self, product: Bound) -> Bound:
        """A product that is summed in float32 and stored in the parameter's dtype."""
        return product.round(self.factors)

    def add_update(self, dx: Bound) -> Bound:
        """The input gradient ``dx`` with the adapter's part added."""
        if self.part.lora is None:
            return dx
        if not self.part.lora.p:
            return dx.addmm(self.ds, self.A).round(self.dtype)
        return (dx + self.drop((self.ds @ self.A).round(self.wide))).round(self.dtype)


def add_updates(dx, linears):
    """``add_update`` for several linears on one input, with one product for all linears without dropout."""
    shared = [linear for linear in linears if linear.part.lora and not linear.part.lora.p]
    if shared:
        ds = Bound.cat([linear.ds for linear in shared], 1)
        dx = dx.addmm(ds, Bound.cat([linear.A for linear in shared], 0)).round(shared[0].dtype)
    for linear in linears:
        if linear.part.lora and linear.part.lora.p:
            dx = linear.add_update(dx)
    return dx


def input_grad(linears, dys):
    """The gradient of the input that ``linears`` share."""
    dx = None
    for linear, dy in zip(linears, dys, strict=True):
        product = dy @ linear.weight if dx is None else dx.addmm(dy, linear.weight)
        dx = product.round(linear.dtype)
    return add_updates(dx, linears)


def explicit(x, part):
    """The same linear in elementary torch ops that autograd differentiates, for comparisons in float64."""
    y = x @ part.weight.T
    if part.bias is not None:
        y = y + part.bias
    if part.lora is None:
        return y
    lora = part.lora
    dropped = x
    if lora.p:
        dropped = x * dropout_mask(*x.shape, lora.p, lora.seed) * keep_scale(lora.p)
    return y + lora.scale * (dropped @ lora.A.T @ lora.B.T)


def activation(e, act):
    """``act(e)``, as in a transformer's gated MLP."""
    if act == "silu":
        return F.silu(e)
    return F.gelu(e, approximate="tanh" if act == "gelu_tanh" else "none")


def derivative(e, act):
    """``act'(e)``."""
    leaf = e.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(activation(leaf, act).sum(), leaf)[0]


def activation_and_slope(e, act, ulps=8.0):
    """Bounds on ``act(e)`` and ``act'(e)``. Each has an evaluation error of ``ulps`` of the largest terms that cancel."""

    def terms(v):
        return 1 + v.abs() * (1 + 0.15 * v.square())

    # the largest first derivatives are 1.10 (silu) and 1.13 (gelu), the largest second derivatives 0.5 and 0.8
    value = e.map(lambda v: activation(v, act), 1.13, ulps, terms)
    return value, e.map(lambda v: derivative(v, act), 0.8, ulps, terms)
