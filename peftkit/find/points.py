"""Find the boundaries of a transformer's sub-layers by one forward, for any architecture.

A bottleneck adapter needs the module whose output is that of the attention or the MLP, the module that gets the MLP's input,
and the end of the layer. Names differ between model families, but the order of calls does not. A layer is a list element that
calls an attention and other modules. The attention ends with the last linear that is called inside it, and the MLP with the
last linear that is called outside the attention. A mixture of experts has no linear modules; it ends with the block of experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftkit.find.modules import is_linear_like, wrapped_modules
from peftkit.find.repacking import without_repacking
from peftkit.find.stacks import for_a_forward

Kind = Literal["attention", "mlp", "end"]

PROBE_TOKENS = 8
_PROBE_SAMPLES = 3200
"""A fifth of a second at 16 kHz. Wav2Vec2's convolutions compute one position from 320 samples."""

_ANY_IMAGE = 64
"""Image size for convolutional networks, which accept any size. After five halvings, 2 pixels are left."""


@dataclass(frozen=True)
class Point:
    """One place where an adapter can act.

    Attributes:
        kind: ``"attention"`` (self- and cross-attention) and ``"mlp"`` are sub-layers, before dropout and the residual sum.
            ``"end"`` is the end of the layer.
        layer: Name of the layer.
        index: The layer's index in its list.
        output: Name of the module whose output (or first output) the adapter changes.
        source: Name of the module whose first argument is the sub-layer's input; for ``"end"`` the same as ``output``.
        width: Size of the last axis of the output.
        normed: Whether ``output`` is the last norm of a post-norm layer.
    """

    kind: Kind
    layer: str
    index: int
    output: str
    source: str
    width: int
    normed: bool = False


@dataclass(frozen=True)
class _Call:
    name: str
    start: int
    x: Tensor | None
    y: Tensor | None


def find_points(model: nn.Module, example: Mapping[str, Any] | None = None) -> list[Point]:
    """Find the attention, MLP and end of every layer, by one forward in evaluation mode without gradients.

    Args:
        model: A transformers model, with or without adapters. It is not changed.
        example: The inputs of the forward. Default: inputs made from the model's config.

    Returns:
        The points in the model's order, with the names that modules have without adapters.

    Raises:
        ValueError: The inputs cannot be made, or no layer with an attention was called.
    """
    parts = list(wrapped_modules(model))
    inner = {name: module for name, _, module in parts}
    calls = _calls(inner[""], {name: outer for name, outer, _ in parts}, example)
    points = []
    for layer in _layers(inner, calls):
        points += _points_of(layer, inner, calls)
    if not points:
        raise ValueError(
            f"no layer of {type(inner['']).__name__} calls an attention and then linear layers, so the modules to adapt cannot "
            "be found; name the modules in target_modules, or use LoRA"
        )
    return points


def probe_inputs(model: Any) -> dict[str, Tensor]:
    """Make small inputs for a transformers model: 8 tokens, 8 rows of a spectrogram, one image or a fifth of a second of sound.

    Returns:
        The inputs by name, with a batch size of 1.

    Raises:
        ValueError: The model has no config, or inputs of this kind cannot be made.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise ValueError(
            f"{type(model).__name__} is not a transformers model, so inputs for it cannot be made; pass them as example"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = torch.arange(PROBE_TOKENS)[None] % getattr(text, "vocab_size", PROBE_TOKENS)
    eos = getattr(text, "eos_token_id", None)
    if isinstance(eos, int) and eos < getattr(text, "vocab_size", 0):
        ids[:, -1] = (
            eos  # BART's classification heads read the output at the last end-of-sequence token
        )
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "pixel_values": lambda: _image(config),
        "input_values": lambda: _sound(config),
        "input_features": lambda: torch.zeros(
            1, config.num_mel_bins, 2 * config.max_source_positions
        ),
    }
    wanted = [main]
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        wanted = ["input_ids", "pixel_values"]
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        raise ValueError(
            f"{type(model).__name__} needs {unknown[0]}, which cannot be made automatically; pass inputs as example"
        )
    inputs = {name: makers[name]() for name in wanted}
    arguments = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in arguments:
        inputs["decoder_input_ids"] = ids
    elif "decoder_input_values" in arguments:  # spectrograms, as in SpeechT5
        inputs["decoder_input_values"] = torch.zeros(1, PROBE_TOKENS, config.num_mel_bins)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    device, dtype = parameters[0].device, getattr(model, "dtype", parameters[0].dtype)
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def _sound(config: Any) -> Tensor:
    """Samples, or the spectrogram of a size that the config says, as for AST."""
    if hasattr(config, "frequency_stride"):
        return torch.zeros(1, config.max_length, config.num_mel_bins)
    return torch.linspace(-1, 1, _PROBE_SAMPLES)[None]


def has_image_size(config: Any) -> bool:
    """Whether the config of a model, or of its part for images, says how large images are."""
    return getattr(_of_images(config), "image_size", None) is not None


def _of_images(config: Any) -> Any:
    """The config of the part for images, or of the whole model."""
    parts = (getattr(config, name, None) for name in ("vision_config", "encoder"))
    return next((part for part in parts if hasattr(part, "model_type")), config)


def _image(config: Any) -> Tensor:
    own = _of_images(config)
    size = getattr(own, "image_size", None) or _ANY_IMAGE
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return torch.zeros(1, getattr(own, "num_channels", 3), *sides)


def _calls(
    model: nn.Module, outer: dict[str, nn.Module], example: Mapping[str, Any] | None
) -> dict[str, _Call]:
    """Record the last call of every module: its start time, its first tensor argument and its first output.

    Returns:
        The calls by module name, in the order of completion.
    """
    began: dict[str, tuple[int, Tensor | None]] = {}
    calls: dict[str, _Call] = {}
    clock = 0

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal clock
            clock += 1
            began[name] = clock, first_tensor((*args, *kwargs.values()))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls.pop(name, None)
            calls[name] = _Call(name, *began[name], first_tensor(output))

        return hook

    handles = []
    for name, module in outer.items():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with for_a_forward(model), evaluating(model), torch.no_grad():
            model(**(probe_inputs(model) if example is None else example))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def first_tensor(value: Any) -> Tensor | None:
    """Return the value if it is a tensor, or the first tensor of several values."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and value:
        return next((item for item in value if isinstance(item, Tensor)), None)
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and restore the mode of each module at the end. bitsandbytes repacks no weight meanwhile."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with without_repacking(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _layers(inner: dict[str, nn.Module], calls: dict[str, _Call]) -> list[str]:
    """Return the innermost list elements that call an attention and an MLP."""
    found = []
    for name in inner:
        parent = inner.get(name.rpartition(".")[0])
        if name not in calls or not isinstance(parent, (nn.ModuleList, nn.Sequential)):
            continue
        if _attentions(name, inner, calls) and (
            _mlp_linears(name, inner, calls) or _experts(name, inner, calls)
        ):
            found.append(name)
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _attentions(layer: str, inner: dict[str, nn.Module], calls: dict[str, _Call]) -> list[str]:
    """Return the outermost attention modules of a layer that were called."""
    named = [
        name
        for name in inner
        if name.startswith(f"{layer}.")
        and name in calls
        and any(word in type(inner[name]).__name__ for word in ("Attention", "Attn"))
    ]
    return [name for name in named if not any(name.startswith(f"{other}.") for other in named)]


