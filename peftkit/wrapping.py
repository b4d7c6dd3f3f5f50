"""The front door: ``wrap``, ``accelerate`` and ``restore``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from peftkit.bridge import prepare
from peftkit.errors import ContractError
from peftkit.find.targets import is_own_adapter
from peftkit.fuse.attention import FusedAttention, fuse_attention
from peftkit.fuse.blocks import FusedGatedMLP, fuse_gated_mlps, group_shared_inputs
from peftkit.fuse.eligibility import obstacle
from peftkit.fuse.linear import fuse_layer, restore_layer
from peftkit.fuse.loss import install_logit_free, remove_logit_free
from peftkit.fuse.norm import FusedNorm, fuse_norms
from peftkit.swap import swap_out
from peftkit.versions import warn_if_newer_than_tested

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: nn.Module,
    *configs: PeftConfig,
    adapter_name: str = "default",
    strict: bool = False,
    logit_free: bool = True,
) -> PeftModel:
    """Put an adapter on a pretrained model and fuse what can be fused.

    Args:
        model: A pretrained transformers model (any ``nn.Module`` that PEFT takes).
        configs: One ``peft.PeftConfig``, or any two or three of ``LoraConfig``, ``PrefixConfig`` and ``BottleneckConfig`` as
            one adapter; none means LoRA with r=16 and lora_alpha=32 on every linear layer of the backbone. A LoRA config
            without ``target_modules``, or with ``"all-linear"``, gets those layers too.
        adapter_name: Name of the adapter.
        strict: Raise where a layer cannot be fused, instead of running PEFT's own forward there.
        logit_free: Compute the training loss of a causal language model without forming its logits.

    Returns:
        A genuine ``peft.PeftModel``.

    Raises:
        ContractError: An entry of ``target_modules`` matches nothing, or ``strict`` and a layer is not fused; the model
            is left as it was.
        ValueError: Configs that cannot be mixed or do not fit the model, or a model that is wrapped already.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a PeftModel already; add an adapter by model.add_adapter, or call accelerate(model)"
        )
    config = prepare(model, configs, adapter_name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    try:
        return accelerate(wrapped, strict=strict, logit_free=logit_free)
    except ContractError:
        wrapped.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


def accelerate(model: Model, strict: bool = False, logit_free: bool = True) -> Model:
    """Fuse the LoRA layers, gated MLPs and frozen norms a model has, and those of adapters added to it later.

    Calling it again is harmless and picks up what is new. ``restore`` undoes it. On a GPU the first forward of a gated MLP puts
    the frozen weights of gate and up one above the other in one buffer, without changing a bit of them.

    Args:
        model: A ``PeftModel``, or a transformers model after ``add_adapter``; changed in place.
        strict: Raise where an adapter layer cannot be fused, instead of running PEFT's own forward there.
        logit_free: Compute the training loss of a causal language model without forming its logits.

    Returns:
        ``model``.

    Raises:
        ContractError: ``strict`` and an adapter layer is not fused; the model is left as it was.
    """
    warn_if_newer_than_tested()
    if strict:
        _require_all_fusable(model)
    _fuse(model)
    for owner, method in _injectors(model):
        owner.__dict__.setdefault(method, _FuseAfter(owner, method, model))
    if logit_free:
        install_logit_free(model)
    else:
        remove_logit_free(model)
    return model


def restore(model: Model) -> Model:
    """Undo ``accelerate``: every module has the class and attributes it had before. Weights stay where they lie.

    Args:
        model: What was passed to ``accelerate`` or came from ``wrap``; changed in place.

    Returns:
        ``model``.
    """
    remove_logit_free(model)
    for owner, method in _injectors(model):
        owner.__dict__.pop(method, None)
    for module in model.modules():
        restore_layer(module)
        for mixin in (FusedGatedMLP, FusedNorm, FusedAttention):
            if isinstance(module, mixin):
                swap_out(module, mixin)
    return model


class _FuseAfter:
    """Stands in for a method that injects adapters: runs it, then fuses what it brought."""

    def __init__(self, owner: nn.Module, method: str, model: nn.Module):
        self.owner, self.method, self.model = owner, method, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)
        _fuse(self.model)
        return result


def _injectors(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The objects and methods through which PEFT or transformers inject adapters into this model."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel):
        return [(model.base_model, "inject_adapter")]
    return [(model, "add_adapter")] if isinstance(model, PreTrainedModel) else []


def _fuse(model: nn.Module) -> None:
    for module in model.modules():
        fuse_layer(module)
    group_shared_inputs(model)
    fuse_gated_mlps(model)
    fuse_norms(model)
    fuse_attention(model)


def _require_all_fusable(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    # a layer that the active adapter does not reach only runs its base layer
    reasons = {
        name: obstacle(module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not is_own_adapter(module)
        and set(module.active_adapters).intersection(
            getattr(module, "lora_A", module.active_adapters)
        )
    }
    unfused = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if unfused:
        shown = "\n  ".join(unfused[:8])
        raise ContractError(
            f"strict=True, and {len(unfused)} of {len(reasons)} adapter layers cannot be fused:\n  {shown}\n"
            "pass strict=False to run PEFT's own forward there"
        )
