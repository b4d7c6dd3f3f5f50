"""The blocks of a model and where each parameter is between the embeddings and the head."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from peftkit.find.heads import find_heads
from peftkit.find.modules import base_modules

_BEFORE = re.compile(r"embed|stem|pre_?lay", re.IGNORECASE)
"""Names of modules before the blocks: embeddings, the first convolutions of image models, CLIP's first norm."""

_SMALL = 0.05
"""A list of modules with a smaller share of the parameters is no stack of blocks."""


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks, such as ``model.layers``.

    Attributes:
        name: Name of the list in the model without adapters.
        size: Number of blocks.
    """

    name: str
    size: int


def find_stacks(model: nn.Module) -> list[Stack]:
    """Find the stacks of blocks: the outermost ``ModuleList`` with most of the parameters. An encoder-decoder has two.

    Args:
        model: A model with or without adapters.
    """
    modules = dict(base_modules(model))
    total = sum(p.numel() for p in modules[""].parameters())
    stacks: list[Stack] = []
    for name, module in modules.items():
        inside = any(name.startswith(f"{stack.name}.") for stack in stacks)
        if not isinstance(module, nn.ModuleList) or inside or len(module) == 0:
            continue
        if isinstance(module, ParametrizationList):  # of a weight norm, as in Wav2Vec2
            continue
        if len({type(block) for block in module}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if size >= _SMALL * total:
                stacks.append(Stack(name, len(module)))
    return stacks


class Places:
    """Says where a parameter is: in the embeddings, in a block, after the blocks, or in a task head."""

    def __init__(self, model: nn.Module):
        heads = find_heads(model)
        self.heads = (*heads.names, *heads.out_of_reach)
        self._wrapped = hasattr(model, "peft_config")
        # The layers of a head with several of them, such as that of YOLOS, are no blocks.
        self.stacks = [stack for stack in find_stacks(model) if not self.is_head(stack.name)]
        self.depth = max((stack.size for stack in self.stacks), default=0)
        self._input = [
            name for name, module in base_modules(model) if isinstance(module, nn.Embedding)
        ]

    def own_name(self, name: str) -> str:
        """The name of a parameter without what PEFT adds to it."""
        if not self._wrapped:
            return name
        name = re.sub(r"^base_model\.model\.", "", name)
        return re.sub(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)", "", name)

    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to a task head."""
        own = self.own_name(name)
        return any(own == head or own.startswith(f"{head}.") for head in self.heads)

    def block(self, name: str) -> int | None:
        """The number of a parameter's block, counted so that the last block of each stack has the number ``depth - 1``."""
        own = self.own_name(name)
        for stack in self.stacks:
            if own.startswith(f"{stack.name}."):
                number = int(own[len(stack.name) + 1 :].partition(".")[0])
                return number + self.depth - stack.size
        return None

    def level(self, name: str) -> int:
        """0 for the embeddings, ``i + 1`` for block i, ``depth + 1`` for what follows the blocks."""
        block = self.block(name)
        if block is not None:
            return block + 1
        own = self.own_name(name)
        if self.is_head(name) or self._follows(own):
            return self.depth + 1
        return 0

    def _follows(self, own: str) -> bool:
        """Whether a parameter outside the blocks is not part of the embeddings."""
        if any(own.startswith(f"{name}.") for name in self._input):
            return False
        return not _BEFORE.search(own)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer."""
    return "Norm" in type(module).__name__
