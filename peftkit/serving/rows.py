"""What a report on a served adapter consists of: rules, rows, and the facts that rules are applied to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["loads", "no effect", "ignored", "wrong", "refused", "unknown"]

MERGE = "merge the adapter into the model (PEFT's merge_and_unload) and serve the merged model"
UNIFORM = "write it with one rank and one scale: peftkit convert ADAPTER OUT --uniform"
NAMES = "write the keys as PEFT does: peftkit convert ADAPTER OUT"
PER_EXPERT = "write one pair for each expert: peftkit convert ADAPTER OUT --experts per-expert"
STACKED = "write stacked experts: peftkit convert ADAPTER OUT --experts stacked"
RETRAIN = "train again without it"

_KEY = re.compile(
    r"^(?P<prefix>base_model\.model\.)?(?P<module>.+?)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
    r"(?:\.(?P<rest>.+))?$"
)
_EXPERT = re.compile(r"\.experts\.\d+\.")
_STACK = re.compile(r"\.experts(\.base_layer)?$")
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
TOWER = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|audio_tower|audio_encoder|multi_modal_projector|mm_projector|"
    r"embed_vision|embed_audio)\."
)
"""Parts of a multimodal model other than its language model."""


@dataclass(frozen=True)
class FieldRule:
    """What a server does with one field of ``adapter_config.json``.

    Attributes:
        field: Name of the field.
        harmless: Values with which the adapter is a plain LoRA.
        verdict: What happens with any other value: the server raises an error (``refused``), or serves other outputs
            (``wrong``).
        why: The end of a sentence that starts with the server's name.
        way_out: What the user can do.
    """

    field: str
    harmless: tuple[Any, ...]
    verdict: Verdict
    why: str
    way_out: str


@dataclass(frozen=True)
class Server:
    """A server, and the release from whose source code the rules were read.

    Attributes:
        name: Name for messages.
        version: Release and commit.
        source: Files with the rules.
        fields: Rules for the config.
    """

    name: str
    version: str
    source: str
    fields: tuple[FieldRule, ...]


@dataclass(frozen=True)
class Row:
    """What a server does with one tensor, or with one field of the config.

    Attributes:
        subject: The tensor's key, or the field of ``adapter_config.json``.
        verdict: ``loads``; ``no effect`` (loads, but ``lora_B`` is zero); ``ignored`` (not used, without an error); ``wrong``
            (loads, but the outputs differ from training); ``refused`` (the server raises an error); ``unknown`` (depends on
            the base model).
        why: The reason, if the verdict is not ``loads``.
        way_out: What to do, if the verdict is not ``loads``.
    """

    subject: str
    verdict: Verdict
    why: str = ""
    way_out: str = ""


@dataclass(frozen=True)
class Key:
    """The parts of a tensor's name.

    Attributes:
        name: The whole name.
        module: The module's name without PEFT's prefix, or the whole name if this is not a tensor of LoRA.
        role: ``lora_A``, ``lora_B``, ``lora_embedding_A``, ``lora_embedding_B``, or "" for other tensors.
        rest: What follows the role: ``weight`` or "" as PEFT writes it.
        has_prefix: Whether the name starts with ``base_model.model.``.
    """

    name: str
    module: str
    role: str
    rest: str
    has_prefix: bool

    @classmethod
    def parse(cls, name: str) -> Key:
        """Split a tensor's name."""
        found = _KEY.match(name)
        if found is None:
            plain = name.removeprefix("base_model.model.")
            return cls(name, plain, "", "", plain != name)
        parts = found.groupdict(default="")
        return cls(name, parts["module"], parts["role"], parts["rest"], bool(parts["prefix"]))

    @property
    def leaf(self) -> str:
        """The last part of the module's name."""
        return self.module.rpartition(".")[2]

    @property
    def as_peft_writes(self) -> bool:
        """Whether the part after the module is what PEFT writes."""
        return self.role != "" and self.rest == ("" if "embedding" in self.role else "weight")

    @property
    def has_adapter_name(self) -> bool:
        """Whether the adapter's name is part of the key, as in a model's own state dict."""
        return self.role != "" and not self.as_peft_writes and self.rest.endswith(("weight", ""))

    @property
    def is_wrapped(self) -> bool:
        """Whether the name has parts that torch.compile, DDP, FSDP or checkpointing add."""
        return bool(_WRAPPERS.search(self.module))

    @property
    def is_one_expert(self) -> bool:
        """Whether it belongs to one expert of a mixture, as in checkpoints with one linear layer for each expert."""
        return bool(_EXPERT.search(self.module))

    @property
    def is_stack(self) -> bool:
        """Whether it belongs to stacked experts, as PEFT's ``target_parameters`` writes them."""
        return bool(_STACK.search(self.module))


