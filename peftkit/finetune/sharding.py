"""Divide the weights of a model among the processes of a run with torch's FSDP2.

Of a model with adapters only the frozen weights are divided, and the adapter stays whole in each process: ``DistributedDataParallel``
averages its gradients as without sharding, so optimiser, checkpoints and files are those of a run in which each process has the whole
model. Of a model whose own weights are trained all are divided, with their gradients and the state of the optimiser
(``peftkit.finetune.divided``).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from peftkit.errors import ContractError
from peftkit.find.statistics import norms_with_statistics
from peftkit.finetune.blocks import find_stacks
from peftkit.finetune.processes import process_count


def shard(model: Any, is_adapter: bool) -> str:
    """Divide the parameters of a model, or the frozen ones if an adapter is trained; a block is whole only while it is computed.

    Args:
        model: A model on the CPU or on the device of this process. All processes of the run must call this.
        is_adapter: Whether an adapter is trained.

    Returns:
        A sentence with the bytes that this process keeps.

    Raises:
        ContractError: The model has no stack of blocks, or trained statistics that FSDP2 would not share.
    """
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    base = model.get_base_model() if is_adapter else model
    uses = _uses(base)
    # FSDP2 would make two weights of one that is in a block and outside it, as in detectors that share their heads.
    blocks = [
        block
        for stack in find_stacks(model)
        for block in base.get_submodule(stack.name).children()
        if all(uses[p] == times for p, times in _uses(block).items())
    ]
    if not blocks:
        raise ContractError(
            f"training.fsdp=true needs a model with a list of blocks, but {type(base).__name__} has none; leave training.fsdp out"
        )
    if not is_adapter and norms_with_statistics(model):
        raise ContractError(
            f"training.fsdp=true does not share the statistics of the batch norms of {type(base).__name__} among processes; leave training.fsdp "
            "out, or train an adapter"
        )
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(base.config, name, 0.0):
            raise ContractError(
                f"training.fsdp=true needs every layer in all processes at once, but {name}={getattr(base.config, name)} drops layers at random; "
                "set it to 0 in the model's config.json, or leave training.fsdp out"
            )
    device = PartialState().device
    mesh = init_device_mesh(device.type, (process_count(),))
    kind = "frozen weights" if is_adapter else "weights"
    # A single number, such as CLIP's temperature, cannot be divided.
    left = {p for p in model.parameters() if p.numel() == 1 or (is_adapter and p.requires_grad)}
    divided = {n: p for n, p in model.named_parameters() if p not in left}
    whole = sum(p.nbytes for p in divided.values())
    own = {name: (type(p), dict(vars(p))) for name, p in divided.items()}
    for parameter in left:
        parameter.data = parameter.data.to(device)
        if not is_adapter:
            is_trained = parameter.requires_grad  # now; a later stage may train it
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(_average)
            parameter.requires_grad_(is_trained)
    groups = (*blocks, model)
    # The optimiser must not be given the whole weights that an evaluation has left.
    reshard = None if is_adapter else True
    for group in groups:
        fully_shard(group, mesh=mesh, ignored_params=left, reshard_after_forward=reshard)
        if device.type == "cpu":
            group.set_force_sum_reduction_for_comms(True)  # gloo computes no mean
    for group in groups:
        # Makes the objects of the whole weights. FSDP2 frees their memory between forwards, but keeps the objects.
        group.unshard()
    _restore(model, own)
    for group in groups:
        group.reshard()
    _restore(model, own)
    # PEFT calls the forward of the base model directly, so FSDP2's hooks must be those of the whole model.
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    parts = dict(model.named_parameters())
    kept = sum(parts[name].to_local().nbytes for name in divided)
    return f"{kept:,} of {whole:,} bytes of {kind} in each process"


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """In how many places each parameter is."""
    return Counter(p for _, p in module.named_parameters(remove_duplicate=False))


def _average(parameter: Any) -> None:
    """Make the gradient of a number that is whole in each process the mean over all, as FSDP2 does for the parts of other weights."""
    from torch import distributed

    distributed.all_reduce(parameter.grad)
    parameter.grad /= process_count()


def _restore(model: nn.Module, own: dict[str, tuple[type, dict[str, Any]]]) -> None:
    """Give weights their attributes again, which FSDP2 drops, and whole ones of bitsandbytes their class.

    transformers marks weights that it has loaded.
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, (kind, attributes) in own.items():
        weight = parameters[name]
        if type(weight) is nn.Parameter:
            weight.__class__ = kind
        if attributes.get("CB") is not None:
            attributes = attributes | {"CB": weight.data}
        vars(weight).update(attributes)
