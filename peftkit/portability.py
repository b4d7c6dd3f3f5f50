"""Read what an adapter's folder contains, and check whether it loads in PEFT, in vLLM, and into a given base model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import InvalidVersion, Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from peftkit.errors import ContractError, count
from peftkit.interop.files import Checkpoint, read_checkpoint
from peftkit.loading import check_fits
from peftkit.peft_types import PeftkitType

Target = Literal["peft", "vllm"]
TARGETS: tuple[Target, ...] = ("peft", "vllm")

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for ``--max-lora-rank``. An adapter's rank can be any number up to this value (default: 16).

Source: https://docs.vllm.ai/en/latest/api/vllm/config/lora/ (MaxLoRARanks).
"""
VLLM_DEFAULT_RANK = 16
_VLLM_CONFIG = "https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/"
_VLLM_WEIGHTS = "https://docs.vllm.ai/en/latest/api/vllm/lora/utils/"
_VLLM_MODELS = "https://docs.vllm.ai/en/latest/models/supported_models/"
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

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as data for JSON: shapes are lists, and the folder is a string."""
        return {
            **vars(self),
            "folder": str(self.folder),
            "shapes": {key: list(shape) for key, shape in self.shapes.items()},
        }


@dataclass(frozen=True)
class Fit:
    """Whether an adapter loads in a library.

    Attributes:
        target: The library.
        problems: Why the adapter does not load, or would have other outputs. Empty if it loads.
        notes: What the user has to do or know.
    """

    target: Target
    problems: tuple[str, ...]
    notes: tuple[str, ...]


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
    )


def fit(facts: AdapterFacts, target: Target = "peft", base: str | None = None) -> Fit:
    """Check whether an adapter loads in ``target``, and into a base model if one is given.

    Args:
        facts: The result of ``inspect_adapter``.
        target: ``peft`` or ``vllm``.
        base: Folder or hub id of a base model. Only its config is read; the model is built without weights.

    Raises:
        ValueError: The target is unknown, or transformers does not know the config of ``base``.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown; use one of {', '.join(TARGETS)}")
    if facts.written_by == "AdapterHub":
        way_out = "import it with peftkit.import_adapter, and save the result"
        return Fit(
            target,
            (f"it is in AdapterHub's format, which {target} cannot read; {way_out}",),
            (),
        )
    problems, notes = (_peft if target == "peft" else _vllm)(facts)
    if base is not None and not problems:
        try:
            check_fits(_without_weights(base, facts), facts.folder)
        except ContractError as error:
            problems.append(str(error))
    if base is None:
        notes.append(
            "not compared with a base model; pass base (--base) to check whether every key exists in this model"
        )
    return Fit(target, tuple(problems), tuple(notes))


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


def _peft(facts: AdapterFacts) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    kind = facts.config["peft_type"]
    if kind in {own.value for own in PeftkitType}:
        notes.append(f"a program that loads it with PEFT needs this line first: {_BRIDGE}")
    elif kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        problems.append(f"peft_type={kind!r} is unknown to the installed PEFT; upgrade peft")
    written, here = _version(facts.config.get("peft_version")), _version(_installed())
    if written and here and written > here:
        notes.append(
            f"it was saved by PEFT {written}; the installed PEFT {here} ignores config fields that it does not know"
        )
    return problems, notes


def _vllm(facts: AdapterFacts) -> tuple[list[str], list[str]]:
    config = facts.config
    if config["peft_type"] != "LORA":
        why = f"vLLM loads only LoRA adapters, but this adapter is {config['peft_type']} ({_VLLM_CONFIG})"
        return [why], []
    problems, notes = [], []
    for field, harmless, what in (
        ("use_dora", (False, None), "does not yet support DoRA"),
        ("modules_to_save", (None, []), "only supports modules_to_save being None"),
        ("bias", ("none", None), "does not support trained biases"),
        ("lora_bias", (False, None), "does not support biases in LoRA layers"),
        ("layer_replication", (None, []), "does not repeat layers of the base model"),
        ("trainable_token_indices", (None, [], {}), "does not support trained tokens"),
        (
            "alora_invocation_tokens",
            (None, []),
            "does not read aLoRA's fields, and would apply the adapter to all tokens",
        ),
    ):
        if config.get(field) not in harmless:
            problems.append(f"{field}={config[field]!r}: vLLM {what} ({_VLLM_CONFIG})")
    for field in ("rank_pattern", "alpha_pattern"):
        if config.get(field):
            problems.append(
                f"{field} is set: vLLM scales every module by the config's lora_alpha and r, so the outputs of these modules "
                f"would differ ({_VLLM_CONFIG})"
            )
    rank = max(facts.sizes.get("rank", {config.get("r", 0): 1}))
    setting = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if setting is None:
        problems.append(
            f"rank {rank}: the largest value of vLLM's --max-lora-rank is {VLLM_RANKS[-1]}"
        )
    elif rank > VLLM_DEFAULT_RANK:
        notes.append(f"rank {rank}: start vLLM with --max-lora-rank {setting} or more")
    wide = [key for key, shape in facts.shapes.items() if "lora_" in key and len(shape) > 2]
    if wide:
        problems.append(
            f"{wide[0]} belongs to a convolution, but vLLM only adapts linear layers ({_VLLM_WEIGHTS})"
        )
    known = re.compile(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$")
    odd = [key for key in facts.shapes if not known.search(key)]
    if odd and not problems:
        problems.append(
            f"vLLM does not read {count(len(odd), 'key')}, such as {odd[0]} ({_VLLM_WEIGHTS})"
        )
    if any("lora_embedding_" in key for key in facts.shapes):
        notes.append("it adapts an embedding, which vLLM supports only for some models")
    if config.get("target_parameters"):
        notes.append("it adapts stacked experts, which vLLM supports only for some models")
    if config.get("trainable_token_indices") is None and "float32" in facts.dtypes:
        notes.append(
            "it is float32; vLLM casts it to --lora-dtype (default: the dtype of the base model)"
        )
    notes.append(
        f"vLLM's table of models shows whether it supports LoRA for the base model: {_VLLM_MODELS}"
    )
    return problems, notes


def _without_weights(base: str, facts: AdapterFacts) -> Any:
    """Build the base model on the meta device, with a head of the size that the adapter was trained with."""
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
