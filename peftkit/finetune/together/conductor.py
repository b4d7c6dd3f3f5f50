"""Run several trainings in turn, so that they can compute something together: exactly one of them runs at a time.

Each training has a thread of its own, which stops when it asks for something that others may ask for too. When all have stopped, those that
ask for the same are answered together. Threads are needed because a forward stops in the middle of a model's own code. They share no
processor time, so nothing depends on how the system schedules them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from peftkit.errors import ContractError
from peftkit.finetune.together.workers import release_workers

_local = threading.local()

BACKWARD, EVALUATION, FORWARD, MEETING = range(4)
"""Kinds of requests. The smallest is answered first, so that all trainings arrive at the larger ones."""


class Ended(Exception):
    """The trainings are ended, because one of them has failed before all were ready, or by a fault of the program."""


class Strand:
    """One training.

    Attributes:
        number: Its number, from 0.
        work: What it does.
        result: What ``work`` returned.
        error: What ``work`` raised.
        done: Whether it is at its end.
        joined: Whether its forwards are computed together with those of others.
    """

    def __init__(self, number: int, work: Callable[[], Any]):
        self.number, self.work = number, work
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = self.joined = False
        self._turn = threading.Semaphore(0)
        self._request: tuple[int, Hashable, Any, Callable[[list[Any]], list[Any]]] | None = None
        self._answer: Any = None
        self._group: list[Strand] | None = None
        self._shared: dict[str, Any] = {}


class Conductor:
    """Gives the turn to one training after the other.

    Args:
        show: Is called with the number of a training before it runs.

    Attributes:
        strict: Whether a ``ContractError`` of one training ends all.
    """

    def __init__(self, show: Callable[[int], None]):
        self.show, self.strict = show, True
        self.strands: list[Strand] = []
        self._ended = False
        self._back = threading.Semaphore(0)

    def run(self, works: list[Callable[[], Any]]) -> list[Strand]:
        """Run all trainings to their ends.

        Returns:
            For each its strand, with the result or a ``ContractError``.

        Raises:
            BaseException: Another error of a training; then all are ended.
        """
        self.strands = [Strand(number, work) for number, work in enumerate(works)]
        for strand in self.strands:
            strand._shared = _accelerate_state().copy()
            threading.Thread(target=self._run, args=(strand,), daemon=True).start()
        before = _accelerate_state().copy()
        turns = list(self.strands)
        release_workers()
        try:
            while not all(strand.done for strand in self.strands):
                for strand in turns:
                    self._give_turn(strand)
                self._raise_faults()
                turns = self._next()
            self._raise_faults()
        finally:
            self._end()
            _set_accelerate_state(before)
        return self.strands

    def meet(self, payload: Any, act: Callable[[list[Any]], list[Any]]) -> Any:
        """Wait for all trainings that are not at their ends, and return one answer of ``act``, which gets the payloads of all."""
        return self.ask(MEETING, None, payload, act)

    def ask(
        self, kind: int, key: Hashable, payload: Any, act: Callable[[list[Any]], list[Any]]
    ) -> Any:
        """Stop until all have stopped, and let one training of those that ask for the same compute the answers for all of them.

        Args:
            kind: When it is answered.
            key: Requests of one kind and key are answered together.
            payload: What ``act`` gets of this training.
            act: From the payloads to the answers, in the order of the trainings. Runs in the thread of one that asks.
        """
        strand = current()
        if strand is None:
            return act([payload])[0]
        strand._request = (kind, key, payload, act)
        if kind == MEETING:
            release_workers()  # others may compute for a long time
        self._stop(strand)
        if strand._group is not None:
            self._answer(strand)
        answer, strand._answer = strand._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _answer(self, leader: Strand) -> None:
        group, leader._group = leader._group or [], None
        requests = [strand._request for strand in group]
        try:
            answers = requests[-1][3]([request[2] for request in requests if request])  # pyright: ignore[reportOptionalSubscript]
        except Exception as error:
            answers = [error] * len(group)
        self.show(leader.number)
        for strand, answer in zip(group, answers, strict=True):
            strand._answer, strand._request = answer, None

    def _raise_faults(self) -> None:
        """Raise the first error that ends all trainings."""
        for strand in self.strands:
            expected = isinstance(strand.error, ContractError) and not self.strict
            if strand.error is not None and not expected:
                raise strand.error

    def _next(self) -> list[Strand]:
        """Let the first group that can be answered compute its answers; returns those of the group that go on after one has."""
        waiting = [strand for strand in self.strands if not strand.done]
        if not waiting:
            return []
        first = min(waiting, key=lambda strand: (strand._request or (0,))[0])
        group = [s for s in waiting if (s._request or ())[:2] == (first._request or ())[:2]]
        leader = group[-1]
        leader._group = group
        self._give_turn(leader)
        return group[:-1]

    def _give_turn(self, strand: Strand) -> None:
        _set_accelerate_state(strand._shared)
        self.show(strand.number)
        strand._turn.release()
        self._back.acquire()
        strand._shared = _accelerate_state().copy()

    def _stop(self, strand: Strand) -> None:
        self._back.release()
        strand._turn.acquire()
        if self._ended:
            raise Ended

    def _run(self, strand: Strand) -> None:
        _local.strand = strand
        strand._turn.acquire()
        try:
            if not self._ended:
                strand.result = strand.work()
        except Ended:
            pass
        except BaseException as error:
            strand.error = error
        release_workers()
        strand.done = True
        self._back.release()

    def _end(self) -> None:
        """End the trainings that are left, one after the other."""
        self._ended = True
        for strand in self.strands:
            if not strand.done:
                strand._turn.release()
                self._back.acquire()


def current() -> Strand | None:
    """The training that runs in this thread, or ``None``."""
    return getattr(_local, "strand", None)


@contextmanager
def joined() -> Iterator[None]:
    """Compute the forwards of this training together with those of others."""
    strand = current()
    if strand is None:
        yield
        return
    before, strand.joined = strand.joined, True
    try:
        yield
    finally:
        strand.joined = before


def _accelerate_state() -> dict[str, Any]:
    """What accelerate keeps for the whole process although it belongs to one training: whether this forward ends an optimiser step."""
    from accelerate.state import GradientState

    return GradientState._shared_state


def _set_accelerate_state(values: dict[str, Any]) -> None:
    state = _accelerate_state()
    if state is not values:
        state.clear()
        state.update(values)
