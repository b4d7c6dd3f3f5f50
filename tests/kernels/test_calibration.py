"""Crossovers measured on a GPU: kept by the name of the device, and read by the choice of schedule."""

import pytest

from peftkit_kernels import calibration
from peftkit_kernels.calibration import Calibration
from peftkit_kernels.launch import Target
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


@pytest.mark.parametrize("text", ["{", "[]", '{"H100": {"width": 3}}', '{"H100": 3}'])
def test_another_file_is_refused_with_a_way_out(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration .*delete it"):
        calibration.load("H100", path)


@pytest.mark.parametrize(("fused_width", "fused"), [(1024, False), (2048, True), (4096, True)])
def test_the_schedule_follows_the_calibration(fused_width, fused):
    target = Target("cuda:80", 108, Calibration(fused_width))
    assert fuses_gemm(2048, 2048, itemsize=2, target=target) is fused
    assert not fuses_gemm(2048, 2048, itemsize=4, target=target)
    assert fuses_gemm(2048, 1024, itemsize=2, target=Target("cuda:80", 108))
    assert not fuses_gemm(2049, 1024, itemsize=2, target=Target("cuda:80", 108))
