"""A bottleneck adapter, and the place where the adapters of one module live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftkit_kernels.bottleneck import ACTIVATIONS as OP_ACTIVATIONS
from peftkit_kernels.bottleneck import bottleneck
from peftkit_kernels.dispatch import choose_backend

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **OP_ACTIVATIONS,
    "linear": OP_ACTIVATIONS["identity"],
}


class Bottleneck(nn.Module):
    """``base + scaling · up(act(down(x)))``; ``up`` starts at zero, so a new adapter changes nothing.

    Args:
        width: Features of ``base`` and ``x``.
        bottleneck_size: Features in between.
        activation: A key of ``ACTIVATIONS``.
        scaling: A fixed factor, or ``"learned"``.
        layer_norm: Put a LayerNorm before ``down``.
        parallel: Whether ``x`` is the input of the adapted module, and not its output.
        device: Of the new parameters.
        dtype: Of the new parameters; the adapter computes in it.

    Raises:
        ValueError: The activation is unknown, a size is below 1, or ``scaling`` is neither a number nor ``"learned"``.
    """

    peftkit_adapter = True

    def __init__(
        self,
        width: int,
        bottleneck_size: int,
        activation: str = "relu",
        scaling: float | Literal["learned"] = 1.0,
        layer_norm: bool = False,
        parallel: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
            )
        if bottleneck_size < 1:
            raise ValueError(f"bottleneck_size={bottleneck_size} is below 1")
        if scaling != "learned" and not isinstance(scaling, (int, float)):
            raise ValueError(f"scaling={scaling!r}: use a number or 'learned'")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.activation, self.parallel = activation, parallel
        self.norm = nn.LayerNorm(width, **place) if layer_norm else None
        self.down = nn.Linear(width, bottleneck_size, **place)
        self.up = nn.Linear(bottleneck_size, width, **place)
        self.scaling = nn.Parameter(torch.ones((), **place)) if scaling == "learned" else scaling
        if not self.up.weight.is_meta:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, base: Tensor, x: Tensor) -> Tensor:
        """Add the adapter's part to ``base``.

        Args:
            base: ``[..., width]``, what the adapter's part is added to; gives the dtype of the result.
            x: ``[..., width]``, what the adapter's part is computed from.
        """
        up, up_bias, scale = self.up.weight, self.up.bias, self.scaling
        if isinstance(scale, nn.Parameter):
            # on the [width, bottleneck_size] weight it costs less than on the adapter's output
            up, up_bias, scale = up * scale, up_bias * scale, 1.0
        own = x is not base or self.norm is not None
        if self.norm is not None:
            x = self.norm(x.to(self.norm.weight.dtype))
        act = "identity" if self.activation == "linear" else self.activation
        factors = self.down.weight, self.down.bias, up, up_bias
        return bottleneck(x.to(base.dtype), *factors, scale, act, base if own else None)

    def extra_repr(self) -> str:
        """What ``print`` shows besides the layers."""
        scaling = "learned" if isinstance(self.scaling, nn.Parameter) else self.scaling
        return f"activation={self.activation}, scaling={scaling}, parallel={self.parallel}"


class Carry:
    """Takes a tensor from where the MLP begins to where it ends, when these are two modules."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor put in last, which is let go."""
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError(
                "a parallel bottleneck ran without its input: the module that receives the MLP's input was not called first"
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None}


class BottleneckSite(nn.Module):
    """Child of the module whose output its adapters change; one adapter a name, all in use.

    Args:
        normed: Whether that module is the norm that closes a post-norm layer. The adapters then read its output and add to
            its input: ``LN(s + A(LN(s)))``.
        source: Name of the module whose input parallel adapters read, where it is not the same module.
    """

    peftkit_adapter = True

    def __init__(self, normed: bool = False, source: str | None = None):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.normed, self.source = normed, source
        self.carry = None if source is None else Carry()

    def chosen(self) -> list[nn.Module]:
        """The adapters that take part in a forward."""
        return list(self.adapters.values())

    def peftkit_verdict(self) -> tuple[str, str]:
        """The path a forward takes, and the reason where it is not fused."""
        adapters: list[Any] = list(self.adapters.values())
        if not adapters:
            return "torch", "no adapter is active"
        return f"fused:{choose_backend('bottleneck', 'auto', adapters[0].down.weight)}", ""

    def forward(self, base: Tensor, read: Tensor | None, x: Tensor | None) -> Tensor:
        """Let every chosen adapter add its part.

        Args:
            base: ``[..., width]``, what is added to.
            read: What adapters read that are not parallel; ``None`` for ``base`` as the adapters before have left it.
            x: What parallel adapters read.
        """
        for adapter in self.chosen():
            seen = x if adapter.parallel else base if read is None else read
            base = adapter(base, seen)
        return base
