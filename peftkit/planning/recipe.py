"""Methods by name, and a file with the settings of a plan."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, short
from peftkit.planning.models import FULL
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
    """The settings of a plan whose ``settings`` have ``method``, a name of ``METHODS``, and ``rank``."""
    settings = plan.settings
    name, rank = settings["method"], settings["rank"]
    sizes: dict[str, Any] = {
        "bottleneck": {"bottleneck_size": rank},
        "prefix": {"num_virtual_tokens": rank},
        FULL: {},
    }
    method = sizes.get(name, {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"})
    return {
        "model": settings["model"],
        "base": settings["base"],
        "method": {"name": name, **method},
        **{key: settings[key] for key in ("batch_size", "seq_len", "checkpointing", "optimizer")},
    }


def write_recipe(plan: MemoryPlan, path: str | os.PathLike[str]) -> None:
    """Write ``recipe(plan)`` as YAML, in one step.

    Raises:
        OSError: The file cannot be written.
    """
    import yaml  # transformers needs it too

    path = Path(path)
    text = yaml.safe_dump(recipe(plan), sort_keys=False)
    file, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
