"""Ctrl-C while training: finish the step, write a checkpoint, then stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Ctrl-C arrived and the state is saved; the message says up to where."""


class GracefulInterrupt:
    """While active, Ctrl-C sets ``requested`` instead of raising; an impatient third one raises after all.

    A step takes about a second, so the run answers the first Ctrl-C soon; a second one in that time, out of habit, must not
    tear the checkpoint that is being written.
    """

    def __init__(self) -> None:
        self.requested = False
        self._pressed = 0
        self._previous: Any = None

    def __enter__(self) -> GracefulInterrupt:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._pressed += 1
        self.requested = True
        if self._pressed > 2:
            raise KeyboardInterrupt
