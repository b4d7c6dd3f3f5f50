"""Two threads that share one model, made to take turns in the middle of our code."""

import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

ROUNDS = 12


@contextmanager
def interrupted(seed: int) -> Any:
    """Pause this thread before three in a hundred lines of peftkit, so that others run there."""
    choose = random.Random(seed)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith("peftkit."):
            return None
        if choose.random() < 0.03:
            time.sleep(3e-4)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def in_two_threads(work: Callable[[int], None], seed: int) -> None:
    """Call ``work(0)`` and ``work(1)`` at the same time, and raise what either raised."""
    errors: list[Exception] = []
    together = threading.Barrier(2)

    def call(number: int) -> None:
        try:
            together.wait(10)
            with interrupted(seed + number):
                work(number)
        except Exception as error:  # raised again in the caller
            errors.append(error)

    workers = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
