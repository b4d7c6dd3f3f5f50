"""One run in several processes, as torchrun starts them: one process writes, all agree, and an error of one ends all."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from peftkit.errors import ContractError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

_SECONDS = 0.5
"""Time between two looks at whether another process has failed."""

_GRACE_SECONDS = 3.0
"""Time for a process to end by itself, and to write down why, after another one has failed."""

_PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")

_runs = itertools.count()

_connected = False
"""Whether a run of this process is inside ``together``."""


def process_count() -> int:
    """The number of processes of the run: 1 unless a launcher such as torchrun has started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def process_index() -> int:
    """The number of this process among all of the run, from 0."""
    return int(os.environ.get("RANK", "0")) if "LOCAL_RANK" in os.environ else 0


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """Connect the processes of a run. If one fails, all end with a status other than 0, and only the first to fail raises its error.

    A part of a run, such as a stage, is already connected.

    Raises:
        ContractError: Another process was ended from outside.
        SystemExit: Another process has failed and reports its error.
    """
    global _connected
    if process_count() == 1 or _connected:
        yield
        return
    import torch

    _connect()
    _connected = True
    key = f"peftkit/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
    watch = _Watch(key)
    watch.start()
    try:
        yield
        torch.distributed.barrier()
    except BaseException as error:
        watch.end()
        if not watch.is_first_to_fail():
            raise SystemExit(1) from None
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_ENDED):
            raise ContractError(
                "another process of the run was ended from outside, for example for lack of memory; continue with resume=true"
            ) from error
        raise
    finally:
        _connected = False
    watch.end()


def on_main(work: Callable[[], Value]) -> Value:
    """Do something in the main process while the others wait, and return its result in all of them."""
    if process_count() == 1:
        return work()
    import torch

    found: list[Any] = [work() if is_main() else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def any_process(condition: bool) -> bool:
    """Whether a condition is true in at least one process."""
    if process_count() == 1:
        return condition
    import torch
    from accelerate import PartialState

    flag = torch.tensor(int(condition), device=PartialState().device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def from_all(value: Value) -> list[Value]:
    """The value of each process, in the order of the processes."""
    if process_count() == 1:
        return [value]
    import torch

    found: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(found, value)
    return found


def tensors_of_all(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all processes, which have equal shapes, in the order of the processes and without gradients."""
    import torch

    own = tensor.detach().contiguous()
    found = [torch.empty_like(own) for _ in range(process_count())]
    torch.distributed.all_gather(found, own)
    return found


def rows_in_last_batch() -> int | None:
    """How many rows the last batch of an evaluation has in all processes before it is filled up; ``None`` in any other batch."""
    if process_count() == 1:
        return None
    import torch
    from accelerate.state import GradientState

    state = GradientState()
    # The Trainer draws the batches of a training step ahead.
    if torch.is_grad_enabled() or not state.end_of_dataloader or state.remainder <= 0:
        return None
    return state.remainder


def own_rows_in_last_batch(rows: int) -> int | None:
    """How many of the ``rows`` of this process do not only fill up the last batch of an evaluation; ``None`` in any other batch."""
    found = rows_in_last_batch()
    return None if found is None else min(rows, max(0, found - process_index() * rows))


def mean_of_all(
    mean: torch.Tensor, items: torch.Tensor, divisor: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean over the items of all processes, from that of this process and how many items it has; the same in all processes.

    Its gradient is that of the part of this process, times the number of processes, over which the gradients of weights are averaged.

    Args:
        mean: The mean of this process. It does not count if there are no items.
        items: What its sum was divided by.
        divisor: What the sum of all is divided by. Default: the items of all.
    """
    import torch

    if process_count() == 1:
        return mean
    own = torch.stack([mean.detach().float(), items.float()])
    means, counts = torch.stack(tensors_of_all(own)).T
    whole = counts.sum() if divisor is None else divisor
    total = (means * counts)[counts > 0].sum() / whole
    part = mean * (items / (whole / process_count()))
    return total + (part - part.detach())


def _connect() -> None:
    import torch
    from accelerate import PartialState

    cpu = not torch.cuda.is_available()
    if not cpu and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise ContractError(
            f"this machine has {torch.cuda.device_count()} GPUs, but torchrun has started process {os.environ['LOCAL_RANK']} (from 0) "
            "here; use a smaller --nproc_per_node"
        )
    PartialState(cpu=cpu, **({"backend": "gloo"} if cpu else {}))


class _Watch(threading.Thread):
    """Ends this process when another one has failed. Otherwise it would wait for the other's tensors forever."""

    def __init__(self, key: str):
        super().__init__(daemon=True)
        from datetime import timedelta

        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        self.key = key
        # A connection of its own, because a call on the process group's connection may wait.
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=60),
        )
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SECONDS):
            try:
                failed = self.store.check([self.key])
            except RuntimeError:
                failed = True  # the process that keeps the store has ended
            if failed and not self._ended.wait(_GRACE_SECONDS):
                os._exit(1)

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.join()

    def is_first_to_fail(self) -> bool:
        """Tell the others that this process has failed; ``False`` if another one has said so before."""
        try:
            return self.store.add(self.key, 1) == 1
        except RuntimeError:
            return False
