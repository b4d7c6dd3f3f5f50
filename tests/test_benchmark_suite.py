"""The suite keeps rows, resumes, refuses and says what is absent; with runs that say what they are told, and a few real steps."""

import argparse
import json
import sys
from dataclasses import replace

import models
import pytest
import torch
from benchmark_scripts import load_script

SETTINGS = {
    "device": "Chip (family 1, model 2)",
    "processor": "Chip",
    "isa": "AVX2",
    "products": "MKL",
    "threads": 1,
    "versions": {"torch": "2"},
    "commit": "abc1234",
    "date": "2026-01-01",
}
RUN = {
    "losses": [2.0, 1.0],
    "seconds": [0.1, 0.1, 0.12],
    "trainable": 8,
    "without_gradient": [],
    "leaking": [],
    "peak_bytes": 2**20,
    "allocator_bytes": None,
    "is_rounded": False,
}


@pytest.fixture
def suite(monkeypatch):
    """benchmarks/suite.py on a quiet machine."""
    script = load_script("suite")
    monkeypatch.setattr(script.quiet, "spin", lambda: 0.05)
    monkeypatch.setattr(script.quiet.Watch, "others", lambda self: 0.0)
    monkeypatch.setattr(script, "base_folder", lambda case, folder: folder)
    monkeypatch.setattr(script.time, "sleep", lambda seconds: None)
    return script


@pytest.fixture
def measure(suite, monkeypatch, tmp_path):
    """Measure points with runs by provider; ``measure.ran`` has the providers in the order of their runs."""

    def run(points, runs=(), *options, environment=SETTINGS):
        def child(self, command):
            if "suite.py" in command[-1]:
                return environment
            asked = json.loads(command[-1])
            name = f"{asked['library']} {asked['method']}"
            run.ran.append(name)
            return RUN | dict(runs).get(name, {})

        monkeypatch.setattr(suite.Suite, "_child", child)
        parser = argparse.ArgumentParser()
        suite._add_run_options(parser)
        out = ["--out", str(tmp_path / "rows.jsonl"), "--rounds", "2"]
        run.ran = []
        return suite.Suite("methods", parser.parse_args([*out, *options])).measure(points)

    return run


@pytest.fixture
def points(suite):
    """LoRA in PEFT and peftkit."""
    return suite.of_methods(suite.SMOKE_BASE, ["lora"], ["peftkit"])


def test_good_rows_have_their_figures_and_libraries_take_turns(measure, points):
    stock, own = measure(points, {"peftkit lora": {"seconds": [0.05, 0.05, 0.048]}})
    assert measure.ran == ["PEFT lora", "peftkit lora"] * 2
    assert (stock["status"], own["status"], own["reason"]) == ("ok", "ok", None)
    assert (stock["step_seconds"], stock["step_spread"]) == (0.1, [0.1, 0.12])
    assert own["tokens_per_second"] == pytest.approx(2 * 16 / 0.05)
    assert own["environment"] == SETTINGS
    assert (own["provider"], own["peak_bytes"], own["trainable"]) == ("peftkit lora", 2**20, 8)


def test_bad_rows_are_kept_with_their_reason_and_without_a_speed(measure, points):
    for change, reason in (
        ({"losses": [2.0, 1.1]}, "loss 1.1 at step 1"),
        ({"without_gradient": ["x.lora_A"]}, "x.lora_A gets no gradient"),
        ({"trainable": 4}, "it trains 4 parameters"),
        ({"seconds": [3.0, 2.0, 1.0]}, "still warming up"),
    ):
        _, own = measure(points, {"peftkit lora": change})
        assert own["status"] == "refused"
        assert reason in own["reason"]
        assert own["step_seconds"] is None
        assert own["losses"] is not None


def test_runs_on_a_busy_machine_are_repeated_and_then_refused(
    measure, points, suite, monkeypatch, tmp_path
):
    monkeypatch.setattr(suite.quiet.Watch, "others", lambda self: 1.0)
    rows = measure(points, (), "--retries", "1")
    assert len(measure.ran) == 2 * 2 * 2
    assert {row["status"] for row in rows} == {"refused"}
    assert "other processes kept 1.00 cores busy" in rows[0]["reason"]
    assert suite.records.read(tmp_path / "rows.jsonl") == rows


def test_a_failed_run_is_refused_with_the_last_words_of_its_process(suite, points, tmp_path):
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        suite.Suite._child(
            argparse.Namespace(variables={}),
            [sys.executable, "-c", "raise ValueError('no such thing')"],
        )
    row = suite.Suite._judged(None, points[0], [{"failed": "ValueError: no"}], {})
    assert row == {"status": "refused", "reason": "it failed: ValueError: no"}


def test_resume_keeps_the_rows_of_this_commit_alone(measure, points):
    first = measure(points, {"peftkit lora": {"losses": [3.0, 1.0]}})
    again = measure(points, (), "--resume")
    assert (
        measure.ran == ["peftkit lora"] * 2
    )  # the refused row runs again, against the kept reference
    assert again[0] == first[0]
    assert again[1]["status"] == "ok"
    assert measure(points, (), "--resume") == again
    assert measure.ran == []
    for change in (
        {"commit": "def5678"},
        {"processor": "Chop"},
        {"versions": {"torch": "3"}},
        {"commit": "abc1234-modified"},
    ):
        measure(points, (), "--resume", environment=SETTINGS | change)
        assert len(measure.ran) == 4


