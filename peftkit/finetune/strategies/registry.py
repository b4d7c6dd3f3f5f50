"""The registry of strategies."""

from __future__ import annotations

from peftkit.errors import ContractError
from peftkit.finetune.schema import nearest
from peftkit.finetune.strategies.adapters import (
    BottleneckAdapter,
    Lora,
    Mix,
    Prefix,
    other_method,
    other_names,
)
from peftkit.finetune.strategies.base import Strategy
from peftkit.finetune.strategies.staged import Gradual, ProbeThenTune
from peftkit.finetune.strategies.whole import Full, Partial

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (Lora, BottleneckAdapter, Prefix, Mix, Full, Partial, Gradual, ProbeThenTune)
}
ADAPTERS = ("lora", "bottleneck", "prefix", "mix")


def require_strategy(name: str) -> type[Strategy]:
    """Return a strategy by name.

    Raises:
        ContractError: There is none of this name.
    """
    found = STRATEGIES.get(name) or other_method(name)
    if found is None:
        known = [*STRATEGIES, *other_names()]
        raise ContractError(
            f"strategy={name!r} is unknown{nearest(name, known)}; use one of {', '.join(STRATEGIES)}, or a method of PEFT: "
            f"{', '.join(other_names())}"
        )
    return found


def strategy_names() -> list[str]:
    """The names of peftkit's strategies; PEFT's other methods can be named too."""
    return list(STRATEGIES)
