"""A speed is refused if losses or gradients are wrong, the machine is busy, or steps are not steady; a good one is accepted."""

import subprocess
import sys
import time

import pytest
from benchmark_scripts import load_script

GOOD = {
    "losses": [2.0, 1.5, 1.25, 1.125],
    "seconds": [0.101, 0.099, 0.1, 0.102],
    "trainable": 64,
    "without_gradient": [],
    "leaking": [],
    "spins": [0.05, 0.051],
    "others": 0.02,
}


@pytest.fixture(scope="module")
def verdict():
    """benchmarks/verdict.py."""
    return load_script("verdict")


def _refusal(verdict, expected_trainable=64, **changes):
    runs = [GOOD, GOOD | changes]
    tolerance = verdict.LOSS_TOLERANCE
    return verdict.refusal(runs, GOOD["losses"], expected_trainable, 0.05, tolerance)


def test_a_good_run_is_accepted(verdict):
    assert _refusal(verdict) is None
    assert _refusal(verdict, others=None) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"losses": [2.0, 1.5, 1.251, 1.125]}, "loss 1.251 at step 2, the reference has 1.25"),
        ({"losses": [2.0, 1.5, float("nan"), 1.125]}, "loss nan at step 2"),
        ({"losses": [2.0, 1.5]}, "it has 2 losses, its reference 4"),
        ({"without_gradient": ["a", "b"]}, "a and 1 more gets no gradient"),
        ({"leaking": ["w"]}, "w gets a gradient, although it is frozen"),
        ({"trainable": 32}, "it trains 32 parameters, the reference 64"),
        ({"seconds": [0.4, 0.3, 0.2, 0.1]}, "still warming up: the first steps took 0.35 s"),
        ({"seconds": [0.1]}, "1 timed steps do not show"),
        ({"spins": [0.05, 0.09]}, "took 1.80 x as long as at best"),
        ({"others": 0.7}, "other processes kept 0.70 cores busy"),
    ],
)
def test_a_bad_run_is_refused_with_its_reason(verdict, changes, reason):
    assert reason in _refusal(verdict, **changes)


def test_a_process_that_computes_makes_the_machine_busy(verdict):
    quiet = load_script("quiet")
    if quiet.Watch().others() is None:
        pytest.skip("this system has no /proc/stat")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = quiet.Watch()
        time.sleep(1.0)
        others = watch.others()
    finally:
        busy.kill()
        busy.wait()
    assert "other processes kept" in verdict.not_quiet([0.05], others, 0.05)


def test_the_time_of_finished_children_is_not_that_of_others():
    quiet = load_script("quiet")
    before = quiet.Watch._now()
    work = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    now = quiet.Watch._now()
    if before is None or now is None:
        pytest.skip("this system has no /proc/stat")
    assert now.own - before.own >= 0.5
    assert quiet.spin() > 0
