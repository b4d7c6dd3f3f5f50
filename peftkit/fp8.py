"""Linear layers whose frozen weight is stored in float8 and multiplied in float8, and models that consist of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError, listing, short
from peftkit.find.modules import base_modules, is_adapted, storage_of, suffixes
from peftkit.find.suggestions import close_matches
from peftkit.find.targets import all_linear
from peftkit_kernels.ops.quantized_linear import fp8_linear
from peftkit_kernels.storage.fp8 import Float8Weight, dequantize_fp8, quantize_fp8

Model = TypeVar("Model", bound=nn.Module)

DTYPE = torch.float8_e4m3fn
_SETTINGS = "quantization_config"


class Float8Linear(nn.Linear):
    """A linear layer with a frozen weight in float8 (e4m3) and one scale for each row; it also multiplies in float8.

    The rows of the input are quantised in each call, and in the backward those of the gradient. GPUs from compute capability 8.9 on
    multiply in float8; other processors multiply the same codes in a wider dtype. The result has the dtype of the input, or of
    autocast.

    Conversions to another floating-point dtype (``model.to(torch.bfloat16)``) do not change weight and scale. The state dict has them as
    ``weight`` and ``weight_scale [N, 1]``, the names and layout of compressed-tensors.

    Attributes:
        weight: ``Float8_e4m3fn[N, K]``, frozen.
        weight_scale: ``Float32[N, 1]``, a buffer.
        bias: ``[N]`` or ``None``.
        compute_dtype: The dtype of the weight before it was quantised. PEFT creates adapters in this dtype.

    Args:
        in_features: ``K``.
        out_features: ``N``.
        bias: Whether there is a bias.
        device: Where the parameters are allocated. Their values are undefined.
        dtype: ``compute_dtype``, also the dtype of the bias; by default torch's default dtype.
    """

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype or torch.get_default_dtype()
        codes = torch.empty(out_features, in_features, dtype=DTYPE, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = torch.empty(out_features, 1, dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scale)
        values = torch.empty(out_features, dtype=self.compute_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(values) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Float8Linear:
        """A layer with the weight of ``linear``, quantised on its device a few rows at a time, and its bias.

        Raises:
            ContractError: It is no plain ``nn.Linear``, or its weight is on the device meta, not in float32 or a 16-bit dtype, or not finite.
        """
        _require_quantisable(linear)
        q = quantize_fp8(linear.weight)
        layer = cls.from_codes(q.codes, q.row_scale, linear.bias, linear.weight.dtype)
        return layer.train(linear.training)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> Float8Linear:
        """A layer with these tensors, which are not copied.

        Args:
            codes: ``Float8_e4m3fn[N, K]``.
            scale: ``Float32[N]`` or ``[N, 1]``.
            bias: ``[N]`` or ``None``.
            dtype: ``compute_dtype``.

        Raises:
            ValueError: Shapes or dtypes do not fit.
        """
        q = Float8Weight(codes, scale.reshape(-1))
        N, K = q.shape
        layer = cls(K, N, bias is not None, "meta", dtype)
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.weight_scale = q.row_scale.view(N, 1)
        layer.bias = bias
        return layer

    def stored(self) -> Float8Weight:
        """The weight as the ops take it; shares its memory."""
        return Float8Weight(self.weight.detach(), self.weight_scale.detach().view(-1))

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - PEFT's name
        """The codes. PEFT decodes a base layer that has this attribute by ``dequantize``, for instance for the norms of DoRA."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The decoded weight, ``[N, K]`` in ``compute_dtype``."""
        return dequantize_fp8(self.stored(), self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``x8 W8ᵀ · sx · sw + bias`` for ``input [..., K]``."""
        return fp8_linear(input, self.stored(), self.bias)

    def extra_repr(self) -> str:
        """The sizes, and the dtype in which the layer computes."""
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # codes without their scale, or in another dtype, would be another weight
        def keeping_dtypes(t: Tensor) -> Tensor:
            result = fn(t)
            if t.dtype is result.dtype or (t.dtype is not DTYPE and t is not self.weight_scale):
                return result
            if t.dtype is DTYPE:
                self.compute_dtype = result.dtype
            return t.to(result.device)

        return super()._apply(keeping_dtypes, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        weight, scale = (state_dict.get(prefix + name) for name in ("weight", "weight_scale"))
        if weight is not None and weight.dtype is not DTYPE:
            errors.append(
                f"{prefix}weight is {weight.dtype}, but the layer stores float8; quantise it with Float8Linear.from_linear"
            )
            state_dict = {name: t for name, t in state_dict.items() if name != f"{prefix}weight"}
        if weight is not None and scale is None:
            errors.append(f"{prefix}weight is given without {prefix}weight_scale")
        if scale is not None and scale.numel() == self.out_features:
            # other libraries write it in 16 bits or as [N]
            state_dict = {**state_dict, f"{prefix}weight_scale": scale.reshape(-1, 1).float()}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def to_fp8(model: Model, keep: Sequence[str] = ()) -> Model:
    """Store the linear layers of a model in float8, one after the other, in place.

    Embeddings, norms, routers, output heads, layers that share their weight, layers that transformers keeps in float32, and layers that
    are no plain ``nn.Linear`` stay as they are.
    A checkpoint that ``save_pretrained`` then writes has the layout of compressed-tensors (``FP8_DYNAMIC`` of vLLM), and says so in its
    ``quantization_config``.

    Args:
        model: A model in float32 or 16 bits, without adapters; changed in place.
        keep: Names or ends of names of modules that stay as they are, with all layers inside.

    Returns:
        ``model``.

    Raises:
        ContractError: The model has adapters or is quantised already, an entry of ``keep`` matches nothing, no layer is left, or a weight is not
            finite.
    """
    _require_plain(model)
    names = float8_layers(model, keep)
    # everything is checked before the first layer is replaced
    for name in names:
        try:
            _require_quantisable(model.get_submodule(name))
        except ContractError as error:
            raise ContractError(f"{name}: {error} with keep=[{name!r}]") from error
    for name in names:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, Float8Linear.from_linear(layer))
    write_settings(model)
    return model


def from_fp8(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Decode the float8 layers of a model into plain linear layers, in place, also those that carry an adapter.

    Afterwards adapters can be merged. The result needs the memory of an unquantised model.

    Args:
        model: The model; changed in place.
        dtype: The dtype of the weights; by default that which each layer had before it was quantised.

    Returns:
        ``model``.

    Raises:
        ContractError: The model has no float8 layer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    if not names:
        raise ContractError(
            f"this {type(model).__name__} has no float8 layer, so from_fp8 has nothing to decode"
        )
    for name in names:
        layer: Any = model.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
        weight = dequantize_fp8(layer.stored(), dtype or layer.compute_dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        if plain.bias is not None:
            plain.bias.data = plain.bias.data.to(weight.dtype)
        model.set_submodule(name, plain.train(layer.training))
    for module in model.modules():
        config = getattr(module, "config", None)
        if _is_ours(getattr(config, _SETTINGS, None)):
            delattr(config, _SETTINGS)
    return model


def _require_quantisable(linear: Any) -> None:
    if type(linear) is not nn.Linear:
        raise ContractError(
            f"the layer is a {type(linear).__name__}; only a plain nn.Linear can be stored in float8; keep it as it is"
        )
    weight = linear.weight
    if weight.is_meta:
        raise ContractError("the weight is on the device meta and has no values; load it first")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ContractError(
            f"the weight is {weight.dtype}; float32, float16 and bfloat16 can be stored in float8; keep the layer as it is"
        )
    bad = int((~weight.detach().isfinite()).any(1).sum())
    if bad:
        raise ContractError(
            f"{bad} of {len(weight)} rows of the weight have values that are NaN or infinite; repair it, or keep the layer as it is"
        )


def _require_plain(model: nn.Module) -> None:
    if any(is_adapted(module) for module in model.modules()):
        raise ContractError(
            f"this {type(model).__name__} has adapters; call to_fp8 before wrap, or unload them first"
        )
    stored = getattr(getattr(model, "config", None), _SETTINGS, None)
    if stored is not None or any(isinstance(m, Float8Linear) for m in model.modules()):
        raise ContractError(
            f"this {type(model).__name__} is quantised already; load its unquantised checkpoint, or leave to_fp8 out"
        )


def float8_layers(model: nn.Module, keep: Sequence[str] = ()) -> list[str]:
    """The names of the layers that ``to_fp8`` stores in float8.

    Args:
        model: A model that is not quantised. It may be on the device meta.
        keep: As for ``to_fp8``.

    Raises:
        ContractError: An entry of ``keep`` matches nothing, or no layer is left.
    """
    if isinstance(keep, str):
        raise ContractError(f"keep={short(keep)} is a string; pass a list of names")
    modules = dict(base_modules(model))
    known = {suffix for name in modules if name for suffix in suffixes(name)}
    for entry in keep:
        if entry not in known:
            raise ContractError(
                f"keep contains {short(entry)}, which matches no module{close_matches(str(entry), modules)}"
            )
    # T5 casts its input to the dtype of this weight, and needs float32 there
    own = getattr(model, "_keep_in_fp32_modules", None) or ()
    uses = Counter(
        storage_of(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module._parameters.values()
        if parameter is not None
    )
    # on the device meta, the weights of tied layers may still be separate
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*ties, *ties.values()}
    linear = [name for name in all_linear(model).modules if type(modules[name]) is nn.Linear]
    names = [
        name
        for name in linear
        if _entries(name).isdisjoint([*keep, *own])
        and f"{name}.weight" not in tied
        and uses[storage_of(model.get_parameter(f"{name}.weight"))] == 1
    ]
    if not names:
        raise ContractError(
            f"no layer of this {type(model).__name__} can be stored in float8: its backbone has "
            + (
                f"these, which keep or shared weights exclude:\n{listing(linear)}"
                if linear
                else "no nn.Linear"
            )
        )
    return names


def _entries(name: str) -> set[str]:
    """The entries of ``keep`` that keep this module: the ends of its name and of the names of its parents."""
    parts = name.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return {suffix for parent in parents for suffix in suffixes(parent)}


def write_settings(model: nn.Module) -> None:
    """Write the ``quantization_config`` of compressed-tensors into the config of a model with float8 layers, if it has a config."""
    config = getattr(model, "config", None)
    if config is not None:
        setattr(config, _SETTINGS, _settings(model))


def _settings(model: nn.Module) -> dict[str, Any]:
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Float8Linear)
    ]
    eight_bit = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bit, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bit, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": plain,
        "kv_cache_scheme": None,
    }


def _is_ours(settings: Any) -> bool:
    return isinstance(settings, dict) and settings.get("format") == "float-quantized"
