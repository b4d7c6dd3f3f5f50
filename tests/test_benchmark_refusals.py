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


def test_a_busy_machine_is_named_before_a_warm_up(verdict):
    found = _refusal(verdict, others=0.7, seconds=[0.4, 0.3, 0.2, 0.1])
    assert "other processes kept 0.70 cores busy" in found


def test_the_last_words_of_a_process_are_its_exception(verdict):
    error = "Traceback\n  File x\ntorch.OutOfMemoryError: no room\n\nSet TORCH_LOGS for more\n"
    assert verdict.last_words(error, 1) == "torch.OutOfMemoryError: no room"
    assert verdict.last_words("Killed\n", 137) == "Killed"
    assert verdict.last_words("", 137) == "exit status 137"


def test_the_variation_of_the_work_is_reported_with_what_follows(verdict, monkeypatch):
    quiet = load_script("quiet")
    times = iter([0.06, 0.05, *[0.052] * 17, 0.2])
    monkeypatch.setattr(quiet, "spin", lambda: next(times))
    found = quiet.calibrate(20)
    assert (found.best, found.count) == (0.05, 20)
    assert found.spread == pytest.approx(1.2)
    assert "95 % took at most 1.200 x as long" in str(found)
    assert "The machine is not quiet" in verdict.of_calibration(found.spread)
    assert "not quiet" not in verdict.of_calibration(1.03)


def test_a_run_waits_until_the_machine_is_quiet(monkeypatch):
    quiet = load_script("quiet")
    times, slept = iter([0.2, 0.1, 0.05]), []
    monkeypatch.setattr(quiet, "spin", lambda: next(times))
    monkeypatch.setattr(quiet.time, "sleep", slept.append)
    assert quiet.wait(0.06, 60) == 0.05
    assert len(slept) == 2
    monkeypatch.setattr(quiet, "spin", lambda: 0.2)
    assert quiet.wait(0.06, 0) == 0.2


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
