"""The places of a frozen model where adapters are, and what is there: one adapter, or several of which each gets its own rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import ContractError
from peftkit.fuse.linear import FusedLoRA
from peftkit.fuse.merge_into import merge_into_of
from peftkit.fuse.plan import Reason
from peftkit_kernels.low_rank import LoRA, adapter_dtype
from peftkit_kernels.ops.grouped_lora import GroupPlan, grouped_lora, plan_groups

Place = tuple[nn.Module, str]
"""A module and the name of its child."""

_NONE = object()


class Route:
    """Which rows of the joint batch belong to which adapter.

    Attributes:
        shares: Number of the training and its number of rows, in the order of the rows.
    """

    def __init__(self) -> None:
        self.shares: tuple[tuple[int, int], ...] = ()
        self._plans: dict[Any, GroupPlan] = {}
        self._input: Tensor | None = None
        self._parts: list[Tensor] = []

    def set(self, shares: Sequence[tuple[int, int]]) -> None:
        """Begin a batch with these shares."""
        self.shares, self._plans, self._input, self._parts = tuple(shares), {}, None, []

    def loosen(self) -> None:
        """Keep the proportions only: a recomputation in the backward may be that of an earlier pass with more or fewer rows."""
        divisor = math.gcd(*(rows for _, rows in self.shares)) or 1
        self.set([(number, rows // divisor) for number, rows in self.shares])

    def sizes(self, tensor: Tensor, what: str) -> list[int]:
        """Rows of the first axis of ``tensor`` for each share. A row of the batch may be several rows here, such as windows.

        Raises:
            ContractError: The first axis does not have the rows of the batch.
        """
        total = sum(rows for _, rows in self.shares)
        if not isinstance(tensor, Tensor) or not tensor.ndim or tensor.shape[0] % total:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ContractError(
                f"{what} gets an input of shape {shape} for a batch of {total} rows, so its rows cannot be divided among the adapters; choose "
                "other target_modules, or train the adapters separately"
            )
        return [tensor.shape[0] // total * rows for _, rows in self.shares]

    def divide(self, x: Tensor, what: str) -> list[Tensor]:
        """The rows of ``x`` for each share. Linears that share an input get the same tensors, by which peftkit recognises them."""
        if self._input is not x:
            self._parts = list(x.split(self.sizes(x, what)))
            self._input = x
        return self._parts

    def plan(self, sizes: Sequence[int], numbers: Sequence[int], device: Any) -> GroupPlan:
        """The plan of ``grouped_lora`` for consecutive rows; ``numbers`` are those of the adapters, -1 for none."""
        key = (tuple(sizes), tuple(numbers), device)
        if key not in self._plans:
            ids = torch.tensor(numbers, device=device).repeat_interleave(
                torch.tensor(sizes, device=device), output_size=sum(sizes)
            )
            self._plans[key] = plan_groups(ids, max(numbers) + 1)
        return self._plans[key]


class Routed(nn.Module):
    """The adapters of several trainings on one frozen module; each gets the rows of its own training.

    Plain LoRA on a linear computes the frozen product of all rows at once. Other adapters compute their rows one after the other with
    their own forwards.
    """

    def __init__(self, route: Route, base: nn.Module, layers: dict[int, nn.Module], name: str):
        super().__init__()
        self.route, self.numbers, self.name = route, list(layers), name
        self.layers = nn.ModuleList(layers.values())
        self.base = base

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers, such as the dtype of a weight.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base"], name)

    def layer(self, number: int) -> nn.Module:
        """The module of one training: its adapter, or the frozen module."""
        return self.layers[self.numbers.index(number)] if number in self.numbers else self.base

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the frozen module; each row with its own adapter."""
        layers = [self.layer(number) for number, _ in self.route.shares]
        if all(layer is self.base for layer in layers):
            return self.base(x, *args, **kwargs)
        if not args and not kwargs:
            y = self._at_once(x, layers)
            if y is not None:
                return y
        sizes = self.route.sizes(x, self.name)
        others = [_split(value, sizes) for value in args]
        named = {name: _split(value, sizes) for name, value in kwargs.items()}
        outputs = [
            layer(
                part,
                *(other[i] for other in others),
                **{name: parts[i] for name, parts in named.items()},
            )
            for i, (layer, part) in enumerate(
                zip(layers, self.route.divide(x, self.name), strict=True)
            )
        ]
        return _joined(outputs)

    def _at_once(self, x: Tensor, layers: list[nn.Module]) -> Tensor | None:
        """The frozen product of all rows, and the update of each row; ``None`` if an adapter is no plain LoRA."""
        first: Any = None
        loras: list[LoRA | None] = []
        for layer in layers:
            if layer is self.base:
                loras.append(None)
                continue
            if not isinstance(layer, FusedLoRA) or merge_into_of(layer) is not None:
                return None
            parts = layer.peftkit_plan(x)
            if isinstance(parts, Reason) or parts.magnitude is not None or parts.lora is None:
                return None
            loras.append(parts.lora)
            first = first or (layer, parts)
        if first is None:
            return None
        layer, parts = first
        y = layer._run(x, parts._replace(lora=None))
        sizes = self.route.sizes(x, self.name)
        if x.is_cuda and not any(lora is not None and lora.p for lora in loras):
            return self.grouped(y, x, sizes, loras)
        return self.one_by_one(y, x, loras)

    def one_by_one(self, y: Tensor, x: Tensor, loras: Sequence[LoRA | None]) -> Tensor:
        """``y`` with the update of each share, by plain products."""
        parts = []
        for lora, y_i, x_i in zip(
            loras,
            y.split(self.route.sizes(y, self.name)),
            self.route.divide(x, self.name),
            strict=True,
        ):
            if lora is not None:
                wide = adapter_dtype(x_i, lora.A)
                x_i = F.dropout(x_i.to(wide), lora.p) if lora.p else x_i.to(wide)
                update = F.linear(F.linear(x_i, lora.A.to(wide)), lora.B.to(wide)) * lora.scale
                y_i = (y_i + update).to(y.dtype)
            parts.append(y_i)
        return torch.cat(parts)

    def grouped(
        self, y: Tensor, x: Tensor, sizes: Sequence[int], loras: Sequence[LoRA | None]
    ) -> Tensor:
        """``y`` with the update of each share, by one op. Smaller ranks are filled up with zeros, which add nothing."""
        present = [lora for lora in loras if lora is not None]
        rank = max(lora.A.shape[0] for lora in present)
        A = torch.stack([F.pad(lora.A, (0, 0, 0, rank - lora.A.shape[0])) for lora in present])
        B = torch.stack([F.pad(lora.B, (0, rank - lora.B.shape[1])) for lora in present])
        scale = torch.tensor([lora.scale for lora in present], dtype=A.dtype, device=x.device)
        count = iter(range(len(present)))
        numbers = [-1 if lora is None else next(count) for lora in loras]
        per_row = x.shape[1:-1].numel()
        plan = self.route.plan([size * per_row for size in sizes], numbers, x.device)
        return grouped_lora(y, x.to(y.dtype), A, B, scale, plan)