def test_libraries_that_are_absent_say_so(measure, suite, monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda module: None if module != "peft" else module)
    points = suite.of_methods(suite.SMOKE_BASE, ["bottleneck", "full"], None)
    rows = {row["provider"]: row for row in measure(points)}
    assert rows["adapters bottleneck"]["reason"] == "adapters is not installed"
    assert rows["Unsloth full"]["status"] == "absent"
    assert rows["peftkit bottleneck"]["status"] == "ok"
    monkeypatch.setattr(suite, "find_spec", lambda module: module)
    if not torch.cuda.is_available():
        assert "GPUs only" in suite.absence("Liger", sys.executable)


def test_the_axes_change_one_size_at_a_time(suite):
    found = suite.of_axes(suite.BASE, suite.AXES)
    for axis, point in found:
        base = replace(suite.BASE, library=point.library)
        assert replace(point, **{axis: getattr(base, axis)}) == base
    assert {p.length for _, p in found} >= {128, 8192}
    assert {p.rank for _, p in found} >= {4, 512}
    assert {p.adapters for _, p in found} >= {1, 64}


def test_rows_of_a_file_that_was_cut_off_name_the_line(suite, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"suite": "methods"}\n{"suite')
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 2 is not JSON"):
        suite.records.read(path)


def test_tables_show_speeds_and_reasons(measure, suite, points):
    text = suite.suite_tables.tables(
        measure(points, {"peftkit lora": {"seconds": [0.05, 0.05, 0.05]}})
    )
    assert "Chip (family 1, model 2), 1 threads, AVX2, products by MKL; commit abc1234" in text
    assert "| lora | peftkit | 0.05 | 0.05..0.05 | 0.50 | 640 | 1 | 8 |" in text
    text = suite.suite_tables.tables(measure(points, {"peftkit lora": {"leaking": ["w"]}}))
    assert "| lora | peftkit | refused: w gets a gradient, although it is frozen |" in text


def test_plots_have_the_measured_points(measure, suite, tmp_path):
    plots = load_script("scaling_plots")
    axes = {"rank": (2, 4)}
    rows = measure([point for _, point in suite.of_axes(suite.SMOKE_BASE, axes)])
    lines = plots.series(rows, "rank", (2, 4), suite.SMOKE_BASE, "step_seconds")
    assert lines == {"PEFT": [(2, 0.1), (4, 0.1)], "peftkit": [(2, 0.1), (4, 0.1)]}
    plots.write(rows, axes, suite.SMOKE_BASE, tmp_path)
    assert "<svg" in (tmp_path / "scaling-rank.svg").read_text()


def test_a_new_row_makes_the_page_stale(measure, points, monkeypatch):
    documents = load_script("documents")
    rows = measure(points)
    monkeypatch.setattr(documents.records, "stored", lambda: rows)
    page = documents.documents()[documents.BENCHMARKS]
    assert "| lora | peftkit | 0.1 | 0.1..0.12 | 1.00 |" in page
    assert page != documents.BENCHMARKS.read_text()


def test_a_row_of_a_smoke_run_is_not_shown(suite, measure, points, monkeypatch, tmp_path):
    monkeypatch.setattr(suite.records, "RESULTS", tmp_path)
    measure(points)
    assert len(suite.records.stored()) == 2
    measure(points, (), "--smoke")
    assert len(suite.records.stored()) == 2
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("base")
    models.tiny("llama").save_pretrained(folder)
    return folder


def _steps(base, method, library, **changes):
    sizes = {"batch": 2, "length": 8, "rank": 4, "adapters": 1, "checkpointing": False}
    row = load_script("suite_row")
    sizes |= {"warm": 1, "steps": 2} | changes
    return row.run(str(base), method, library, **sizes)


@pytest.mark.parametrize(
    ("method", "stock", "changes"),
    [
        ("full", "transformers", {}),
        ("partial", "transformers", {}),
        ("lora", "PEFT", {}),
        ("lora", "PEFT", {"adapters": 3, "checkpointing": True}),
        ("dora", "PEFT", {}),
        ("bottleneck", "plain torch", {}),
        ("prefix", "plain torch", {}),
    ],
)
def test_libraries_train_the_same_from_the_same_start(base, method, stock, changes, monkeypatch):
    from peftkit.bottleneck import module

    verdict = load_script("verdict")
    monkeypatch.setattr(module, "bottleneck", module.bottleneck)  # plain torch replaces it
    own = _steps(base, method, "peftkit", **changes)
    expected = _steps(base, method, stock, **changes)
    assert verdict.wrong_losses(own["losses"], expected["losses"], verdict.LOSS_TOLERANCE) is None
    assert verdict.wrong_gradients(own, expected["trainable"]) is None
    assert len(own["seconds"]) == 2


def test_a_frozen_adapter_and_a_wrong_kernel_are_seen(base, monkeypatch):
    verdict, row = load_script("verdict"), load_script("suite_row")
    expected = _steps(base, "lora", "PEFT")
    real = row.build

    def frozen(*arguments):
        built = real(*arguments)
        next(
            iter(p for n, p in built.model.named_parameters() if n in built.trained)
        ).requires_grad_(False)
        return built

    sizes = {"batch": 2, "length": 8, "rank": 4, "adapters": 1, "checkpointing": False}
    monkeypatch.setattr(row, "build", frozen)
    found = row.run(str(base), "lora", "peftkit", **sizes, warm=1, steps=2)
    assert "gets no gradient" in verdict.wrong_gradients(found, expected["trainable"])
    from peftkit_kernels.ops.lora_linear import torch_passes

    project = torch_passes.project
    monkeypatch.setattr(row, "build", real)
    monkeypatch.setattr(torch_passes, "project", lambda *a, **k: project(*a, **k) * 1.1)
    found = row.run(str(base), "lora", "peftkit", **sizes, warm=1, steps=2)
    wrong = verdict.wrong_losses(found["losses"], expected["losses"], verdict.LOSS_TOLERANCE)
    assert "the reference has" in wrong
