"""Modules that share weights, or are one object under several names, such as the heads of detectors that refine boxes layer by layer.

PEFT trains a copy of each module in ``modules_to_save``. The copies of tied modules would be trained apart, so that the trained model
has other weights than the architecture allows, and loading or saving it would drop some of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftkit.errors import ContractError
from peftkit.find.modules import ancestors, storage_of, without_adapters, wrapped_modules

Modules = Mapping[str, nn.Module]


def other_names(modules: Modules) -> dict[str, str]:
    """The second and further names of modules, by which ``base_modules`` does not yield them, and the first name of each.

    Modules inside such a module are left out: they have one parent, whatever its names are.
    """
    first = {id(module): name for name, module in modules.items()}
    found = {}
    for name, module in modules.items():
        for own, child in module._modules.items():
            full = f"{name}.{own}" if name else own
            inner = None if child is None else without_adapters(child)
            if inner is not None and full not in modules and id(inner) in first:
                found[full] = first[id(inner)]
    return found


def sharing(modules: Modules) -> dict[str, list[str]]:
    """For each module with a parameter of its own that others have too, all the modules that have it."""
    found: dict[str, list[str]] = {}
    for names in map(list, _owners(modules).values()):
        for name in names if len(names) > 1 else ():
            known = found.setdefault(name, [])
            known += [other for other in names if other not in known]
    return found


def _owners(modules: Modules) -> dict[Any, dict[str, str]]:
    """For each parameter in memory, its name in each module that has it."""
    found: dict[Any, dict[str, str]] = defaultdict(dict)
    for name, module in modules.items():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                found[storage_of(parameter)].setdefault(name, own)
    return found


def tied_to(head: str, modules: Modules, shared: Mapping[str, list[str]]) -> list[str] | None:
    """The modules that share every weight with a module, including itself.

    Args:
        head: The name of a module.
        modules: All modules of the model by name.
        shared: ``sharing(modules)``.

    Returns:
        Their names, or ``None`` if another module has only some of the weights, or is of another kind.
    """
    found = [head]
    for name in [n for n in modules if n == head or n.startswith(f"{head}.")]:
        inside = name[len(head) :]
        for other in shared.get(name, ()):
            whole = other.removesuffix(inside)
            if not other.endswith(inside) or not _same(modules.get(whole), modules[head]):
                return None
            if whole not in found:
                found.append(whole)
    return found


def _same(first: nn.Module | None, second: nn.Module) -> bool:
    """Whether two modules are of one class and have the same parameters in memory."""
    if type(first) is not type(second) or isinstance(second, nn.Embedding):
        return False
    mine, yours = (
        {name: storage_of(p) for name, p in module.named_parameters(remove_duplicate=False)}
        for module in (first, second)
    )
    return mine == yours


def tie_copies(model: nn.Module) -> None:
    """Tie PEFT's copies of modules that are tied in the base model, so that they are trained as one.

    Copies with different values stay apart, because a loaded adapter must compute what it was saved with.

    Args:
        model: A model after PEFT has wrapped its ``modules_to_save``; changed in place.
    """
    from peft.utils import ModulesToSaveWrapper

    first: dict[Any, nn.Parameter] = {}
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for name, original in wrapper.original_module.named_parameters(remove_duplicate=False):
            for adapter, copied in wrapper.modules_to_save.items():
                owner = copied.get_submodule(name.rpartition(".")[0])
                own = name.rpartition(".")[2]
                mine = owner._parameters.get(own)
                if mine is None:
                    continue
                known = first.setdefault((adapter, storage_of(original), original.shape), mine)
                if known is not mine and torch.equal(known, mine):
                    owner._parameters[own] = known


def all_saved(names: Iterable[str], modules: Modules, saved: Iterable[str]) -> bool:
    """Whether modules that share a weight are all inside modules of which PEFT trains a copy, which ``tie_copies`` ties."""
    whole = set(saved)
    return all(
        any(name == one or name.startswith(f"{one}.") for one in whole)
        and not isinstance(modules[name], nn.Embedding)
        for name in names
    )


def require_tied(model: nn.Module, adapter: str) -> None:
    """Raise if an adapter trains some of several modules that share a weight, and the others would keep the old weight.

    ``ensure_weight_tying`` of PEFT ties what it knows as embeddings by name, which leaves out those of BERT and its relatives.

    Args:
        model: A model after ``tie_copies``.
        adapter: The name of the adapter.

    Raises:
        ContractError: There are such modules.
    """
    inner, outer = {}, {}
    for name, around, module in wrapped_modules(model):
        inner[name], outer[name] = module, around
    for owners in _owners(inner).values():
        kinds = {name: _trained_as(name, own, outer, adapter) for name, own in owners.items()}
        names = list(owners)
        if len(set(kinds.values())) > 1:
            frozen = [name for name, kind in kinds.items() if kind is None]
            trained = [name for name in names if name not in frozen]
            raise ContractError(
                f"{', '.join(trained)} shares its weight with {', '.join(frozen) or 'each other'}, and PEFT does not keep them tied although "
                f"ensure_weight_tying is set; list all of them in modules_to_save ({', '.join(names)}), or leave them out"
            )


def _trained_as(name: str, own: str, outer: Modules, adapter: str) -> Any:
    """What an adapter makes of the parameter ``own`` of a module: trained copies, an adapter's layer, or ``None``, which leaves them as they are."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for whole in (name, *ancestors(name)):
        wrapper = outer[whole]
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            copied = wrapper.modules_to_save[adapter].get_submodule(
                name[len(whole) :].removeprefix(".")
            )
            weight = copied._parameters.get(own)
            return None if weight is None else storage_of(weight)
    layer = outer[name]
    adapted = isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    return "adapter" if adapted and own == "weight" else None


@contextmanager
def embeddings_answered(model: nn.Module) -> Iterator[None]:
    """Give a model without input embeddings an empty answer, while PEFT asks which modules are tied to them.

    PEFT asks every model that ties weights. Detectors that tie their heads raise ``NotImplementedError``.
    """
    base = _plain(model)
    asks = isinstance(getattr(base, "_tied_weights_keys", None), dict)
    if not asks or not hasattr(base, "get_input_embeddings") or _has_embeddings(base):
        yield
        return
    own = vars(base)
    own["get_input_embeddings"] = nn.Module
    try:
        yield
    finally:
        del own["get_input_embeddings"]


def _plain(model: Any) -> Any:
    """The model inside PEFT's classes."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def _has_embeddings(model: Any) -> bool:
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        return False
    return True