def _split(value: Any, sizes: Sequence[int]) -> Sequence[Any]:
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == sum(sizes):
        return value.split(list(sizes))
    return [value] * len(sizes)


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, tuple):
        return tuple(_joined(list(parts)) for parts in zip(*outputs, strict=True))
    if all(output is None for output in outputs):
        return None
    raise ContractError(
        f"a layer with an adapter returns a {type(first).__name__}, which cannot be put together; train the adapters separately"
    )


class Places:
    """The places with adapters in a model that several trainings share.

    Args:
        route: Which rows belong to which training.
    """

    def __init__(self, route: Route):
        self.route = route
        self._frozen: dict[tuple[int, str], tuple[Place, nn.Module]] = {}
        self._layers: dict[int, dict[tuple[int, str], nn.Module]] = {}
        self._configs: dict[int, tuple[nn.Module, Any]] = {}
        self._routed: dict[tuple[int, str], Routed] = {}
        self.shown: int | None = None

    def keep(self, number: int, model: Any) -> None:
        """Note where the adapter of a training is.

        Args:
            number: The number of the training.
            model: Its ``PeftModel``, whose adapter is in the shared model.
        """
        base = model.get_base_model()
        found = {}
        for name, place, layer in _adapter_places(base):
            frozen = _frozen_module(layer)
            if frozen is None:
                raise ContractError(
                    f"{name} is a {type(layer).__name__}, which cannot be trained together with other adapters; use strategy lora without "
                    "target_parameters and trainable_token_indices"
                )
            key = (id(place[0]), place[1])
            self._frozen.setdefault(key, (place, frozen))
            found[key] = layer
        self._layers[number] = found
        self._configs[number] = (base, vars(base).get("peft_config", _NONE))
        self._routed = {}
        self.shown = number

    def show(self, number: int) -> None:
        """Put the adapter of one training in its places; a training without one gets the frozen model."""
        layers = self._layers.get(number, {})
        for key, ((parent, name), frozen) in self._frozen.items():
            parent._modules[name] = layers.get(key, frozen)
        for base, _ in self._configs.values():
            vars(base).pop("peft_config", None)
        if number in self._configs and self._configs[number][1] is not _NONE:
            base, config = self._configs[number]
            vars(base)["peft_config"] = config
        self.shown = number

    def show_routed(self, inside: set[int]) -> None:
        """Put the adapters of all trainings in the places below these modules.

        Args:
            inside: Ids of all modules in the part of the model that computes a joint batch.
        """
        for key, ((parent, name), frozen) in self._frozen.items():
            if id(parent) in inside:
                parent._modules[name] = self._at(key, frozen, name)
        self.shown = None

    def routed(self) -> list[Routed]:
        """The modules with several adapters that were made."""
        return list(self._routed.values())

    def _at(self, key: tuple[int, str], frozen: nn.Module, name: str) -> Routed:
        if key not in self._routed:
            layers = {n: own[key] for n, own in self._layers.items() if key in own}
            self._routed[key] = Routed(self.route, frozen, layers, name)
        return self._routed[key]


def _adapter_places(base: nn.Module) -> list[tuple[str, Place, nn.Module]]:
    """The outermost modules that PEFT has put in a model, with their names and places."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    found = []

    def search(module: nn.Module, before: str) -> None:
        for name, child in module._modules.items():
            if child is None:
                continue
            if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                found.append((f"{before}{name}", (module, name), child))
            else:
                search(child, f"{before}{name}.")

    search(base, "")
    return found


def _frozen_module(layer: nn.Module) -> nn.Module | None:
    """The module that was in the place of a layer of PEFT before; ``None`` if the layer is no kind that can be routed."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        return layer.original_module
    if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
        frozen = layer._modules["base_layer"]
        return frozen
    return None