def _mlp_linears(layer: str, inner: dict[str, nn.Module], calls: dict[str, _Call]) -> list[str]:
    """Return the linear layers outside the attention, in the order of completion."""
    attentions = tuple(f"{name}." for name in _attentions(layer, inner, calls))
    return [
        name
        for name in calls
        if name.startswith(f"{layer}.")
        and not name.startswith(attentions)
        and is_linear_like(inner[name])
    ]


def _experts(layer: str, inner: dict[str, nn.Module], calls: dict[str, _Call]) -> str | None:
    """Return the module with the experts if the layer has a mixture of experts, else None."""
    attentions = tuple(f"{name}." for name in _attentions(layer, inner, calls))
    for name in inner:
        parent, _, leaf = name.rpartition(".")
        inside = parent.startswith(f"{layer}.") and not name.startswith(attentions)
        is_experts = leaf == "experts" or type(inner[name]).__name__.endswith("Experts")
        if inside and is_experts and parent in calls:
            return parent
    return None


def _points_of(layer: str, inner: dict[str, nn.Module], calls: dict[str, _Call]) -> list[Point]:
    end = calls[layer].y
    if end is None:
        raise ValueError(f"{layer} returns no tensor; name the modules in target_modules")
    width = end.shape[-1]
    index = int(next(part for part in reversed(layer.split(".")) if part.isdigit()))
    points = []
    for attention in _attentions(layer, inner, calls):
        inside = [n for n in calls if n.startswith(f"{attention}.") and is_linear_like(inner[n])]
        output = _of_width(inside, width, calls, f"the attention {attention}")
        points.append(Point("attention", layer, index, output, attention, width))
    block = _experts(layer, inner, calls)
    if block is not None:
        points.append(Point("mlp", layer, index, block, block, width))
    else:
        output, source = _mlp(layer, width, inner, calls)
        points.append(Point("mlp", layer, index, output, source, width))
    norm = next(
        (
            name
            for name in reversed(calls)
            if name.startswith(f"{layer}.")
            and "Norm" in type(inner[name]).__name__
            and calls[name].y is end
        ),
        None,
    )
    close = norm or layer
    points.append(Point("end", layer, index, close, close, width, normed=norm is not None))
    return points


def _mlp(
    layer: str, width: int, inner: dict[str, nn.Module], calls: dict[str, _Call]
) -> tuple[str, str]:
    """Return the modules with the MLP's output and input.

    This is the MLP's own module if its output equals that of the last linear (or its input that of the first linear), else that
    linear.
    """
    linears = _mlp_linears(layer, inner, calls)
    last = _of_width(linears, width, calls, f"the MLP of {layer}")
    first = min(linears, key=lambda name: calls[name].start)
    block = _common_parent(first, last)
    if len(block) <= len(layer) or block not in calls:
        return last, first
    # in evaluation mode dropout is the identity, so it is searched for: adapters act before dropout
    drops = any(isinstance(module, nn.Dropout) for module in inner[block].modules())
    output = block if calls[block].y is calls[last].y and not drops else last
    source = block if calls[block].x is calls[first].x else first
    return output, source


def _of_width(names: list[str], width: int, calls: dict[str, _Call], what: str) -> str:
    """Return the last of these linear layers. Its output must have the width of the residual stream."""
    last = names[-1] if names else None
    y = calls[last].y if last else None
    if last is None or y is None or y.shape[-1] != width:
        raise ValueError(
            f"{what} does not end with a linear of {width} features (its last one is {last}), so its output cannot be "
            "found; name the modules in target_modules"
        )
    return last


def _common_parent(a: str, b: str) -> str:
    """Return the common parent of two names: ``("l.mlp.fc1", "l.mlp.fc2")`` gives ``"l.mlp"``."""
    shared = []
    for x, y in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)
