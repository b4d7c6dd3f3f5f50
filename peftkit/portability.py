"""Read what an adapter's folder contains, and what PEFT needs to load it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from peftkit.errors import ContractError
from peftkit.interop.files import Checkpoint, read_checkpoint
from peftkit.peft_types import PeftkitType

_BRIDGE = "import peftkit.bridge"
_ROLE = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l|bottleneck|virtual_tokens)(\.|$)"
)


@dataclass(frozen=True)
class AdapterFacts:
    """The content of an adapter's folder.

    Attributes:
        folder: The folder.
        written_by: ``PEFT`` (also for adapters saved by peftkit) or ``AdapterHub``.
        method: Name of the method, such as ``LORA``, ``DORA`` or ``PEFTKIT_MIX``.
        trained_on: The base model's name or path, or ``None`` if the config does not record it.
        shapes: Shapes of the tensors, by key.
        dtypes: Number of tensors by dtype.
        sizes: Number of occurrences of each size, by kind: ``rank``, ``bottleneck size``, ``virtual tokens``.
        modules: Number of adapted modules, by the last part of their names.
        parameters: Number of elements in all tensors.
        size_bytes: Size of the file with the tensors.
        config: Content of ``adapter_config.json``.
        zeros: Keys of the tensors that are all zero.
    """

    folder: Path
    written_by: str
    method: str
    trained_on: str | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, int]
    sizes: dict[str, dict[int, int]]
    modules: dict[str, int]
    parameters: int
    size_bytes: int
    config: dict[str, Any]
    zeros: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as data for JSON: shapes are lists, and the folder is a string."""
        return {
            **vars(self),
            "folder": str(self.folder),
            "shapes": {key: list(shape) for key, shape in self.shapes.items()},
        }


def inspect_adapter(path: str | Path) -> AdapterFacts:
    """Read an adapter's folder saved by PEFT, peftkit or AdapterHub.

    Args:
        path: The folder.

    Raises:
        ContractError: A file is missing or cannot be read, or a tensor is not finite.
    """
    checkpoint = read_checkpoint(path)
    config, tensors = checkpoint.config, checkpoint.tensors
    theirs = "peft_type" not in config and isinstance(config.get("config"), dict)
    if not theirs and "peft_type" not in config:
        raise ContractError(
            f"{path}/adapter_config.json has neither the field peft_type (PEFT) nor the field config (AdapterHub); pass a "
            "folder saved by PEFT, peftkit or AdapterHub"
        )
    method = (config["config"].get("architecture") or "bottleneck") if theirs else _method(config)
    return AdapterFacts(
        folder=checkpoint.folder,
        written_by="AdapterHub" if theirs else "PEFT",
        method=method,
        trained_on=config.get("base_model_name_or_path") or config.get("model_name"),
        shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()},
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        sizes=_sizes(checkpoint),
        modules=_modules(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        size_bytes=checkpoint.weights.stat().st_size,
        config=config,
        zeros=[key for key, tensor in tensors.items() if not tensor.any()],
    )


def _method(config: dict[str, Any]) -> str:
    return "DORA" if config.get("use_dora") else str(config["peft_type"])


def _sizes(checkpoint: Checkpoint) -> dict[str, dict[int, int]]:
    """Count the ranks, bottleneck sizes and virtual tokens of the tensors.

    If experts share one tensor, the rank is read from the config.
    """
    sizes: dict[str, Counter[int]] = {}
    stacked = checkpoint.config.get("target_parameters")
    for key, tensor in checkpoint.tensors.items():
        kind = None
        if re.search(r"\.lora_(A|embedding_A)(\.weight)?$", key):
            kind, size = "rank", checkpoint.config.get("r") if stacked else tensor.shape[0]
        elif re.search(r"\.(bottleneck\.adapters\.down|adapter_down\.\d)\.weight$", key):
            kind, size = "bottleneck size", tensor.shape[0]
            kind = kind if tensor.ndim == 2 else None  # the weight of a norm is a vector
        elif key.endswith(".virtual_tokens.adapters.key"):
            kind, size = "virtual tokens", tensor.shape[1]
        elif key == "prompt_embeddings":
            kind, size = "virtual tokens", tensor.shape[0]
        if kind is not None:
            sizes.setdefault(kind, Counter())[size] += 1
    return {kind: dict(sorted(counter.items())) for kind, counter in sizes.items()}


def _modules(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Count the adapted modules by the last part of their names."""
    places = {key[: match.start()] for key in tensors if (match := _ROLE.search(key))}
    return dict(sorted(Counter(place.rpartition(".")[2] for place in places).items()))


def problems_for_peft(config: dict[str, Any]) -> list[str]:
    """Why the installed PEFT cannot load an adapter with this config."""
    kind = config["peft_type"]
    own = {own.value for own in PeftkitType}
    if kind in own or kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        return []
    return [f"peft_type={kind!r} is unknown to the installed PEFT"]


def notes_for_peft(config: dict[str, Any]) -> list[str]:
    """What a user of PEFT has to know about an adapter with this config."""
    notes = []
    if config["peft_type"] in {own.value for own in PeftkitType}:
        notes.append(f"a program that loads it with PEFT needs this line first: {_BRIDGE}")
    written, here = _version(config.get("peft_version")), _version(_installed())
    if written and here and written > here:
        notes.append(
            f"it was saved by PEFT {written}; the installed PEFT {here} ignores config fields that it does not know"
        )
    return notes


def model_without_weights(base: str, facts: AdapterFacts) -> Any:
    """Build the base model on the meta device, with a head of the size that the adapter was trained with.

    Raises:
        ValueError: transformers does not know the config of ``base``.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base={base!r} is neither a folder with a config.json nor a model on the hub ({' '.join(str(error).split())[:200]})"
        ) from error
    head = [s for k, s in facts.shapes.items() if re.search(r"\.(score|classifier)\.weight$", k)]
    if head:
        config.num_labels = head[0][0]
    kinds = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }
    named = [getattr(transformers, name, None) for name in config.architectures or []]
    auto = kinds.get(facts.config.get("task_type"))
    with torch.device("meta"):
        if auto is not None:
            return auto.from_config(config)
        return (
            named[0](config) if named and named[0] else transformers.AutoModel.from_config(config)
        )


def _installed() -> str:
    from importlib.metadata import version

    return version("peft")


def _version(text: Any) -> Version | None:
    try:
        return Version(str(text))
    except InvalidVersion:
        return None
