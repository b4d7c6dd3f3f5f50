"""The facts about the machine and the versions that a report names."""

from __future__ import annotations

from datetime import datetime, timezone

from peftkit.environment import describe_environment
from peftkit.errors import count
from peftkit.machine import describe_machine


def machine_facts() -> dict[str, str]:
    """The device, the processor, its instruction sets, memory, versions and the date, by name, as text."""
    machine, found = describe_machine(), describe_environment()
    facts = {
        "device": found["device"],
        "processor": found["cpu"],
        "instruction sets": machine["instructions"],
        "cores and threads": f"{count(found['cores'], 'core')}, {count(found['torch_threads'], 'thread')}",
        "memory": _size(machine["memory_bytes"]),
        "memory limit": _size(machine["memory_limit_bytes"]),
        "GPU memory": _size(next((gpu["memory_bytes"] for gpu in machine["gpus"]), None)),
        "system": found["system"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **{name: found[name] for name in ("peftkit", "torch", "transformers", "peft", "python")},
    }
    return {name: str(value) for name, value in facts.items() if value}


def _size(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**30:.1f} GiB"
