"""PEFT's LoRA layers on convolutions: PEFT's own forward, under a class that shows the sizes of the convolution inside."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as stock

CLASSES = (stock.Conv1d, stock.Conv2d, stock.Conv3d)

_SIZES = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "padding_mode", "dilation", "groups"),
)


class ShowsSizes:
    """Passes on what models read from their convolutions: Whisper's encoder reads ``conv1.stride`` in every forward."""

    def __getattr__(self: Any, name: str) -> Any:
        """The attribute of a module; the sizes of the base layer if the module has none of its own."""
        if name in _SIZES:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue] - of nn.Module
