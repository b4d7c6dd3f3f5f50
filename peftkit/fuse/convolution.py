"""PEFT's LoRA layers on convolutions. They run PEFT's own forward; their class adds the size attributes of the convolution."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as stock

CLASSES = (stock.Conv1d, stock.Conv2d, stock.Conv3d)

_SIZES = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "padding_mode", "dilation", "groups"),
)


class ShowsSizes:
    """Gives a layer the attributes that models read from a convolution, such as ``conv1.stride`` in Whisper's encoder."""

    def __getattr__(self: Any, name: str) -> Any:
        """The attribute ``name``: the base layer's if it is a size, otherwise the module's own."""
        if name in _SIZES:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue] - of nn.Module
