"""Import AdapterHub's bottleneck adapters: ``double_seq_bn`` (Houlsby), ``seq_bn`` (Pfeiffer) and ``par_bn`` (parallel).

Let h be the output of a sub-layer, r the residual stream that enters the sub-layer, LN the norm after the residual sum of a
post-norm model, and ``A(x) = scaling · up(act(down(x)))``. AdapterHub computes:

    Houlsby   LN(h + A(h) + r)             after attention and MLP
    Pfeiffer  LN(s + A(LN(s))), s = h + r  after the MLP; pre-norm models: s + A(s)
    parallel  LN(h + A(r) + r)             beside the MLP; in a pre-norm model, r is the value before the norm

Source: Poth et al., 2023, arXiv:2311.11077; the page "Bottleneck Adapters" of the library's documentation.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkit.bottleneck import BottleneckConfig
from peftkit.bottleneck.inject import CHILD
from peftkit.errors import ContractError, count, listing
from peftkit.find.modules import wrapped_modules
from peftkit.find.points import Point, find_points
from peftkit.interop.files import Checkpoint
from peftkit.wrapping import wrap

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class _Layout:
    """AdapterHub's module names in one architecture, relative to the layer. Each name is a regular expression."""

    attention: str = "attention_adapters"
    output: str = "output_adapters"
    norms_before_mlp: tuple[str, ...] = ()
    """Candidate names of the norm before the MLP. Its input is the residual stream that enters the MLP. The first name that the
    layer has is used. If no name fits, the input of the MLP itself is used."""

    since: str = ""
    """The first AdapterHub release whose base model has the same outputs as transformers' model. Empty if all releases do."""


