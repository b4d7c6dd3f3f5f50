"""Changes that a user makes to a model around ``wrap``: hooks, replaced children and forwards, other settings.

Each takes the model and a source of choices, and changes the model in place; what it changes for the whole process it leaves with
an ``ExitStack`` that undoes it. Applied to the stock and the fused model, it changes both alike.
"""

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from fuzz.build import Unbuildable
from torch import Tensor, nn

Touch = Callable[[nn.Module, random.Random, ExitStack], None]
_EPS = ("variance_epsilon", "eps", "epsilon")


class Scaled(nn.Module):
    """A module whose output is multiplied; put in place of another."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """1.5 times what ``inner`` gives."""
        return scaled(self.inner(*args, **kwargs))


class Half(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        """Half of the weight."""
        return weight * 0.5


def scaled(output: Any) -> Any:
    """The output times 1.5; of several, the first."""
    if isinstance(output, tuple):
        return (output[0] * 1.5, *output[1:])
    return output * 1.5 if isinstance(output, Tensor) else output


def _hook(module: nn.Module, args: Any, output: Any) -> Any:
    return scaled(output)


def _pre_hook(module: nn.Module, args: Any) -> Any:
    return (args[0] * 0.75, *args[1:]) if args and args[0].is_floating_point() else None


def _pick(model: nn.Module, choose: random.Random, wanted: Callable[[str, nn.Module], bool]) -> Any:
    """One module as ``(name, module)``."""
    found = [(name, module) for name, module in model.named_modules() if wanted(name, module)]
    if not found:
        raise Unbuildable("there is no module to change")
    return choose.choice(found)


def _is_norm(name: str, module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and "weight" in module._parameters


def _is_act(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] in ("act_fn", "activation_fn", "act", "intermediate_act_fn")


def _is_adapter(name: str, module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and len(module.lora_A) > 0


def _is_leaf(name: str, module: nn.Module) -> bool:
    return not module._modules and bool(module._parameters) and "lora_" not in name


def _is_linear(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    inside = "lora_" in name or name.endswith("base_layer")
    return kind in ("Linear", "Conv1D") and not inside and bool(name)


def _is_mlp(name: str, module: nn.Module) -> bool:
    return any(_is_act(child, module) for child in module._modules)


def _is_down(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] in ("down_proj", "wo", "dense_4h_to_h", "fc2", "c_proj")


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, own = name.rpartition(".")
    return model.get_submodule(owner), own


def own_class(module: nn.Module) -> type:
    """The class whose forward the module had before it was fused."""
    for cls in type(module).__mro__:
        if "forward" in vars(cls) and not cls.__module__.startswith("peftkit"):
            return cls
    raise Unbuildable(f"{type(module).__name__} has no forward of its own")


def _hooked(wanted: Callable[[str, nn.Module], bool]) -> Touch:
    def touch(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
        _pick(model, choose, wanted)[1].register_forward_hook(_hook)

    return touch


def _pre_hooked(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    _pick(model, choose, _is_linear)[1].register_forward_pre_hook(_pre_hook)


def _own_forward(wanted: Callable[[str, nn.Module], bool]) -> Touch:
    def touch(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
        module = _pick(model, choose, wanted)[1]
        forward = module.forward
        module.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))

    return touch


def _replaced(wanted: Callable[[str, nn.Module], bool]) -> Touch:
    def touch(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
        name, module = _pick(model, choose, wanted)
        owner, own = _parent(model, name)
        setattr(owner, own, Scaled(module))

    return touch


def _other_act(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    owner, own = _parent(model, _pick(model, choose, _is_act)[0])
    setattr(owner, own, nn.Tanh())


def _other_eps(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    module = _pick(model, choose, _is_norm)[1]
    for name in _EPS:
        if hasattr(module, name):
            setattr(module, name, 0.5)


def _class_forward(wanted: Callable[[str, nn.Module], bool]) -> Touch:
    def touch(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
        cls: Any = own_class(_pick(model, choose, wanted)[1])
        forward = cls.forward
        patch = mock.patch.object(cls, "forward", lambda *a, **k: scaled(forward(*a, **k)))
        undo.enter_context(patch)

    return touch


def _attention_registered(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(*args: Any, **kwargs: Any) -> Any:
        return scaled(sdpa_attention_forward(*args, **kwargs))

    ALL_ATTENTION_FUNCTIONS["sdpa"] = forward
    undo.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, "sdpa")


def _attention_patched(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    function = torch.nn.functional.scaled_dot_product_attention
    undo.enter_context(
        mock.patch(
            "torch.nn.functional.scaled_dot_product_attention",
            lambda *args, **kwargs: function(*args, **kwargs) * 1.5,
        )
    )


def _parametrized(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    module = _pick(model, choose, _is_norm)[1]
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Half())


def _norm_trained(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    _pick(model, choose, _is_norm)[1].requires_grad_(True)


def _base_trained(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    _pick(model, choose, _is_adapter)[1].base_layer.weight.requires_grad_(True)


def _scaling(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    layer = _pick(model, choose, _is_adapter)[1]
    layer.scaling = {name: 2 * value for name, value in layer.scaling.items()}


def _inside_adapter(part: str) -> Touch:
    def touch(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
        layer = _pick(model, choose, _is_adapter)[1]
        inner = getattr(layer, part)
        if isinstance(inner, nn.ModuleDict):
            inner = next(iter(inner.values()))
        inner.register_forward_hook(_hook)

    return touch


def _data(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    _pick(model, choose, _is_leaf)[1].weight.data.mul_(1.5)


def _norm_wide(model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    _pick(model, choose, _is_norm)[1].to(torch.float64)


TOUCHES: dict[str, Touch] = {
    "hook on an activation": _hooked(_is_act),
    "forward of an activation": _own_forward(_is_act),
    "other activation": _other_act,
    "other eps": _other_eps,
    "forward of an MLP's class": _class_forward(_is_mlp),
    "forward of a norm's class": _class_forward(_is_norm),
    "hook on a leaf": _hooked(_is_leaf),
    "hook on a down projection": _hooked(_is_down),
    "hook on a linear": _hooked(_is_linear),
    "hook before a linear": _pre_hooked,
    "hook on a norm": _hooked(_is_norm),
    "forward of a leaf": _own_forward(_is_leaf),
    "forward of a linear": _own_forward(_is_linear),
    "forward of an MLP": _own_forward(_is_mlp),
    "other linear": _replaced(_is_linear),
    "other norm": _replaced(_is_norm),
    "attention registered": _attention_registered,
    "attention patched": _attention_patched,
    "norm parametrised": _parametrized,
    "norm trained": _norm_trained,
    "base trained": _base_trained,
    "scaling": _scaling,
    "hook on a base layer": _inside_adapter("base_layer"),
    "hook on lora_A": _inside_adapter("lora_A"),
    "data of a leaf": _data,
}
"""By name; a case names one."""

BEFORE = tuple(name for name in TOUCHES if "lora" not in name and "base" not in name)
BEFORE = tuple(name for name in BEFORE if name not in ("scaling", "norm trained"))
"""Those that also make sense before ``wrap``."""


def touch(name: str, model: nn.Module, choose: random.Random, undo: ExitStack) -> None:
    """Make the change of this name."""
    TOUCHES[name](model, choose, undo)
