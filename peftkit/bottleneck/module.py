"""The modules of bottleneck adapters: one adapter, and the container of all adapters of one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftkit_kernels.core.dispatch import choose_backend
from peftkit_kernels.ops.bottleneck import ACTIVATIONS as OP_ACTIVATIONS
from peftkit_kernels.ops.bottleneck import bottleneck

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **OP_ACTIVATIONS,
    "linear": OP_ACTIVATIONS["identity"],
}


class Bottleneck(nn.Module):
    """``base + scaling · up(act(down(x)))``. ``up`` starts at zero, so a new adapter changes nothing.

    Args:
        width: Features of ``base`` and ``x``.
        bottleneck_size: Features between ``down`` and ``up``.
        activation: A key of ``ACTIVATIONS``.
        scaling: A fixed factor, or ``"learned"``.
        layer_norm: Whether to add a LayerNorm before ``down``.
        parallel: Whether ``x`` is the input of the adapted module instead of its output.
        device: Device of the new parameters.
        dtype: Dtype of the new parameters.

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
            raise ValueError(f"bottleneck_size={bottleneck_size} is below 1; use 1 or more")
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
            base: ``[..., width]``, to which the adapter's part is added. The result has its dtype.
            x: ``[..., width]``, the input of the adapter.

        Returns:
            ``[..., width]``.
        """
        up, up_bias, scale = self.up.weight, self.up.bias, self.scaling
        if isinstance(scale, nn.Parameter):
            # scaling the weight [width, bottleneck_size] costs less than scaling the adapter's output
            up, up_bias, scale = up * scale, up_bias * scale, 1.0
        separate_base = x is not base or self.norm is not None
        if self.norm is not None:
            x = self.norm(x.to(self.norm.weight.dtype))
        act = "identity" if self.activation == "linear" else self.activation
        factors = self.down.weight, self.down.bias, up, up_bias
        return bottleneck(x.to(base.dtype), *factors, scale, act, base if separate_base else None)

    def extra_repr(self) -> str:
        """Return the settings that ``print`` shows."""
        scaling = "learned" if isinstance(self.scaling, nn.Parameter) else self.scaling
        return f"activation={self.activation}, scaling={scaling}, parallel={self.parallel}"


class Carry:
    """Holds the MLP's input until the adapter needs it, if the MLP's input and output belong to two modules."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """Return the tensor that was stored last, and release it.

        Raises:
            RuntimeError: No tensor was stored.
        """
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError(
                "a parallel bottleneck ran without its input, because the module that receives the MLP's input was not called "
                "before; call the whole model"
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None}


class BottleneckSite(nn.Module):
    """Child of the adapted module with one adapter per adapter name. All adapters are used.

    Args:
        normed: Whether the adapted module is the last norm of a post-norm layer. The adapters then read the norm's output, and
            their part is added to the norm's input: ``LN(s + A(LN(s)))``.
        source: Name of the module whose input parallel adapters read, or ``None`` if it is the adapted module.
    """

    peftkit_adapter = True

    def __init__(self, normed: bool = False, source: str | None = None):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.normed, self.source = normed, source
        self.carry = None if source is None else Carry()

    def chosen(self) -> list[nn.Module]:
        """Return the adapters that a forward uses."""
        return list(self.adapters.values())

    def peftkit_verdict(self) -> tuple[str, str]:
        """Return the path of a forward, and the reason if the path is not fused."""
        adapters: list[Any] = list(self.adapters.values())
        if not adapters:
            return "torch", "no adapter is active"
        return f"fused:{choose_backend('bottleneck', 'auto', adapters[0].down.weight)}", ""

    def forward(self, base: Tensor, read: Tensor | None, x: Tensor | None) -> Tensor:
        """Add the part of every active adapter to ``base``.

        Args:
            base: ``[..., width]``.
            read: ``[..., width]``, the input of adapters that are not parallel. ``None`` for ``base`` plus the parts of the
                adapters before.
            x: ``[..., width]``, the input of parallel adapters.

        Returns:
            ``[..., width]``.
        """
        for adapter in self.chosen():
            source = x if adapter.parallel else base if read is None else read
            base = adapter(base, source)
        return base