_IN_THE_BLOCKS = _Layout("attention.output", "output")
_POST_NORM = _Layout()
_FINAL_NORM = _Layout(norms_before_mlp=("final_layer_norm",))
_CLIP = _Layout(norms_before_mlp=("layer_norm2",))
_DECODER = _Layout(norms_before_mlp=("post_attention_layernorm",), since="1.3.0")
_T5 = _Layout("layer.0", "layer.[12]", ("layer.2.layer_norm", "layer.1.layer_norm"))
_LAYOUTS = {
    "bert": _IN_THE_BLOCKS,
    "electra": _IN_THE_BLOCKS,
    "roberta": _IN_THE_BLOCKS,
    "xlm-roberta": _IN_THE_BLOCKS,
    "deberta-v2": _IN_THE_BLOCKS,
    "distilbert": _POST_NORM,
    "bart": _POST_NORM,
    "plbart": _POST_NORM,
    "mbart": _FINAL_NORM,
    "whisper": _FINAL_NORM,
    "clip_text_model": _CLIP,
    "clip_vision_model": _CLIP,
    "vit": _Layout(output="output.output_adapters", norms_before_mlp=("layernorm_after",)),
    "gpt2": _Layout(norms_before_mlp=("ln_2",)),
    "llama": _DECODER,
    "mistral": _DECODER,
    "t5": _T5,
    "mt5": _T5,
}
"""Supported model types. For each, the outputs of all three placements were compared with adapters 1.3.0."""

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "linear": "linear",
}
_LEGACY_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Configs without a version used these names differently."""

_LEGACY_KEYS = re.compile(r"\.(attention|layer)_text_(task|lang)_adapters\.")

_REQUIRED_VALUES: dict[str, tuple[Any, str]] = {
    "phm_layer": (False, "its projections are sums of Kronecker products (Compacter)"),
    "use_gating": (False, "its gate averages over the tokens of a sequence"),
    "inv_adapter": (None, "it has an invertible adapter on the embeddings"),
    "ln_after": (False, "it has an additional norm after the adapter"),
    "original_ln_after": (True, "it omits the model's norm and residual sum"),
    "cross_adapter": (False, "it has adapters after cross-attentions"),
}
_READ_FIELDS = {
    *("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before"),
    *("ln_before", "is_parallel", "scaling", "residual_before_ln", "leave_out", "architecture"),
}
_WITHOUT_EFFECT = re.compile(
    r"init_weights(_seed)?|dropout|stochastic_depth|adapter_residual_before_ln|inv_adapter_reduction_factor|"
    r".*phm.*|hypercomplex_nonlinearity"
)
"""Fields without effect on the outputs: initialisation, training, and details of features that ``_REQUIRED_VALUES`` excludes."""


def import_bottlenecks(model: Any, checkpoint: Checkpoint, adapter_name: str) -> PeftModel:
    """Add an AdapterHub adapter to a model. See ``import_adapter`` for the arguments and errors."""
    options = _options(checkpoint)
    layout = _layout(model, checkpoint)
    parts = _parts(checkpoint, layout)
    points = _points(model, options["placement"])
    targets: dict[str, dict[str, Tensor]] = {}
    sources: dict[str, str] = {}
    widths: dict[str, int] = {}
    names = {name for name, _, _ in wrapped_modules(model)}
    # AdapterHub numbers the decoder's layers after the encoder's
    index = {layer: i for i, layer in enumerate(dict.fromkeys(p.layer for p in points))}
    layers = _matched_layers(checkpoint, {layer for layer, _ in parts}, set(index))
    _check_complete(checkpoint, {(layers[layer], kind) for layer, kind in parts}, index)
    for (layer, kind), tensors in parts.items():
        if options["placement"] == "pfeiffer":
            kind = "end"
        point = next(p for p in points if (p.layer, p.kind) == (layers[layer], kind))
        targets[point.output], widths[point.output] = tensors, point.width
        if options["placement"] == "parallel":
            norms = [f"{point.layer}.{norm}" for norm in layout.norms_before_mlp]
            sources[point.output] = next((n for n in norms if n in names), point.source)
    options["bottleneck_size"] = _bottleneck_size(checkpoint, targets)
    config = BottleneckConfig(**options, target_modules=list(targets), sources=sources or None)
    renamed = {
        name: _renamed(f"{checkpoint.weights}: {name}", tensors, _shapes(widths[name], config))
        for name, tensors in targets.items()
    }
    imported = wrap(model, config, adapter_name=adapter_name)
    modules = {name: outer for name, outer, _ in wrapped_modules(imported)}
    with torch.no_grad():
        for name, tensors in renamed.items():
            site: Any = modules[name]._modules[CHILD]
            for parameter_name, parameter in site.adapters[adapter_name].named_parameters():
                parameter.copy_(tensors[parameter_name])
    _warn_about_unread_head(checkpoint)
    return imported


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    """Translate AdapterHub's config to fields of ``BottleneckConfig``, except the size and the target modules."""
    written = dict(checkpoint.config["config"])
    if written.pop("invertible_adapter", None):  # the name of the field in the first version
        written["inv_adapter"] = "nested"
    kind = written.get("architecture")
    if kind is not None:
        raise _refused(
            checkpoint, f"it is a {kind} adapter, and only bottleneck adapters can be imported"
        )
    for field, (needed, why) in _REQUIRED_VALUES.items():
        if written.get(field, needed) != needed:
            raise _refused(checkpoint, f"{field}={written[field]!r}: {why}")
    unknown = [
        field
        for field in written
        if field not in _READ_FIELDS | _REQUIRED_VALUES.keys()
        and not _WITHOUT_EFFECT.fullmatch(field)
    ]
    if unknown:
        raise _refused(checkpoint, f"its config has the unknown field {unknown[0]!r}")

    parallel, before = written.get("is_parallel", False), written.get("original_ln_before", False)
    attention, output = written.get("mh_adapter", False), written.get("output_adapter", False)
    if not (attention or output):
        raise _refused(
            checkpoint, "mh_adapter and output_adapter are both False, so it has no adapters"
        )
    if attention and (parallel or before):
        kind = "parallel adapters" if parallel else "adapters after the residual sum"
        raise _refused(checkpoint, f"mh_adapter=True: {kind} are only supported for the MLP")
    residual = written.get("residual_before_ln", True)
    if before and not parallel and residual is not True:
        raise _refused(checkpoint, f"residual_before_ln={residual!r}: only True is supported")
    scaling = written.get("scaling", 1.0)
    if scaling != "learned" and not isinstance(scaling, (int, float)):
        raise _refused(checkpoint, f"scaling={scaling!r}: only a number or 'learned' is supported")
    activation = str(written.get("non_linearity")).lower()
    if "version" not in checkpoint.config:
        activation = _LEGACY_ACTIVATIONS.get(activation, activation)
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise _refused(checkpoint, f"non_linearity={activation!r}: only {known} are supported")
    return {
        "placement": "parallel" if parallel else "pfeiffer" if before else "houlsby",
        "activation": _ACTIVATIONS[activation],
        "scaling": scaling,
        "layer_norm": bool(written.get("ln_before", False)),
    }


