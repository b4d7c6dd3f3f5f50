"""Run a model in float32 arithmetic on its stored weights, without changing the model and without a float32 copy of it.

``float32_copy`` copies the modules of a model but shares its tensors. The copy casts the weight of a layer to float32 when the layer is
called, and drops the cast weight afterwards. So differences between two models come from their weights, not from rounded activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.base.storage import Storage, storage_of
from peftkit.errors import ContractError
from peftkit.find.repacking import forbid_repacking
from peftkit.find.stacks import packed_stacks
from peftkit.merging.lazy import LazyTensor, decode_when_used, values_of
from peftkit.merging.mapped import BaseFiles, files_of
from peftkit.merging.units import base_module, is_unit, walk
from peftkit.wrapping import restore


class DecodedLinear(nn.Linear):
    """A linear of bitsandbytes that computes in float32. Its weight is decoded at each access.

    Attributes:
        storage: The quantised weight.
        decode: Returns ``Float32[N, K]``. Default: the decoded storage.
    """

    def __init__(self, linear: Any, storage: Storage):
        """Share the storage and the bias of a linear of bitsandbytes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training
        # nn.Module would register tensors; these belong to the original
        self.__dict__["storage"] = storage
        self.__dict__["decode"] = storage.dense
        self.register_parameter("bias", linear.bias)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``Float32[N, K]``"""
        return self.__dict__["decode"]()

    def dense(self) -> nn.Linear:
        """Return a linear with the decoded weight as a parameter, and its own bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().float().clone(), requires_grad=False)
        return linear.train(self.training)


Change = Callable[[str, Tensor], Tensor]
"""Returns what replaces a float32 weight, given the weight's name."""


def float32_copy(model: nn.Module, change: Change | None = None) -> Any:
    """Copy the modules of a model for evaluation in float32 arithmetic. The copy shares the tensors of the model.

    Args:
        model: A transformers model, with or without adapters; not changed.
        change: Replaces each parameter of the base by another, for example by its rounded values.

    Returns:
        A model in evaluation mode. Changes of its modules do not affect ``model``.

    Raises:
        ContractError: Weights are offloaded, or quantised in a way that cannot be decoded.
    """
    files = files_of(model)
    copied: Any = restore(_shared_copy(model)).eval()
    decode_when_used(copied)
    forbid_repacking(copied)
    if hasattr(copied.config, "use_cache"):
        copied.config.use_cache = False
    seen: set[int] = set()
    for name, module in walk(copied):
        if id(module) in seen:
            continue
        seen.add(id(module))
        names = _base_names(name, module)
        for part in module.modules() if is_unit(module) else [module]:
            _use_plain_class(part)
            if change is not None and isinstance(part, DecodedLinear) and id(part) in names:
                decode, full = part.__dict__["decode"], f"{names[id(part)]}.weight"
                part.__dict__["decode"] = _Changed(decode, change, full)
        cast = _Cast(names, change, files)
        if is_unit(module) or _has_large_weights(module):
            module.register_forward_pre_hook(cast.before, with_kwargs=True)
            module.register_forward_hook(cast.after, always_call=True)
        else:
            cast.tensors(module, recurse=False)
    return copied


def _base_names(name: str, module: nn.Module) -> dict[int, str]:
    """The names of the modules of the base model in a layer, by id."""
    if not is_unit(module):
        return {id(module): name}
    inner = base_module(module).named_modules()
    return {id(part): f"{name}.{path}" if path else name for path, part in inner}


