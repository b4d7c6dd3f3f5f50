"""Divide the frozen weights of a base model among the processes of a run with torch's FSDP2. Adapters stay whole in each of them.

The adapter's gradients are averaged by ``DistributedDataParallel`` as without sharding, so optimiser, checkpoints and files are those
of a run in which each process has the whole model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkit.errors import ContractError
from peftkit.finetune.blocks import find_stacks
from peftkit.finetune.processes import process_count


def shard_base(model: Any) -> str:
    """Divide the frozen parameters of a model with adapters; a block has all of its weights only while it is computed.

    Args:
        model: A model with adapters, on the CPU or on the device of this process. All processes of the run must call this.

    Returns:
        A sentence with the bytes that this process keeps.

    Raises:
        ContractError: The model has no stack of blocks.
    """
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    base = model.get_base_model()
    blocks = [
        block for stack in find_stacks(model) for block in base.get_submodule(stack.name).children()
    ]
    if not blocks:
        raise ContractError(
            f"training.fsdp=true needs a model with a list of blocks, but {type(base).__name__} has none; leave training.fsdp out"
        )
    device = PartialState().device
    mesh = init_device_mesh(device.type, (process_count(),))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    whole = sum(p.nbytes for p in frozen.values())
    quantised = {
        name: (type(p), dict(vars(p))) for name, p in frozen.items() if type(p) is not nn.Parameter
    }
    trained = {p for p in model.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    groups = (*blocks, model)
    for group in groups:
        fully_shard(group, mesh=mesh, ignored_params=trained)
    for group in groups:
        # Makes the objects of the whole weights. FSDP2 frees their memory between forwards, but keeps the objects.
        group.unshard()
    _restore(model, quantised)
    for group in groups:
        group.reshard()
    _restore(model, quantised)
    # PEFT calls the forward of the base model directly, so FSDP2's hooks must be those of the whole model.
    register_fsdp_forward_method(model, "generate")
    parts = dict(model.named_parameters())
    kept = sum(parts[name].to_local().nbytes for name in frozen)
    return f"{kept:,} of {whole:,} bytes of frozen weights in each process"


def _restore(model: nn.Module, quantised: dict[str, tuple[type, dict[str, Any]]]) -> None:
    """Give bitsandbytes' weights their attributes again, which FSDP2 drops, and whole ones their class."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, (kind, attributes) in quantised.items():
        weight = parameters[name]
        if type(weight) is nn.Parameter:
            weight.__class__ = kind
        if attributes.get("CB") is not None:
            attributes = attributes | {"CB": weight.data}
        vars(weight).update(attributes)
