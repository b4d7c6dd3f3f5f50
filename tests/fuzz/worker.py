"""Cases examined in a child process, which a crash or a hang may end."""

import multiprocessing
from typing import Any

from fuzz.build import Case, Unbuildable
from fuzz.compare import Finding, examine

LIMIT = 120
"""Seconds that a case may take."""


def verdict(case: Case) -> Finding | str | None:
    """The finding of a case, ``None``, or why the case says nothing."""
    try:
        return examine(case)
    except Unbuildable as reason:
        return str(reason)
    except Exception as error:  # of the fuzzer itself: shown in the table, not lost
        return Finding("fuzzer", f"{type(error).__name__}: {error}")


def _serve(pipe: Any) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    while True:
        pipe.send(verdict(pipe.recv()))


class Worker:
    """A child process that is started again if a case ends it."""

    def __init__(self, limit: float = LIMIT):
        self._limit = limit
        self._process: Any = None
        self._pipe: Any = None

    def __call__(self, case: Case) -> Finding | str | None:
        """As ``verdict``; a case that ends or stops the interpreter is a finding too."""
        if self._process is None:
            self._start()
        self._pipe.send(case)
        try:
            if self._pipe.poll(self._limit):
                return self._pipe.recv()
            self.close()
            return Finding("hang", f"no answer within {self._limit} s")
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._process = None
            return Finding("crash", f"the interpreter ended with {code}")

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child,), daemon=True)
        self._process.start()
        child.close()