def with_float32_tensors(unit: nn.Module, files: BaseFiles) -> AbstractContextManager[None]:
    """Cast the tensors of one layer to float32 during a block, as a call of the layer does.

    Args:
        unit: The layer.
        files: The files of the model that it is part of.
    """
    return _Cast({}, None, files).during(unit)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Evaluate without gradients, autocast and shortened float32 products (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _shared_copy(model: nn.Module) -> nn.Module:
    # copy.deepcopy uses the entries of its memo instead of copying these objects
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.is_meta:
                raise ContractError(
                    f"the weights of {name} are offloaded or were never loaded; load the whole model on one device to merge it"
                )
            # another object on the same memory: PEFT's forwards change attributes and versions of parameters
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(tensor.data, False) if is_parameter else tensor.data
        for tensor in _tensors_in(module.__dict__):
            # PEFT keeps views of tied factors, which belong to a graph and cannot be copied
            memo.setdefault(id(tensor), tensor.detach())
        for stack in packed_stacks(module).values():
            # not copied, because it has the block maxima
            memo[id(stack.state)] = stack.state
        try:
            storage = storage_of(module)
        except ValueError as error:
            raise ContractError(f"the base layer {name} cannot be merged: {error}") from error
        if storage is not None:
            memo[id(module)] = DecodedLinear(module, storage)
    return copy.deepcopy(model, memo)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dictionaries and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) is dict:
        for item in value.values():
            yield from _tensors_in(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors_in(item)


def _use_plain_class(module: nn.Module) -> None:
    """Give a PEFT layer for a quantised linear the class of the same layer for a plain one, which can merge into float32."""
    cls = type(module)
    if not (cls.__module__.startswith("peft.tuners.") and cls.__module__.endswith(".bnb")):
        return
    import importlib

    home = importlib.import_module(cls.__module__.removesuffix("bnb") + "layer")
    plain = cls.__name__.replace("8bitLt", "").replace("4bit", "")
    module.__class__ = getattr(home, plain)
    module.__dict__.setdefault("is_target_conv_1d_layer", False)


def _has_large_weights(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
        return True
    # stacks of experts; a convolution has 3 to 5 dimensions and is small
    parameters = [p for p in module._parameters.values() if p is not None]
    return any(p.ndim == 3 for p in parameters) and not isinstance(module, nn.modules.conv._ConvNd)


class _Changed:
    """A weight that is decoded and then changed at each access."""

    def __init__(self, decode: Callable[[], Tensor], change: Change, name: str):
        self.decode, self.change, self.name = decode, change, name

    def __call__(self) -> Tensor:
        return self.change(self.name, self.decode())


class _Cast:
    """Casts the 16-bit tensors of a layer to float32 before a call, and puts the stored ones back after it."""

    def __init__(self, names: dict[int, str], change: Change | None, files: BaseFiles):
        # the names of the modules whose parameters are changed, by id
        self.names, self.change, self.files = names, change, files
        self.replaced: list[list[tuple[dict[str, Any], str, Tensor]]] = []

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.replaced.append(self.tensors(module, recurse=True))
        return (
            tuple(_float32(value) for value in args),
            {name: _float32(value) for name, value in kwargs.items()},
        )

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        # empty if an error happened before the tensors were replaced
        for tensors, name, tensor in self.replaced.pop() if self.replaced else []:
            tensors[name] = tensor
        self.files.release()

    @contextmanager
    def during(self, module: nn.Module) -> Iterator[None]:
        self.replaced.append(self.tensors(module, recurse=True))
        try:
            yield
        finally:
            self.after(module, (), None)

    def tensors(self, module: nn.Module, recurse: bool) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Cast the tensors of a module. Returns those that were replaced: their dictionary, name and value."""
        replaced = []
        for part in module.modules() if recurse else [module]:
            for tensors in (part._parameters, part._buffers):
                is_parameter = tensors is part._parameters
                for key, tensor in tensors.items():
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    cast = values_of(tensor).float()
                    if self.change is not None and is_parameter and id(part) in self.names:
                        name = self.names[id(part)]
                        cast = self.change(f"{name}.{key}" if name else key, cast)
                    if not isinstance(tensor, LazyTensor) and _is_same(cast, tensor):
                        continue
                    replaced.append((tensors, key, tensor))
                    tensors[key] = nn.Parameter(cast, requires_grad=False) if is_parameter else cast
                    self.files.release()
        return replaced


def _is_same(cast: Tensor, tensor: Tensor) -> bool:
    return cast.data_ptr() == tensor.data_ptr() and cast.dtype == tensor.dtype


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
