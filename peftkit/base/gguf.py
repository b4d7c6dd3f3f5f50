"""Models that transformers decoded from a GGUF file: they are dense, but marked as quantised."""

from __future__ import annotations

from typing import Any


def forget_gguf(model: Any) -> None:
    """Remove the mark of a model whose weights transformers has decoded from GGUF.

    With it ``Trainer`` refuses to train the model and ``save_pretrained`` to save it. A model whose layers are still packed keeps it.

    Args:
        model: Any model; changed in place if its weights come from GGUF.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    settings = getattr(quantizer, "quantization_config", None)
    method = getattr(settings, "quant_method", None)
    if getattr(method, "value", method) != "gguf" or getattr(quantizer, "packed_modules", None):
        return
    for attribute in ("hf_quantizer", "quantization_method"):
        setattr(model, attribute, None)
    model.is_quantized = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "quantization_config", None) is settings:
            del config.quantization_config
