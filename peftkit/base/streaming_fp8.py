"""A quantizer of transformers that stores linear layers in float8 while a checkpoint is read, as ``to_fp8`` does afterwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftkit.base.keep import layers_of_poolers
from peftkit.base.shards import Stop, count_not_finite
from peftkit.errors import ContractError, count
from peftkit.fp8 import Float8Linear, float8_layers, write_settings
from peftkit_kernels.storage.fp8 import quantize_fp8

_METHOD = "peftkit_streamed_fp8"


class Float8Config(QuantizationConfigMixin):
    """The config by which transformers chooses the quantizer of this module.

    Args:
        keep: As for ``to_fp8``.
        has_pooler: Whether the checkpoint has weights of a pooler if the model has one.
    """

    def __init__(self, keep: tuple[str, ...], has_pooler: bool):
        if _METHOD not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(_METHOD)(_StreamedFloat8)
        self.quant_method: Any = _METHOD
        self.keep, self.has_pooler = keep, has_pooler


class _StreamedFloat8(HfQuantizer):
    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config: Any = self.quantization_config
        new = () if config.has_pooler else layers_of_poolers(model)
        for name in float8_layers(model, [*config.keep, *new]):
            plain = model.get_submodule(name)
            N, K = plain.weight.shape
            layer = Float8Linear(K, N, plain.bias is not None, "meta", plain.weight.dtype)
            layer.bias = plain.bias
            # random values cannot be drawn in float8; a weight that is missing is an error
            layer._is_hf_initialized = True
            model.set_submodule(name, layer.train(plain.training))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        parent, _, own = param_name.rpartition(".")
        return own == "weight" and isinstance(model.get_submodule(parent), Float8Linear)

    def get_quantize_ops(self) -> Any:
        return _QuantizeRows()

    def postprocess_model(self, model: Any, **_: Any) -> None:
        # the model is one of to_fp8, which has no quantizer
        self.remove_quantization_config(model)
        del model.is_quantized
        write_settings(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _QuantizeRows(ConversionOps):
    """Quantises the weight of one layer when transformers has read it."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        done: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = name.rpartition(".")[0]
            try:
                done |= _quantised(weight, layer, model.get_submodule(layer))
            except ContractError as error:
                raise Stop(error) from error
        return done


def _quantised(weight: Tensor, name: str, layer: Float8Linear) -> dict[str, Tensor]:
    """The codes and the scale of a layer by their names in the model.

    Raises:
        ContractError: The weight has another shape, or values that are not finite.
    """
    if weight.shape != layer.weight.shape:
        raise ContractError(
            f"{name}.weight has the shape {tuple(weight.shape)} in the checkpoint and {tuple(layer.weight.shape)} in the model; the config "
            "belongs to another checkpoint"
        )
    bad = count_not_finite(weight)
    if bad:
        raise ContractError(
            f"{name}.weight has {count(bad, 'value')} that {'is' if bad == 1 else 'are'} NaN or infinite in {weight.dtype}, so it cannot be "
            f"quantised; repair it, or do not quantise its module: keep=[{name!r}]"
        )
    stored = quantize_fp8(weight)
    layer.compute_dtype = weight.dtype
    codes = nn.Parameter(stored.codes, requires_grad=False)
    return {f"{name}.weight": codes, f"{name}.weight_scale": stored.row_scale.view(-1, 1)}