def _layout(model: Any, checkpoint: Checkpoint) -> _Layout:
    kind = model.config.model_type
    trained_on = checkpoint.config.get("model_type", kind)
    if trained_on != kind:
        name = checkpoint.config.get("model_name", "a model without a name")
        raise ContractError(
            f"{checkpoint.folder} was trained on {name!r}, a {trained_on} model, but this model is a {kind} model; load "
            f"{name!r} and import into that model"
        )
    if kind not in _LAYOUTS:
        raise _refused(
            checkpoint,
            f"{kind} models are not supported; supported model types are {', '.join(_LAYOUTS)}",
        )
    layout, release = _LAYOUTS[kind], str(checkpoint.config.get("version", ""))
    if layout.since and _numbers(release) < _numbers(layout.since):
        raise _refused(
            checkpoint,
            f"it was saved by {release or 'a release without a version'}; before release {layout.since}, AdapterHub's {kind} "
            "model has other outputs than transformers' model even without an adapter",
        )
    return layout


def _numbers(release: str) -> tuple[int, ...]:
    """Return the numbers in a version: ``"adapters.1.3.0"`` gives ``(1, 3, 0)``."""
    return tuple(int(part) for part in release.split(".") if part.isdigit())


def _parts(checkpoint: Checkpoint, layout: _Layout) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Return the tensors of each adapter, by the layer's name in the file and ``"attention"`` or ``"mlp"``."""
    name = checkpoint.config.get("name", "")
    parts: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    left_over = []
    for key, tensor in checkpoint.tensors.items():
        module, separator, role = _LEGACY_KEYS.sub(".adapters.", key).partition(
            f".adapters.{name}."
        )
        for kind, ending in (("attention", layout.attention), ("mlp", layout.output)):
            fit = re.fullmatch(rf"(.*)\.{ending}", module) if separator else None
            if fit:
                parts[fit[1], kind][role] = tensor
                break
        else:
            left_over.append(key)
    if left_over:
        raise _refused(
            checkpoint,
            f"{count(len(left_over), 'key')} outside the known adapters:\n{listing(left_over)}",
        )
    return parts


def _points(model: nn.Module, placement: str) -> list[Point]:
    kinds = {"houlsby": ("attention", "mlp"), "pfeiffer": ("end",), "parallel": ("mlp",)}
    return [point for point in find_points(model) if point.kind in kinds[placement]]


def _matched_layers(checkpoint: Checkpoint, written: set[str], own: set[str]) -> dict[str, str]:
    """Map each layer name in the file to the name of a layer of the model.

    A model with a head has one more prefix in its names. If transformers has renamed its only list of layers since, layers are
    matched by their numbers.
    """
    matched = {}
    for layer in written:
        fit = [
            name
            for name in own
            if name == layer or name.endswith(f".{layer}") or layer.endswith(f".{name}")
        ] or [name for name in own if name.rpartition(".")[2] == layer.rpartition(".")[2]]
        if len(fit) != 1:
            raise ContractError(
                f"{checkpoint.weights} has adapters for the layer {layer!r}, but the model has the layers\n"
                f"{listing(sorted(own))}\nload the model that the adapters were trained on"
            )
        matched[layer] = fit[0]
    return matched


