"""The files of a model's folder besides the weights: config, generation config, custom code, tokenizer and chat template."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
_MAIN_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def write_config(
    folder: Path,
    base: Any,
    architecture: type,
    dtype: torch.dtype,
    *,
    quantized: bool,
    untied: bool,
) -> None:
    """Write the config of a merged model, and the code of a model that is not part of transformers.

    Args:
        folder: The folder of the merged model.
        base: The transformers model; not changed.
        architecture: Its class.
        dtype: The dtype of the tensors that are not quantised.
        quantized: Keep the config of the quantisation.
        untied: The input and output embeddings were tied and have become different.
    """
    config = copy.deepcopy(base.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [architecture.__name__]
    for part in _parts(config):
        if untied and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
        if not quantized and hasattr(part, "quantization_config"):
            del part.quantization_config
    if base.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(base, folder, config=config)
    config.save_pretrained(folder)


def write_generation_config(folder: Path, base: Any) -> None:
    """Write the generation config of a model that generates."""
    if base.can_generate() and getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(folder)


def write_tokenizer(folder: Path, base: Any, tokenizer: Any) -> str:
    """Write the tokenizer, chat template and processors.

    Args:
        folder: The folder of the merged model.
        base: The transformers model. Its files are used if ``tokenizer`` is ``None``.
        tokenizer: An object with ``save_pretrained``, a folder with the files of one, or ``None``.

    Returns:
        Where the files are from, for the certificate.

    Raises:
        ValueError: ``tokenizer`` is neither, or the folder has no such files.
    """
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return f"{type(tokenizer).__name__} that was passed"
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}; pass a tokenizer, a processor, or a folder with their files"
        )
    source = Path(tokenizer) if tokenizer is not None else folder_of(base)
    if source is None or not has_tokenizer(source):
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer={str(tokenizer)!r} is not a folder with the files of a tokenizer"
            )
        return "none: the folder of the base model has none, or is not known; pass tokenizer="
    for name in _TOKENIZER_FILES:
        file = source / name
        if file.is_dir():
            shutil.copytree(file, folder / name)
        elif file.exists():
            shutil.copyfile(file, folder / name)
    return str(tokenizer) if tokenizer is not None else "the folder of the base model"


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has the files of a tokenizer or processor."""
    return any((Path(folder) / name).is_file() for name in _MAIN_FILES)


def folder_of(base: Any) -> Path | None:
    """The local folder from which the base model was loaded: a path, or the hub's cache."""
    name = getattr(base.config, "_name_or_path", "") or ""
    if name and Path(name).is_dir():
        return Path(name)
    if not name:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in _MAIN_FILES:
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:  # a folder that no longer exists
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _parts(config: Any) -> list[Any]:
    """A config and the configs inside it."""
    found = [config]
    for name in getattr(type(config), "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None:
            found += _parts(part)
    return found
