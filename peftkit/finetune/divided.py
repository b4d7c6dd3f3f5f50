"""Trained weights that FSDP2 has divided among processes: whole values for files and digests, and a Trainer that knows about them.

The files of a checkpoint are those of a run with the whole model in each process: the parts are gathered before they are written, and
each process takes its part of what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from peftkit.finetune.processes import is_main

OPTIMIZERS = "adamw_torch", "adamw_torch_fused", "sgd"
"""Values of ``training.optimizer`` whose steps are the same on parts of a weight as on the whole."""


def is_divided(model: nn.Module) -> bool:
    """Whether trained weights of the model are divided among processes, not frozen ones alone."""
    return any(p.requires_grad and isinstance(p, DTensor) for p in model.parameters())


def groups_of_parts(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of parameters for an optimiser, in which no group has both parts of weights and the single numbers that are not divided.

    Raises:
        RuntimeError: Another weight is whole. Whole weights come and go, so an optimiser of them would train nothing.
    """
    every = [p for group in groups for p in group["params"]]
    undivided = [p for p in every if not isinstance(p, DTensor)]
    if len(undivided) < len(every) and any(p.numel() > 1 for p in undivided):
        raise RuntimeError(f"{len(undivided)} of {len(every)} trained weights are whole")
    return [
        {**group, "params": own} for group in groups for own in _parts_and_others(group["params"])
    ]


def _parts_and_others(parameters: Iterable[Any]) -> list[list[Any]]:
    """The parameters of which a process has a part, and the others; torch's lists of tensors take one kind. Neither is empty."""
    kinds: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in parameters:
        kinds[isinstance(parameter, DTensor)].append(parameter)
    return [kind for kind in kinds.values() if kind]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of which a process has a part; other tensors as they are. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model on the CPU, with whole tensors; tied weights are one tensor. All processes must call this.

    Returns:
        The state in the process that writes files, nothing in the others.
    """
    made: dict[int, Tensor] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            made[id(tensor)] = _kept(tensor.detach())
        found[name] = made[id(tensor)]
    return found if is_main() else {}


def whole_optimizer(optimizer: Any) -> dict[str, Any]:
    """The state of an optimiser on the CPU, with whole tensors in the process that writes files. All processes must call this."""
    return _mapped(optimizer.state_dict(), lambda tensor, _: _kept(tensor), optimizer)


def _kept(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU if this process writes files; otherwise none of it stays in memory."""
    found = whole(tensor)
    return found.cpu() if is_main() else found.new_empty(0)


def load_weights(model: nn.Module, folder: Path) -> Any:
    """Load the safetensors files of a folder; each process keeps its part.

    Returns:
        What ``load_state_dict`` returns: the names that are missing or left over.
    """
    state = model.state_dict(keep_vars=True)
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                found[name] = part_of(tensors.get_tensor(name), state.get(name))
    return model.load_state_dict(found, strict=False)


def load_optimizer(optimizer: Any, file: Path) -> None:
    """Load what ``whole_optimizer`` returned; each process keeps its part."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(_mapped(saved, part_of, optimizer))


def part_of(tensor: Tensor, parameter: Tensor | None) -> Tensor:
    """The part of a whole tensor that belongs to this process's part of a parameter; ``tensor`` itself if that is not divided."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    # All processes have read the same file.
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def _mapped(
    state: dict[str, Any], change: Callable[[Tensor, Tensor], Tensor], optimizer: Any
) -> dict[str, Any]:
    """An optimiser's state in which ``change`` of each tensor and its parameter replaces the tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    changed = {
        number: {
            name: change(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}


def train_only(model: nn.Module, names: set[str]) -> None:
    """Train exactly the parameters with these names. FSDP2 has two objects of each weight: a part, and the whole between forwards."""
    parameters = dict(model.named_parameters())
    if all(p.requires_grad == (name in names) for name, p in parameters.items()):
        return
    _set_trained(parameters, names)
    for prefix, group in _groups(model):
        group.unshard()
        _set_trained({f"{prefix}{name}": p for name, p in group.named_parameters()}, names)
        group.reshard()


def _groups(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            yield (f"{name}." if name else ""), module


def _set_trained(parameters: dict[str, Any], names: set[str]) -> None:
    for name, parameter in parameters.items():
        if parameter.requires_grad != (name in names):
            parameter.requires_grad_(name in names)
            parameter.grad = None


class WithoutWrapping(Accelerator):
    """An Accelerator for a model whose gradients FSDP2 adds up: it wraps it in nothing more, and its norm is that of all parts."""

    def prepare_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare the model without ``DistributedDataParallel``."""
        return super().prepare_model(model, evaluation_mode=True, device_placement=False)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Scale the gradients so that their norm over all processes is at most ``max_norm``; returns the norm before that."""
        kinds = _parts_and_others(p for p in parameters if p.grad is not None)
        norms = [whole(get_total_norm([p.grad for p in kind], norm_type)) for kind in kinds]
        norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        for kind in kinds:
            clip_grads_with_norm_(kind, max_norm, norm)
        return norm