@dataclass(frozen=True)
class Base:
    """What the rules need to know of a base model.

    Attributes:
        architectures: Names of its classes, from its config.
        model_type: Its model type.
        vocab_size: Rows of its embedding.
        tied: Whether its output embedding is its input embedding.
        modules: Names of its modules.
    """

    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int | None
    tied: bool
    modules: frozenset[str]


@dataclass(frozen=True)
class Adapter:
    """An adapter, as the rules see it.

    Attributes:
        config: Content of ``adapter_config.json``.
        shapes: Shapes of the tensors, by key.
        zero: Keys of the tensors that are all zero.
        base: The base model, or ``None`` if it was not given.
        added_tokens: Highest id in ``added_tokens.json`` next to the adapter, or ``None``.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    zero: frozenset[str]
    base: Base | None = None
    added_tokens: int | None = None
    keys: tuple[Key, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "keys", tuple(Key.parse(name) for name in self.shapes))

    @property
    def is_peft_lora(self) -> bool:
        """Whether PEFT's LoRA wrote it."""
        return self.config.get("peft_type") == "LORA"

    def ranks(self) -> dict[str, int]:
        """The rank of each adapted module. Stacked experts have the rank of one expert."""
        found = {}
        for key in self.keys:
            if key.role in ("lora_A", "lora_embedding_A") and self.shapes[key.name]:
                rank = self.shapes[key.name][0]
                found[key.module] = module_rank(self.config, key.module) if key.is_stack else rank
        return found


def module_rank(config: dict[str, Any], module: str) -> int:
    """The rank that the config gives to a module: ``rank_pattern`` as PEFT matches it, else ``r``."""
    return pattern_value(
        config.get("rank_pattern"), parameter_name(config, module), config.get("r")
    )


def module_scale(config: dict[str, Any], module: str) -> float:
    """PEFT's ``scaling`` of a module: alpha over the rank, or over its root with rsLoRA."""
    rank = module_rank(config, module)
    alpha = pattern_value(
        config.get("alpha_pattern"), parameter_name(config, module), config["lora_alpha"]
    )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def pattern_value(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name after a dot, as PEFT's ``get_pattern_key`` does."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def parameter_name(config: dict[str, Any], module: str) -> str:
    """The name that patterns are compared with: for stacked experts the parameter's, for other modules the module's.

    PEFT wraps the parameters of a module one inside the other, ``gate_up_proj`` inside ``down_proj``. The outer wrapper's keys
    have the module's own name and the inner one's end in ``base_layer``. With one adapted parameter there is one wrapper.
    """
    if not _STACK.search(module):
        return module
    container = module.removesuffix(".base_layer")
    leaves = stacked_parameters(config)
    if module != container:
        return f"{container}.{leaves[0]}"
    return f"{container}.{leaves[-1]}"


def stacked_parameters(config: dict[str, Any]) -> list[str]:
    """The adapted parameters of a stack of experts, the innermost first."""
    named = [str(name).rpartition(".")[2] for name in config.get("target_parameters") or ()]
    order = ("gate_up_proj", "up_proj", "down_proj")
    found = [name for name in order if name in named]
    return found or ["gate_up_proj", "down_proj"]


def is_saved_embedding(key: Key) -> bool:
    """Whether it is an embedding that PEFT saves next to the factors that adapt it."""
    return key.name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))


def saved_embedding_row(key: Key, adapter: Adapter, server: str) -> Row:
    """The row of a saved embedding, for servers that skip it: harmless if it is the base model's own."""
    rows, base = adapter.shapes[key.name][0], adapter.base
    if base is None:
        why = f"{server} skips it, which is right only if it is the base model's embedding"
        return Row(key.name, "unknown", why, "pass the base model (--base)")
    if base.vocab_size == rows:
        return Row(key.name, "no effect", f"{server} skips it; the base model has it")
    why = f"{server} skips it, but it has {rows} rows and the base model's embedding {base.vocab_size}: tokens were added"
    return Row(key.name, "ignored", why, MERGE)
