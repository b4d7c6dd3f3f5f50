"""Strategies that train more of the model as training goes on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftkit.errors import ContractError
from peftkit.finetune.blocks import Places
from peftkit.finetune.schema import key
from peftkit.finetune.strategies.base import HEAD_LR, AdapterSetting, Prepared, Strategy, train_all


@dataclass
class GradualOptions:
    """How fast blocks are unfrozen. ``null`` divides the steps evenly."""

    blocks_per_stage: int = key(1, "Blocks that are unfrozen together", least=1)
    stage_steps: int | None = key(
        None, "Steps of a stage. null: all stages are equally long", least=1
    )


class Gradual(Strategy):
    """Unfreeze the head, then one block after the other from the last to the first, then the embeddings.

    Source: Howard and Ruder, 2018, arXiv:1801.06146, section 3.3.
    """

    name = "gradual"
    summary = (
        "the head and the last block first, then one block more in each stage, the embeddings last"
    )
    Options = GradualOptions

    @classmethod
    def apply(cls, model: nn.Module, options: GradualOptions, setting: AdapterSetting) -> Prepared:
        names = train_all(model)
        places = Places(model)
        if not places.stacks:
            raise ContractError(
                f"strategy gradual needs a model with a list of equal blocks, and {type(model).__name__} has none; use full, or "
                "partial with strategy.pattern"
            )
        levels = {name: places.level(name) for name in names}

        def stages(total_steps: int, epoch_steps: int) -> list[tuple[int, set[str]]]:
            lowest = [*range(places.depth, 0, -options.blocks_per_stage), 0]
            length = options.stage_steps or max(1, total_steps // len(lowest))
            needed = length * (len(lowest) - 1)
            if needed >= total_steps:
                raise ContractError(
                    f"strategy gradual has {len(lowest)} stages of {length} steps, but training has {total_steps} steps, so some "
                    "weights would never be trained; use a smaller strategy.stage_steps, more strategy.blocks_per_stage or more steps"
                )
            return [
                (index * length, {name for name, level in levels.items() if level >= low})
                for index, low in enumerate(lowest)
            ]

        return Prepared(model, stages)


@dataclass
class ProbeOptions:
    """The length of the first phase."""

    probe_share: float = key(
        0.3, "Share of the steps in which only the head is trained", above=0, below=1
    )
    probe_steps: int | None = key(None, "The same as a number of steps", least=1)


class ProbeThenTune(Strategy):
    """Train the head alone, then every weight, so that a random head does not spoil the features.

    Source: Kumar et al., 2022, arXiv:2202.10054.
    """

    name = "probe_then_tune"
    summary = "the head alone first (linear probe), then every weight"
    Options = ProbeOptions
    head_lr = HEAD_LR

    @classmethod
    def apply(cls, model: nn.Module, options: ProbeOptions, setting: AdapterSetting) -> Prepared:
        names = train_all(model)
        places = Places(model)
        heads = {name for name in names if places.is_head(name)}
        if not heads:
            raise ContractError(
                f"strategy probe_then_tune needs a task head, and {type(model).__name__} has none; use it with a classification task, or "
                "use strategy full"
            )

        def stages(total_steps: int, epoch_steps: int) -> list[tuple[int, set[str]]]:
            first = options.probe_steps or max(1, round(options.probe_share * total_steps))
            if first >= total_steps:
                raise ContractError(
                    f"the linear probe takes {first} steps, but training has {total_steps}, so the rest would never be trained; use a "
                    "smaller strategy.probe_share or strategy.probe_steps"
                )
            return [(0, heads), (first, names)]

        return Prepared(model, stages)


def trained_at(stages: list[tuple[int, set[str]]], step: int) -> set[str]:
    """The names of the parameters that a step trains; ``step`` counts from 0."""
    return [names for first, names in stages if first <= step][-1]
