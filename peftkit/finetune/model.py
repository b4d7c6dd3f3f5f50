"""Load the tokenizer and the model that a recipe names: an id, a folder, or a GGUF file inside a folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from peftkit.errors import ContractError
from peftkit.find.repacking import forbid_repacking
from peftkit.finetune.processes import process_count
from peftkit.finetune.recipe import Recipe
from peftkit.finetune.tasks.base import Task


def place_of(model: str) -> tuple[str, str | None]:
    """The folder or id, and the name of the GGUF file or ``None``.

    Raises:
        ContractError: It looks like a path, but nothing is there.
    """
    path = Path(model)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ContractError(
                f"model={model!r} does not exist; correct the path of the GGUF file"
            )
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            files = sorted(file.name for file in path.iterdir())
            gguf = [name for name in files if name.endswith(".gguf")]
            way_out = (
                f"write model={path / gguf[0]}"
                if gguf
                else "name a folder that save_pretrained has written"
            )
            raise ContractError(f"model={model!r} has no config.json; {way_out}")
        return model, None
    if path.is_file():
        raise ContractError(
            f"model={model!r} is a file; name the folder with config.json, or a .gguf file"
        )
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise ContractError(f"model={model!r} does not exist; correct the path")
    return model, None


_PROCESSORS = {
    "tokenizer": ("AutoTokenizer", "tokenizer"),
    "image": ("AutoImageProcessor", "image processor"),
    "image and text": ("AutoProcessor", "processor of images and texts"),
    "audio": ("AutoFeatureExtractor", "feature extractor"),
    "speech": ("AutoProcessor", "processor of recordings and texts"),
    "speech and text": ("AutoProcessor", "processor of recordings and texts"),
}
"""For each kind of processor its Auto class and what it is called in messages."""


def load_processor(recipe: Recipe, kind: str) -> Any:
    """Load the tokenizer, the image processor, or the processor that contains both.

    Args:
        recipe: The recipe, with the model.
        kind: ``Task.processor``.

    Raises:
        ContractError: There is none, or its tokenizer is too slow a kind to say which token is where.
    """
    import transformers

    place, gguf = place_of(recipe.model)
    auto, what = _PROCESSORS[kind]
    options = {} if gguf is None else {"gguf_file": gguf}
    try:
        found = getattr(transformers, auto).from_pretrained(place, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ContractError(
            f"model={recipe.model!r} has no {what} that transformers can load: {_first_line(error)}"
        ) from error
    if kind in ("image", "audio"):
        return found
    tokenizer = found
    if kind in ("speech", "speech and text"):
        if not hasattr(found, "feature_extractor") or not hasattr(found, "tokenizer"):
            raise ContractError(
                f"model={recipe.model!r} has only a {type(found).__name__}, but speech needs a feature extractor and a tokenizer; save "
                "both with a processor such as Wav2Vec2Processor or WhisperProcessor"
            )
        return found
    if kind == "image and text":
        tokenizer = getattr(found, "tokenizer", None)
        if tokenizer is None or getattr(found, "image_processor", None) is None:
            raise ContractError(
                f"model={recipe.model!r} has no {what} (AutoProcessor gives {type(found).__name__}); use a model for images and texts"
            )
    _require_usable(tokenizer, recipe.model)
    return found


def _require_usable(tokenizer: Any, model: str) -> None:
    """Give a tokenizer a padding token and pad on the right, or raise ``ContractError``."""
    if not tokenizer.is_fast:
        raise ContractError(
            f"the tokenizer of {model!r} is a slow one, which does not say where its tokens are in the text; convert it to "
            "tokenizer.json first"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ContractError(
                f"the tokenizer of {model!r} has neither a padding nor an end-of-text token; set pad_token in its files"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"


def load_model(recipe: Recipe, task: Task, is_adapter: bool) -> nn.Module:
    """Load the model with the head of the task. Models that are trained themselves are loaded in float32.

    Raises:
        ContractError: It cannot be loaded; the message says why.
    """
    place, gguf = place_of(recipe.model)
    base = "fp32" if recipe.base == "auto" and not is_adapter else recipe.base
    arguments = task.model_arguments()
    with _quiet_loading(), _named_packages(recipe.model):
        if recipe.weights == "random":
            model = _random(place, gguf, task.auto_class, arguments)
        elif gguf is None:
            from peftkit.base import load_base

            if recipe.training.fsdp and process_count() > 1 and base not in ("int8", "nf4", "fp8"):
                # One GPU may be too small for the whole model.
                arguments["device"] = "cpu"
            model = load_base(place, base, auto_class=task.auto_class, **arguments)  # type: ignore[arg-type]
        else:
            model = _load_gguf(place, gguf, base, task.auto_class, arguments)
    forbid_repacking(model)
    _take_wider_inputs(model)
    pad_id = getattr(task.setting.tokenizer, "pad_token_id", None)
    if pad_id is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_id
    task.fit_model(model)
    return model


def _take_wider_inputs(model: nn.Module) -> None:
    """Let convolutions in 16 bits take images and recordings in float32, as autocast does. Some models cast them, such as ViT, but not all."""
    for module in model.modules():
        if isinstance(module, _ConvNd) and module.weight.dtype in (torch.bfloat16, torch.float16):
            module.register_forward_pre_hook(_cast_input)


def _cast_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = args
    return x.to(module.weight.dtype) if x.dtype is torch.float32 else x, *others


def _random(place: str, gguf: str | None, auto_class: str, arguments: dict[str, Any]) -> Any:
    """The architecture with new weights in float32."""
    import transformers

    options = {} if gguf is None else {"gguf_file": gguf}
    config = transformers.AutoConfig.from_pretrained(place, **options, **arguments)
    config.dtype = None
    try:
        model = getattr(transformers, auto_class).from_config(config)
    except ValueError as error:
        raise ContractError(
            f"{place} cannot be made with new weights: {_first_line(error)}"
        ) from error
    return model.float().to(_device())


def _load_gguf(place: str, file: str, base: str, auto_class: str, arguments: dict[str, Any]) -> Any:
    import transformers

    from peftkit.base import load_base
    from peftkit.base.gguf import forget_gguf
    from peftkit.base.kinds import DTYPES

    dtype = DTYPES.get(base, DTYPES["fp32"])
    try:
        model = getattr(transformers, auto_class).from_pretrained(
            place, gguf_file=file, dtype=dtype, **arguments
        )
    except ImportError as error:
        raise ContractError(
            f"model={file!r} needs the package gguf: pip install 'peftkit[gguf]'"
        ) from error
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{Path(place, file)} cannot be loaded: {_first_line(error)}"
        ) from error
    forget_gguf(model)
    if base in ("int8", "nf4", "fp8"):
        return load_base(model, base)  # type: ignore[arg-type]
    return model.to(_device())


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def longest_input(model: Any) -> int | None:
    """The largest number of tokens that a model's positions allow, or ``None`` if its config does not say."""
    config = model.config.get_text_config()
    names = (
        "max_position_embeddings",
        "n_positions",
        "max_sequence_length",
        "max_target_positions",
        "max_text_positions",
    )
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa's positions start behind the padding index.
            shifted = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
            return value - 2 if shifted else value
    return None


def with_decoder_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of an encoder-decoder with those of its decoder, which it makes from the labels, for a call without these.

    Args:
        model: The model, perhaps with an adapter.
        inputs: A batch. Of another model, or with inputs of the decoder, it is returned as it is.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels = inputs.get("labels")
    if labels is None or labels.ndim != 2 or "decoder_input_ids" in inputs:
        return inputs
    if not getattr(base.config, "is_encoder_decoder", False):
        return inputs
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        shifted = base.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = base.config.decoder_start_token_id
        shifted = shifted.masked_fill(shifted == -100, base.config.pad_token_id)
    return {**inputs, "decoder_input_ids": shifted}


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def _named_packages(model: str) -> Iterator[None]:
    """Turn the error about a package that a model needs, such as timm, into a ``ContractError``."""
    try:
        yield
    except ImportError as error:
        raise ContractError(
            f"model={model!r} needs a package that is not installed: {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' report that a new head is new: the strategy checks that it is trained."""
    loggers = [
        logging.getLogger("transformers.modeling_utils"),
        logging.getLogger("transformers.utils.loading_report"),
        # Names every layer as not sharded as soon as the level of the first one is set, however many processes there are.
        logging.getLogger("transformers.distributed.tensor_parallel"),
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
