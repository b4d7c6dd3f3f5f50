"""The main functions: ``wrap``, ``accelerate`` and ``restore``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from peftkit.base.gguf import forget_gguf
from peftkit.bridge import prepare
from peftkit.errors import ContractError, listing
from peftkit.find.repacking import allow_repacking, forbid_repacking
from peftkit.find.stacks import as_plain_parameters
from peftkit.find.ties import embeddings_answered, require_tied, tie_copies
from peftkit.fuse.attention import fuse_attention
from peftkit.fuse.convolution import ShowsSizes
from peftkit.fuse.int8_mode import Int8Mode, forget_int8_mode, set_int8_mode
from peftkit.fuse.layer import fuse_layers
from peftkit.fuse.linear import fuse_layer
from peftkit.fuse.loss import install_logit_free, remove_logit_free
from peftkit.fuse.merge_into import MergeInto, forget_merge_into, set_merge_into
from peftkit.fuse.mlp import fuse_gated_mlps
from peftkit.fuse.norm import fuse_norms
from peftkit.fuse.packed_experts import fuse_packed_experts
from peftkit.fuse.plan import Fused, NotReached, forget_declined
from peftkit.fuse.siblings import group_siblings
from peftkit.fuse.uneven_rows import DecodesAsStored, decode_as_stored
from peftkit.inits.wrapped import take_init
from peftkit.report import layer_reports
from peftkit.rollback import restoring, writes_base_weights
from peftkit.swap import swap_out, swapped_in
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
    int8_mode: Int8Mode | None = None,
    merge_into: MergeInto | None = None,
) -> PeftModel:
    """Put an adapter on a pretrained model and fuse what can be fused.

    Args:
        model: A pretrained transformers model, or any ``nn.Module`` that PEFT accepts.
        configs: One ``peft.PeftConfig``, or any two or three of ``LoraConfig``, ``PrefixConfig`` and ``BottleneckConfig`` as
            one adapter. Without a config, LoRA with r=16 and lora_alpha=32 on every linear layer of the backbone. A LoRA
            config without ``target_modules``, or with ``"all-linear"``, targets these layers too.
        adapter_name: Name of the adapter.
        strict: Raise an error if a layer cannot be fused, instead of running PEFT's own forward in this layer.
        logit_free: Compute the training loss of a causal language model without computing its logits.
        int8_mode: How bitsandbytes' 8-bit linears are multiplied, in training and evaluation: ``"compute"`` quantises the rows of the
            input and, in the backward, of the gradient, and multiplies in 8 bits; ``"weight-only"`` decodes the weight. ``None``
            does what bitsandbytes does on the device, or keeps what was chosen before.
        merge_into: Train for a merge into ``"nf4"`` or ``"int8"``: in training and evaluation every LoRA layer multiplies by the
            weight that bitsandbytes stores after the merge, ``Q(W + scaling · B A)``, and the gradients pass through Q unchanged.
            So a merge that rounds to the nearest values changes nothing. A quantised base keeps its storage; a dense one gets
            bitsandbytes' default (blocks of 64). ``None`` keeps what was chosen before.

    Returns:
        A genuine ``peft.PeftModel``.

    Raises:
        ContractError: An entry of ``target_modules`` matches nothing, ``strict`` is set and a layer is not fused, or
            ``int8_mode`` is unknown or the model has no 8-bit linear. ``merge_into`` is unknown, or an adapter does not fit it
            (dropout, DoRA, a bias of its own, another method, a base in another storage). The model is left unchanged.
            A start from the weights of a quantised base failed while weights were read; the message says what was changed.
        ValueError: The configs cannot be mixed or do not fit the model, or the model is wrapped already.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a PeftModel already; add an adapter with model.add_adapter, or call accelerate(model)"
        )
    config = prepare(model, configs, adapter_name)
    later = take_init(model, config)
    with restoring(model, copy_values=writes_base_weights(config)):
        with as_plain_parameters(model), embeddings_answered(model):
            wrapped = get_peft_model(model, config, adapter_name=adapter_name)
        fuse_model(wrapped, strict, logit_free, int8_mode, merge_into)
        if getattr(config, "ensure_weight_tying", False):
            require_tied(wrapped, adapter_name)
        start = None if later is None else later.checked(wrapped, adapter_name)
    if start is not None:
        # outside the block, which keeps the old weights until its end
        start.run()
    forget_gguf(model)
    return wrapped


def accelerate(
    model: Model,
    strict: bool = False,
    logit_free: bool = True,
    int8_mode: Int8Mode | None = None,
    merge_into: MergeInto | None = None,
) -> Model:
    """Fuse the LoRA layers, gated MLPs and frozen norms of a model, and the layers of adapters that are added later.

    A second call is harmless and fuses what is new. ``restore`` undoes ``accelerate``. So do ``merge_and_unload`` and ``unload`` for
    the base model that they return. On a GPU the first forward of a gated MLP moves the frozen gate and up weights into one buffer
    without changing their values.

    Args:
        model: A ``PeftModel``, or a transformers model after ``add_adapter``; changed in place.
        strict: Raise an error if something that peftkit can fuse would run its own code in training: an adapter layer, a gated
            MLP, siblings, a norm or an attention. Modules with an unknown formula do not count; ``explain`` lists them.
        logit_free: Compute the training loss of a causal language model without computing its logits.
        int8_mode: As in ``wrap``.
        merge_into: As in ``wrap``.

    Returns:
        ``model``.

    Raises:
        ContractError: ``strict`` is set and something is not fused, or ``int8_mode`` is unknown or the model has no 8-bit
            linear, or ``merge_into`` is unknown or an adapter does not fit it. The model is left unchanged.
    """
    with restoring(model):
        fuse_model(model, strict, logit_free, int8_mode, merge_into)
    return model


