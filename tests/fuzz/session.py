"""A run over many cases: which comes next, what was found, and the file from which it goes on."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuzz import script
from fuzz.build import Case
from fuzz.compare import Finding, same_fault
from fuzz.corners import CORNERS
from fuzz.options import consistent, random_case
from fuzz.shrink import explains, shrink

Verdict = Callable[[Case], Finding | str | None]


def case_at(seed: int, number: int, every: tuple[str, ...] = ()) -> Case:
    """Case ``number`` of a run: each corner once, then random ones, half of them from a corner."""
    choose = random.Random(f"{seed} {number}")
    own = seed * 1_000_003 + number
    if number < len(CORNERS):
        return consistent({"dtype": "float64"} | CORNERS[number] | {"seed": own})
    start = choose.choice(CORNERS) if choose.random() < 0.4 else None
    return random_case(choose, own, every, start)


@dataclass
class State:
    """What a run has done.

    Attributes:
        seed: Of the run.
        next: Number of the next case.
        agreed: Number of cases without a finding.
        skipped: Number of cases that said nothing.
        repeated: Number of cases whose finding a shrunk failure explains.
        failures: One entry a new finding: ``case``, ``shrunk``, ``kind``, ``what``, ``script``.
    """

    seed: int
    next: int = 0
    agreed: int = 0
    skipped: int = 0
    repeated: int = 0
    failures: list[dict] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the state in one step: an interrupted write leaves the old one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "State":
        """The state that ``save`` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def go_on(
    state: State,
    verdict: Verdict,
    folder: Path,
    *,
    cases: int | None = None,
    minutes: float | None = None,
    every: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Examine cases from ``state.next`` on, and save the state in ``folder`` after each.

    Args:
        state: Changed in place.
        verdict: What examines a case.
        folder: For the state and the scripts.
        cases: How many cases, or ``None``.
        minutes: How long, or ``None``; the case under way is finished.
        every: Model types to draw from besides the usual ones.
        say: Gets a line for each new failure.
    """
    last = None if cases is None else state.next + cases
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    while (last is None or state.next < last) and (deadline is None or time.monotonic() < deadline):
        case = case_at(state.seed, state.next, every)
        found = verdict(case)
        if found is None:
            state.agreed += 1
        elif isinstance(found, str):
            state.skipped += 1
        elif _is_known(state, found, case):
            state.repeated += 1
        else:
            failure = record(case, found, verdict)
            if _is_known(state, found, failure["shrunk"]):
                state.repeated += 1
            else:
                failure["script"] = str(script.write(folder, failure["shrunk"], failure["what"]))
                state.failures.append(failure)
                say(f"case {state.next}: {failure['what']}\n  {failure['shrunk']}")
        state.next += 1
        state.save(folder / "state.json")


def _is_known(state: State, found: Finding, case: Case) -> bool:
    """Whether a failure found earlier has the options of this case already."""
    return any(f["kind"] == found.kind and explains(f["shrunk"], case) for f in state.failures)


def record(case: Case, found: Finding, verdict: Verdict) -> dict:
    """A failing case, shrunk."""

    def fails(simpler: Case) -> bool:
        again = verdict(simpler)
        return isinstance(again, Finding) and same_fault(again, found)

    shrunk = shrink(case, fails)
    again = verdict(shrunk)
    finding = again if isinstance(again, Finding) else found
    return {
        "case": case,
        "shrunk": shrunk,
        "kind": finding.kind,
        "what": str(finding),
    }


def table(state: State) -> str:
    """The failures of a run as text."""
    lines = [
        f"seed {state.seed}: {state.next} cases, {state.agreed} agree, {state.skipped} say nothing, "
        f"{len(state.failures)} new failures, {state.repeated} repeat one of them"
    ]
    for failure in state.failures:
        options = {k: v for k, v in failure["shrunk"].items() if k != "seed"}
        lines.append(f"{failure['script']}\n  {options}\n  {failure['what'][:300]}")
    return "\n".join(lines)
