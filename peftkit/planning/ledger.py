"""Follow which memory is in use: who allocated it, when, and how much was in use at every moment."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CALL = nn.Module._call_impl.__code__
_count_nodes = torch._C._autograd._get_sequence_nr  # pyright: ignore[reportAttributeAccessIssue]
_current_node = torch._C._current_autograd_node


@dataclass(eq=False, slots=True)
class Block:
    """The memory of one storage.

    Attributes:
        size: Bytes, as requested.
        phase: What ran when it was allocated.
        module: Name of the module that ran.
        label: What it holds, if that does not follow from the rest: ``"gradients"``, for example.
        until: What ran when it was freed; empty while it is in use.
    """

    size: int
    phase: str
    module: str
    label: str = ""
    until: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """An allocation, or its end.

    Attributes:
        block: The memory.
        change: Bytes: positive for an allocation.
        phase: What ran.
        module: Name of the module that ran.
        times: How often it happens in a real run, one after the other.
    """

    block: Block
    change: int
    phase: str
    module: str
    times: int = 1


class Ledger:
    """Records the allocations of a dry run.

    Attributes:
        events: In the order of time.
        phase: What runs now; written by the caller.
    """

    def __init__(self):
        self.events: list[Event] = []
        self.phase = ""
        self._blocks: dict[int, tuple[weakref.ref[Any], Block]] = {}
        self._names: dict[int, str] = {}
        self._of_node: dict[int, str] = {}
        self._last = self._here = ""
        self._times = 1

    def watch(self, out: Any, times: int = 1) -> None:
        """Record the storages of the result of an operation, which module runs, and how often the operation runs in a real run."""
        self._here, self._times = self._module(), times
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.block_of(value)
            elif isinstance(value, (tuple, list)):
                for item in value:
                    self.block_of(item)

    def block_of(self, tensor: Tensor) -> Block:
        """The memory of a tensor, which is recorded now if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._blocks.get(key)
        if known is None:
            block = Block(storage.nbytes(), self.phase, self._here)
            known = weakref.ref(storage, lambda _: self._free(key)), block
            self._blocks[key] = known
            self._add(block, block.size)
        return known[1]

    def blocks(self) -> list[Block]:
        """The memory in use now."""
        return [block for _, block in self._blocks.values()]

    def follow(self, model: nn.Module) -> None:
        """Name the modules of ``model`` in what is recorded from now on."""
        self._names = {id(module): name for name, module in model.named_modules()}

    def _module(self) -> str:
        """Name of the module that runs: in the forward by the Python stack, in the backward by the forward of the running node.

        Hooks would be simpler, but a module with hooks runs its own code instead of a fused one.
        """
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code is _CALL:
                name = self._names.get(id(frame.f_locals["self"]))
                if name is not None:
                    self._of_node[_count_nodes() - 1] = name
                    return name
            frame = frame.f_back
        node = _current_node()
        if node is not None:
            self._last = self._of_node.get(node._sequence_nr(), self._last)
            return self._last
        return ""

    def _free(self, key: int) -> None:
        _, block = self._blocks.pop(key)
        block.until = self.phase
        self._add(block, -block.size)

    def _add(self, block: Block, change: int) -> None:
        self.events.append(Event(block, change, self.phase, self._here, self._times))
