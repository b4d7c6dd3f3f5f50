"""Methods by name, and a recipe of ``peftkit train`` with the settings of a plan."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.planning.models import FULL
from peftkit.planning.optimizers import TRAINER_NAMES
from peftkit.planning.result import MemoryPlan

METHODS = ("lora", "dora", FULL, "bottleneck", "prefix")


def configs_of(method: str, rank: int) -> list[Any]:
    """The configs of a method.

    Args:
        method: One of ``METHODS``.
        rank: Rank of LoRA and DoRA, size of a bottleneck, or number of virtual tokens.

    Raises:
        ContractError: The method is unknown, or ``rank`` is no positive number.
    """
    if method not in METHODS:
        raise ContractError(f"method={short(method)} is unknown; use one of {', '.join(METHODS)}")
    if method == FULL:
        return [FULL]
    if not isinstance(rank, int) or rank < 1:
        raise ContractError(f"rank={short(rank)} must be a whole number of at least 1")
    from peft import LoraConfig

    from peftkit.bridge import BottleneckConfig, PrefixConfig

    if method == "bottleneck":
        return [BottleneckConfig(bottleneck_size=rank)]
    if method == "prefix":
        return [PrefixConfig(num_virtual_tokens=rank)]
    return [LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=method == "dora")]


def recipe(plan: MemoryPlan) -> dict[str, Any]:
    """The settings of a plan as keys of a recipe of ``peftkit train``; ``task``, ``data`` and ``out`` are not among them.

    Args:
        plan: A plan whose ``settings`` have ``method``, a name of ``METHODS``, and ``rank``.
    """
    settings = plan.settings
    name, rank = settings["method"], settings["rank"]
    lora = {"name": "lora", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    strategies: dict[str, dict[str, Any]] = {
        "lora": lora,
        "dora": lora | {"use_dora": True},
        "bottleneck": {"name": name, "bottleneck_size": rank},
        "prefix": {"name": name, "num_virtual_tokens": rank},
        FULL: {"name": "full"},
    }
    return {
        "model": settings["model"],
        "base": settings["base"],
        "strategy": strategies[name],
        "training": {
            "batch_size": settings["batch_size"],
            "seq_len": settings["seq_len"],
            "gradient_checkpointing": settings["checkpointing"],
            "optimizer": TRAINER_NAMES[settings["optimizer"]],
        },
    }


def write_recipe(plan: MemoryPlan, path: str | os.PathLike[str]) -> None:
    """Write ``recipe(plan)`` as YAML, in one step, with the command that completes it.

    Raises:
        OSError: The file cannot be written.
    """
    import yaml  # transformers needs it too

    path = Path(path)
    command = f"peftkit train {path} task=sft data.train=rows.jsonl out=runs/first"
    text = f"# From peftkit plan. The task, the rows and a folder are still to be named. For chats and instructions:\n#   {command}\n"
    text += "# Without task=..., peftkit train names all tasks.\n"
    text += yaml.safe_dump(recipe(plan), sort_keys=False)
    file, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