def fuse_model(
    model: nn.Module,
    strict: bool = False,
    logit_free: bool = True,
    int8_mode: Int8Mode | None = None,
    merge_into: MergeInto | None = None,
) -> None:
    """As ``accelerate``, but after an error the model may be partly fused, so the caller must restore it."""
    warn_if_newer_than_tested()
    set_int8_mode(model, int8_mode)
    tie_copies(model)
    decode_as_stored(model)
    _fuse(model)
    set_merge_into(model, merge_into)
    forbid_repacking(model)
    for owner, method, replacement in _replacements(model):
        owner.__dict__.setdefault(method, replacement)
    if logit_free:
        install_logit_free(model)
    else:
        remove_logit_free(model)
    if strict:
        _require_all_fused(model)


def restore(model: Model) -> Model:
    """Undo ``accelerate``: every module gets back the class and attributes it had before. Weights are not moved in memory.

    Args:
        model: The model that was passed to ``accelerate`` or returned by ``wrap``; changed in place.

    Returns:
        ``model``.
    """
    remove_logit_free(model)
    for owner, method, _ in _replacements(model):
        owner.__dict__.pop(method, None)
    for module in model.modules():
        for mixin in swapped_in(module):
            if issubclass(mixin, (Fused, ShowsSizes)) or mixin is DecodesAsStored:
                swap_out(module, mixin)
        forget_declined(module)
        forget_int8_mode(module)
        forget_merge_into(module)
        allow_repacking(module)
    return model


class _Followed:
    """Replaces a method on one object. It runs the method and then an action with the result."""

    def __init__(self, owner: nn.Module, method: str, action: Callable[[Any], None]):
        self.owner, self.method, self.action = owner, method, action

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.around():
            result = getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)
        self.action(result)
        return result

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around the method."""
        yield


class _Injecting(_Followed):
    """``_Followed`` for a method that creates layers of adapters."""

    @contextmanager
    def around(self) -> Iterator[None]:
        with as_plain_parameters(self.owner), embeddings_answered(self.owner):
            yield


class _FuseAgain:
    """The action after an adapter was injected: fuse its layers."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, injected: Any) -> None:
        tie_copies(self.model)
        _fuse(self.model)
        set_merge_into(self.model, None)


def _restore_unloaded(base: Any) -> None:
    """The action after the adapters were merged or removed: remove everything of peftkit from the base model."""
    if isinstance(base, nn.Module):
        restore(base)


class _ReplaceModule:
    """PEFT's ``_replace_module`` for methods other than LoRA, which gives every unloaded module the ``weight`` of its wrapper.

    A head that is trained in full can be a container without a weight.
    """

    def __init__(self, tuner: Any):
        self.tuner = tuner

    def __call__(self, parent: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
        from peft.utils.other import AuxiliaryTrainingWrapper

        if isinstance(old, AuxiliaryTrainingWrapper):
            setattr(parent, name, new)
        else:
            type(self.tuner)._replace_module(self.tuner, parent, name, new, old)


def _replacements(model: nn.Module) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
    """The methods with which PEFT or transformers change the adapters of this model: object, name, and what replaces the method."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        unload = "_unload_and_optionally_merge"
        found = [
            (tuner, "inject_adapter", _Injecting(tuner, "inject_adapter", _FuseAgain(model))),
            (tuner, unload, _Followed(tuner, unload, _restore_unloaded)),
        ]
        if hasattr(tuner, "_replace_module"):
            found.append((tuner, "_replace_module", _ReplaceModule(tuner)))
        return found
    if isinstance(model, PreTrainedModel):
        return [(model, "add_adapter", _Injecting(model, "add_adapter", _FuseAgain(model)))]
    return []


def _fuse(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            fuse_layer(module)
    fuse_packed_experts(model)
    group_siblings(model)
    fuse_gated_mlps(model)
    fuse_norms(model)
    fuse_attention(model)
    fuse_layers(model)


def _require_all_fused(model: nn.Module) -> None:
    """Raise ``ContractError`` if something that peftkit can fuse would run its own code in training."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = True
    try:
        rows = [
            row
            for row in layer_reports(model)
            if not (row.declined or isinstance(row.reason, NotReached))
        ]
    finally:
        for module, training in modes:
            module.training = training
    rows.sort(key=lambda row: not row.is_adapter)
    unfused = [f"{row.name} ({row.method}): {row.reason}" for row in rows if row.path == "peft"]
    if unfused:
        raise ContractError(
            f"strict=True, but {len(unfused)} of {len(rows)} layers and modules that peftkit can fuse would run their own code in "
            f"training:\n{listing(unfused, shown=8)}\nRemove the cause, or pass strict=False."
        )
