"""The GPU benchmark without a GPU: its page, its rows at a tiny size, and runs in which something fails."""

import argparse
import json

import pytest
from test_benchmarks import load_script


@pytest.fixture(scope="module")
def gpu():
    return load_script("gpu")


@pytest.fixture(scope="module")
def rows():
    return load_script("gpu_row")


def test_the_page_is_that_of_the_results(gpu):
    assert gpu.gpu_page.PAGE.read_text() == gpu.gpu_page.text()


def test_the_page_shows_ratios_reasons_and_what_was_skipped(gpu):
    step = {"model": "m", "batch": 1, "tokens": 8, "host_s": 0.01, "tokens_per_s": 800}
    result = {
        "environment": {"gpu": "NVIDIA H200", "torch": "2.11"},
        "conditions": "c",
        "steps": [
            step | {"provider": "peftkit DoRA", "step_s": 0.03, "growth_gib": 1.0, "busy_s": 0.02},
            step | {"provider": "PEFT DoRA", "step_s": 0.06, "growth_gib": 4.0},
        ],
        "values": [
            {"op": "a", "result": "right", "changing": ["dq"]},
            {"op": "b", "result": "wrong", "wrong": ["dx"]},
        ],
        "parity": [{"family": "f", "peftkit_distance": 0.1, "PEFT_distance": 0.2, "wrong": False}],
        "failed": [{"part": "steps", "provider": "Unsloth", "reason": "not installed"}],
        "skipped": [{"part": "kernels"}],
    }
    page = gpu.gpu_page.page(result)
    assert "| peftkit DoRA | 30.0 | 0.50 | 10.0 | 20.0 | 800 | 1.00 | 0.25 |" in page
    assert "1 right, 1 wrong, 0 refused, 0 out of memory" in page
    assert "- b: wrong: ['dx']" in page
    assert "Bits that differ between two runs: a." in page
    assert "| f | 0.1000 | 0.2000 | right |" in page
    assert "- steps, Unsloth, not installed" in page
    assert "- kernels" in page


def test_rows_that_fail_or_take_too_long_and_the_budget(gpu, tmp_path):
    path = tmp_path / "gpu-x.json"
    rows = [
        gpu.Row("parity", {"family": "nobody"}, 120),
        gpu.Row("steps", {"model": "tiny", "batch": 1, "tokens": 8, "provider": "peftkit"}, 0.01),
    ]
    result = gpu.measure(rows, path, minutes=5)
    assert json.loads(path.read_text()) == result
    reasons = [row["reason"] for row in result["failed"]]
    assert "KeyError: 'nobody'" in reasons[0]
    assert "it took more than" in reasons[1]
    skipped = gpu.measure(rows, path, minutes=-1)["skipped"]
    assert [row["part"] for row in skipped] == ["parity", "steps"]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_run_keeps_its_rows(gpu, tmp_path, monkeypatch):
    path = tmp_path / "gpu-x.json"

    def row(row, seconds):
        if row.part == "kernels":
            raise KeyboardInterrupt
        return {"rows": [{"family": "llama", "wrong": False}]}

    monkeypatch.setattr(gpu, "run_row", row)
    with pytest.raises(KeyboardInterrupt):
        gpu.measure([gpu.Row("parity", {}), gpu.Row("kernels", {})], path, minutes=5)
    assert json.loads(path.read_text())["parity"] == [{"family": "llama", "wrong": False}]


def test_the_status_is_1_if_something_is_wrong(gpu, tmp_path, monkeypatch, capsys):
    wrong = {"family": "llama", "peftkit_distance": 1.0, "PEFT_distance": 0.1, "wrong": True}
    monkeypatch.setattr(gpu, "run_row", lambda row, seconds: {"rows": [wrong]})
    monkeypatch.setattr(gpu, "TINY", [gpu.Row("parity", {"family": "llama"})])
    options = {"minutes": 5, "render": False, "tiny": True, "out": tmp_path / "gpu-x.json"}
    with pytest.raises(SystemExit, match="wrong"):
        gpu.run(argparse.Namespace(**options))
    assert "| llama | 1.0000 | 0.1000 | wrong |" in capsys.readouterr().out


def test_a_row_in_a_process_of_its_own(gpu):
    arguments = {"model": "tiny", "batch": 1, "tokens": 8, "provider": "peftkit"}
    (row,) = gpu.run_row(gpu.Row("steps", arguments), 300)["rows"]
    assert row["provider"] == "peftkit"
    assert row["step_s"] >= row["best_step_s"] > 0
    assert len(row["losses"]) == 8


def test_losses_of_peftkit_are_those_of_peft(rows):
    kinds = ["", " DoRA", ", checkpointed"]
    for kind in kinds:
        own, stock = (rows.steps("tiny", 2, 16, name + kind)[0] for name in ("peftkit", "PEFT"))
        assert own["losses"] == pytest.approx(stock["losses"], abs=0.03)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_parity_notices_a_wrong_gradient(rows, family, monkeypatch):
    (row,) = rows.parity(family)
    assert not row["wrong"]
    monkeypatch.setattr("peftkit.accelerate", lambda model: model.half())
    original = rows.loss_and_grads

    def wrong(model, ids):
        found = original(model, ids)
        return [
            found[0],
            *(
                2 * t
                if t.dtype.itemsize == 2
                and t.dtype.is_floating_point
                and str(t.dtype) == "torch.float16"
                else t
                for t in found[1:]
            ),
        ]

    monkeypatch.setattr(rows, "loss_and_grads", wrong)
    (row,) = rows.parity(family)
    assert row["wrong"]


def test_every_op_is_right_in_bfloat16(rows):
    found = rows.values(tiny=True)
    assert {row["result"] for row in found} == {"right"}
    assert len(found) > 20