def _check_complete(
    checkpoint: Checkpoint, places: set[tuple[str, str]], index: dict[str, int]
) -> None:
    """Raise unless the file has exactly the adapters that its config describes."""
    written = checkpoint.config["config"]
    fields = (("attention", "mh_adapter"), ("mlp", "output_adapter"))
    kinds = [kind for kind, field in fields if written.get(field)]
    left_out = written.get("leave_out") or []
    wanted = {(layer, kind) for layer in index for kind in kinds if index[layer] not in left_out}
    if odd := sorted(wanted ^ places):
        lines = [
            f"{layer}, {kind}: {'missing' if (layer, kind) in wanted else 'left over'}"
            for layer, kind in odd
        ]
        raise ContractError(
            f"{checkpoint.weights} does not have the adapters that its config describes:\n{listing(lines)}\n"
            "copy or save the file again"
        )


def _bottleneck_size(checkpoint: Checkpoint, targets: dict[str, dict[str, Tensor]]) -> int:
    sizes = {
        tensors["adapter_up.weight"].shape[-1]
        for tensors in targets.values()
        if "adapter_up.weight" in tensors
    }
    if len(sizes) != 1:
        raise _refused(
            checkpoint,
            f"its bottlenecks have different sizes ({', '.join(map(str, sorted(sizes)))}), but a BottleneckConfig has one size",
        )
    return sizes.pop()


def _renamed(
    where: str, tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Rename the tensors of one adapter to our parameter names.

    Raises:
        ContractError: The names or shapes are not those of ``wanted``.
    """
    down = 1 if "norm.weight" in wanted else 0
    names = {f"adapter_down.{down}": "down", "adapter_up": "up", "adapter_norm_before": "norm"}
    if down:  # AdapterHub stores the norm twice, under two names
        names["adapter_down.0"] = "norm"
    renamed = {}
    for role, tensor in tensors.items():
        module, _, leaf = role.rpartition(".")
        name = f"{names[module]}.{leaf}" if module in names else role
        renamed[name] = tensor.reshape(()) if name == "scaling" and tensor.numel() == 1 else tensor
    if odd := sorted(renamed.keys() ^ wanted.keys()):
        raise ContractError(f"{where}: these tensors are missing or left over:\n{listing(odd)}")
    for name, shape in wanted.items():
        if tuple(renamed[name].shape) != shape:
            raise ContractError(
                f"{where}: {name} has the shape {list(renamed[name].shape)} in the checkpoint and {list(shape)} in the model"
            )
    return renamed


def _shapes(width: int, config: BottleneckConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of one adapter."""
    size = config.bottleneck_size or 0
    shapes: dict[str, tuple[int, ...]] = {"down.weight": (size, width), "down.bias": (size,)}
    shapes |= {"up.weight": (width, size), "up.bias": (width,)}
    if config.layer_norm:
        shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return shapes | ({"scaling": ()} if config.scaling == "learned" else {})


def _warn_about_unread_head(checkpoint: Checkpoint) -> None:
    heads = [p.name for p in checkpoint.folder.glob("*head*") if p.suffix != ".json"]
    if heads:
        warnings.warn(
            f"{heads[0]} in {checkpoint.folder} is not loaded: the model keeps its own head",
            stacklevel=4,
        )


def _refused(checkpoint: Checkpoint, why: str) -> ContractError:
    return ContractError(
        f"{checkpoint.folder} cannot be imported exactly: {why}; use the adapters library for this adapter, or train a new one"
    )
