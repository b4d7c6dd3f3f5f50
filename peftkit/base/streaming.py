"""transformers' quantizers for bitsandbytes, which quantise a few rows at a time and keep what peftkit keeps.

transformers chooses a quantizer by the name in its quantization config. The two quantizers here have names of their own, and after
loading, the model has transformers' quantizer and config, as if ``from_pretrained`` had been called with ``BitsAndBytesConfig``.
"""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from peftkit.base.keep import choose, layers_of_poolers, skipped_by_transformers
from peftkit.base.quantize import quantize_int8, quantize_nf4
from peftkit.base.shards import Stop, StoredTensor
from peftkit.base.stacks import attach, make_room, pack, save_under_own_names
from peftkit.errors import ContractError

_METHOD = "peftkit_streamed_{}"


class StreamedConfig(BitsAndBytesConfig):
    """``BitsAndBytesConfig`` by which transformers chooses a quantizer of this module.

    Args:
        base: ``"nf4"`` or ``"int8"``.
        keep: As for ``kept_modules``.
        settings: The arguments of ``BitsAndBytesConfig``.
        saved: For a checkpoint that is quantised already: its stacks of experts in 4 bits by their names there, and for each the
            tensors beside the bytes by the ends of their names.
        has_pooler: Whether the checkpoint has weights of a pooler if the model has one.
    """

    def __init__(
        self,
        base: str,
        keep: tuple[str, ...],
        settings: dict[str, Any],
        saved: dict[str, dict[str, StoredTensor]] | None = None,
        has_pooler: bool = True,
    ):
        super().__init__(**settings)
        for name, quantizer in (("nf4", _Streamed4bit), ("int8", _Streamed8bit)):
            if _METHOD.format(name) not in AUTO_QUANTIZER_MAPPING:
                register_quantizer(_METHOD.format(name))(quantizer)
        self.quant_method: Any = _METHOD.format(base)
        self.keep, self.has_pooler = keep, has_pooler
        self.settings = {
            name: value for name, value in settings.items() if name != "llm_int8_skip_modules"
        }
        self.saved = saved


class _Streamed:
    """What both quantizers change."""

    def __init__(self: Any, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.stacks: list[str] = []
        self.saved: dict[str, dict[str, StoredTensor]] = {}
        if config.saved is not None:
            self.pre_quantized = True

    def _process_model_before_weight_loading(
        self: Any, model: Any, device_map: Any, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            self.saved = make_room(model, config.saved)
        else:
            new = () if config.has_pooler else layers_of_poolers(model)
            choice = choose(model, [*config.keep, *new])
            config.llm_int8_skip_modules = choice.skipped
            self.stacks = choice.stacks if config.load_in_4bit else []
        super()._process_model_before_weight_loading(model, device_map, **kwargs)  # type: ignore[misc]

    def param_needs_quantization(self: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.stacks or super().param_needs_quantization(  # type: ignore[misc]
            model, param_name, **kwargs
        )

    def _process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        for name in (*self.stacks, *self.saved):
            attach(model, name, self.saved.get(name))
        if self.stacks or self.saved:
            save_under_own_names(model)
        mark_quantised(model, config.settings, config.llm_int8_skip_modules)
        model.hf_quantizer.modules_to_not_convert = self.modules_to_not_convert
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]

    def get_quantize_ops(self: Any) -> Any:
        return _QuantizeRows(self)


class _Streamed4bit(_Streamed, Bnb4BitHfQuantizer):
    pass


class _Streamed8bit(_Streamed, Bnb8BitHfQuantizer):
    pass


class _QuantizeRows(ConversionOps):
    """Quantises the weights of one layer, or one stack of experts, when transformers has read them."""

    def __init__(self, quantizer: Any):
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: Any = None, model: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        done = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module = model.get_submodule(name.rpartition(".")[0])
            try:
                if name in self.quantizer.stacks:
                    done[name] = pack(weight, name)
                    continue
                done[name] = quantized_weight(weight, name, module)
            except ContractError as error:
                raise Stop(error) from error
            module._is_hf_initialized = True
        return done


def quantized_weight(weight: Tensor, name: str, module: Any) -> Tensor:
    """Quantise a weight for the layer of bitsandbytes that ``module`` is.

    Args:
        weight: ``[out_features, in_features]``, or transposed if the layer replaces a ``Conv1D``.
        name: The name of the weight, for messages.
        module: A ``Linear4bit`` or ``Linear8bitLt`` with the attribute ``source_cls``, the class that it replaces.

    Raises:
        ContractError: The weight has another shape, or values that are not finite.
    """
    if issubclass(module.source_cls, Conv1D):
        weight = weight.T
    expected = (module.out_features, module.in_features)
    if tuple(weight.shape) != expected:
        raise ContractError(
            f"{name} has the shape {tuple(weight.shape)} in the checkpoint and {expected} in the model; the config belongs to "
            "another checkpoint"
        )
    if isinstance(module, Linear4bit):
        return quantize_nf4(weight, name, module)
    return quantize_int8(weight, name)


def mark_quantised(model: Any, settings: dict[str, Any], skipped: list[str] | None) -> None:
    """Give a model the attributes by which transformers, PEFT, Trainer and TRL recognise a model that bitsandbytes quantised.

    Args:
        model: A transformers model.
        settings: The arguments of ``BitsAndBytesConfig``.
        skipped: The modules that were not quantised, if they are not those of transformers.
    """
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=skipped)
    quantizer = (Bnb4BitHfQuantizer if config.load_in_4bit else Bnb8BitHfQuantizer)(
        config, pre_quantized=False
    )
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    model.hf_quantizer = quantizer
    model.is_quantized = True


def mark_in_place(model: Any, settings: dict[str, Any], skipped: list[str] | None) -> None:
    """``mark_quantised`` for a model whose layers were replaced after it had been loaded."""
    mark_quantised(model, settings, skipped)
    model.hf_quantizer.modules_to_not_convert = skipped or skipped_by_transformers(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    model.hf_quantizer._process_model_after_weight_loading(model)
