"""Lines of progress without a terminal."""

import io

import pytest
from rich.console import Console

from demo import progress
from demo.progress import Display, duration


def test_lines_name_the_phase_what_is_counted_and_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Display(Console(file=out, width=200), phases=8) as display:
        display.phase("evaluating", 1000, 200, "tokens", number=3)
        now[0] += 10
        display.advance_to(300)
        now[0] += 30
        display.advance_to(600, "5 of 9 answered")
    assert out.getvalue().splitlines() == [
        "phase 3 of 8: evaluating ...",
        "phase 3 of 8: evaluating: 600/1,000 tokens, 5 of 9 answered, about 40 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (99, "99 s"), (100, "2 min"), (3700, "1 h 02 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
