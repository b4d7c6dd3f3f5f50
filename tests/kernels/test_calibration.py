"""Crossovers measured on a GPU: kept by the name of the device, and read by the choice of schedule."""

import os

import pytest

from peftkit_kernels.core import calibration
from peftkit_kernels.core.cache import Unsafe
from peftkit_kernels.core.calibration import Calibration
from peftkit_kernels.core.launch import Target
from peftkit_kernels.low_rank.config import fuses_gemm


def test_what_was_saved_is_loaded_for_that_device_only(tmp_path):
    path = tmp_path / "new" / "calibration.json"
    assert calibration.load("H100", path) == Calibration()
    measured = Calibration(fused_width=4096, small_m=48)
    assert calibration.save("H100", measured, path) == path
    calibration.save("A100", Calibration(fused_width=1024), path)
    assert calibration.load("H100", path) == measured
    assert calibration.load("A100", path).fused_width == 1024
    assert calibration.load("L40S", path) == Calibration()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_file_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.calibration_file() == tmp_path / "peftkit" / "calibration.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 60000,
        b'{"H100": 3}',
        b'{"H100": {"width": 3}}',
        b'{"H100": {"fused_width": "wide"}}',
        b'{"H100": {"fused_width": true}}',
        b'{"H100": {"fused_width": null}}',
        b'{"H100": {"small_m": -1}}',
        b'{"H100": {"small_m": NaN}}',
        b'{"H100": {"small_m": ' + b"9" * 5000 + b"}}",
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_malformed_file_is_ignored_with_the_reason_and_a_way_out(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"calibration\.json is not a calibration .*delete it"):
        assert calibration.load("H100", path) == Calibration()
    assert "is not a calibration" in calibration.obstacle(path)
    calibration.save("A100", Calibration(1024), path)
    assert calibration.load("A100", path) == Calibration(1024)
    assert calibration.obstacle(path) is None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(b" " * 70000), "has 70000 bytes"),
        (lambda path: path.chmod(0o666), "other users may write to"),
        (lambda path: path.parent.chmod(0o777), "other users may write to"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is not a regular file"),
        pytest.param(
            lambda path: os.chown(path, 12345, 12345),
            "belongs to user 12345",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away"),
        ),
    ],
    ids=["huge", "file", "folder", "directory", "pipe", "owner"],
)
def test_a_file_that_others_could_have_written_is_ignored_with_the_reason(tmp_path, spoil, reason):
    path = tmp_path / "own" / "calibration.json"
    calibration.save("H100", Calibration(1024), path)
    spoil(path)
    with pytest.warns(UserWarning, match=reason):
        assert calibration.load("H100", path) == Calibration()
    assert reason in calibration.obstacle(path)


def test_no_home_means_the_defaults(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "relative")
    assert calibration.load("H100") == Calibration()
    with pytest.raises(Unsafe, match="set XDG_CACHE_HOME to an absolute path"):
        calibration.save("H100", Calibration())


@pytest.mark.parametrize(("fused_width", "fused"), [(1024, False), (2048, True), (4096, True)])
def test_the_schedule_follows_the_calibration(fused_width, fused):
    target = Target("cuda:80", 108, Calibration(fused_width))
    assert fuses_gemm(2048, 2048, itemsize=2, target=target) is fused
    assert not fuses_gemm(2048, 2048, itemsize=4, target=target)
    assert fuses_gemm(2048, 1024, itemsize=2, target=Target("cuda:80", 108))
    assert not fuses_gemm(2049, 1024, itemsize=2, target=Target("cuda:80", 108))
