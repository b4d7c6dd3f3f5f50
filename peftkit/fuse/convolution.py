"""PEFT's LoRA layers on convolutions: PEFT's own forward, under a class that shows the sizes of the convolution inside."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as stock
from torch import nn

_SIZES = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "padding_mode", "dilation", "groups"),
)


class ShowsSizes:
    """Passes on what models ask their convolutions for: Whisper's encoder reads ``conv1.stride`` in every forward."""

    _peftkit_fused = True

    def __getattr__(self: Any, name: str) -> Any:
        """The attribute of a module; the sizes of the base layer where the module has none of its own."""
        if name in _SIZES:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue] - of nn.Module

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Pickle by a function: this class goes by the name of PEFT's."""
        return _new_layer, (self._peftkit_stock,), self.__dict__


def _class_of(kind: type[nn.Module]) -> Any:
    members = {"_peftkit_stock": kind, "__module__": __name__, "__qualname__": kind.__name__}
    return type(kind.__name__, (ShowsSizes, kind), members)


CLASSES = {kind: _class_of(kind) for kind in (stock.Conv1d, stock.Conv2d, stock.Conv3d)}


def _new_layer(kind: type[nn.Module]) -> nn.Module:
    made = CLASSES[kind]
    return made.__new__(made)
