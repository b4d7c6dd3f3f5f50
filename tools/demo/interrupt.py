"""Handle Ctrl-C during training: finish the step, write a checkpoint, then stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Ctrl-C was pressed, and the state is saved. The message says up to which step or phase."""


class GracefulInterrupt:
    """While active, Ctrl-C sets ``requested`` instead of raising ``KeyboardInterrupt``; only a third Ctrl-C raises it.

    A step takes about a second, so the run stops soon after the first Ctrl-C. A second Ctrl-C during this time must not
    interrupt the writing of the checkpoint.
    """

    def __init__(self) -> None:
        self.requested = False
        self._pressed = 0
        self._previous: Any = None

    def __enter__(self) -> GracefulInterrupt:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows handlers only there
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
