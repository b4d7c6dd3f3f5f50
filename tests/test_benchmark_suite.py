"""The suite keeps rows, resumes, refuses and says what is absent; with runs that say what they are told, and a few real steps."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace

import models
import pytest
import torch
from benchmark_scripts import FOLDER, load_script

SETTINGS = {
    "device": "Chip (family 1, model 2)",
    "processor": "Chip",
    "isa": "AVX2",
    "gpu": None,
    "instructions": {"torch": "AVX2"},
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
    "allocator_bytes": 2**19,
    "is_rounded": False,
    "instructions": {"torch": "AVX2", "oneDNN": "Intel AVX2"},
}
TARGET = {
    "reached": True,
    "steps": 20,
    "seconds": 2.5,
    "held_out": [[0, 4.0], [20, 2.9]],
    "learning_rate": 1e-3,
}


@pytest.fixture
def suite(monkeypatch):
    """benchmarks/suite_runner.py on a quiet machine."""
    script = load_script("suite_runner")
    monkeypatch.setattr(script.guard.quiet, "spin", lambda: 0.05)
    monkeypatch.setattr(script.guard.quiet.Watch, "others", lambda self: 0.0)
    monkeypatch.setattr(script, "base_folder", lambda case, folder: folder)
    return script


@pytest.fixture(scope="module")
def commands():
    """benchmarks/suite.py."""
    return load_script("suite")


@pytest.fixture
def measure(suite, commands, monkeypatch, tmp_path):
    """Measure points with runs by provider; ``measure.ran`` has the providers in the order of their runs."""

    def run(points, runs=(), *options, environment=SETTINGS):
        def child(self, command):
            if "records.py" in command[-1]:
                return environment
            if command[1] == "-c":
                return {"adapters": "1"}
            asked = json.loads(command[-1])
            if "target" in asked:
                run.trained.append(asked)
                return TARGET
            name = f"{asked['library']} {asked['method']}"
            run.ran.append(name)
            return RUN | dict(runs).get(name, {})

        monkeypatch.setattr(suite.Suite, "_child", child)
        parser = argparse.ArgumentParser()
        commands.add_run_options(parser)
        out = ["--out", str(tmp_path / "rows.jsonl"), "--rounds", "2", "--wait", "0"]
        run.ran, run.trained = [], []
        return suite.Suite("methods", parser.parse_args([*out, *options])).measure(points)

    return run


@pytest.fixture
def points(commands):
    """LoRA in PEFT and peftkit."""
    return commands.of_methods(commands.SMOKE_BASE, ["lora"], ["peftkit"])


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
    monkeypatch.setattr(suite.guard.quiet.Watch, "others", lambda self: 1.0)
    rows = measure(points, (), "--retries", "1")
    assert len(measure.ran) == 2 * 2 * 2
    assert {row["status"] for row in rows} == {"refused"}
    assert "other processes kept 1.00 cores busy" in rows[0]["reason"]
    assert suite.records.read(tmp_path / "rows.jsonl") == rows


def test_a_failed_run_is_refused_with_the_last_words_of_its_process(suite, points, tmp_path):
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        suite.Suite._child(
            argparse.Namespace(variables={}, arguments=argparse.Namespace(limit=60)),
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


def test_libraries_that_are_absent_say_so(measure, suite, commands, monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda module: None if module != "peft" else module)
    points = commands.of_methods(commands.SMOKE_BASE, ["bottleneck", "full"], None)
    rows = {row["provider"]: row for row in measure(points)}
    assert rows["adapters bottleneck"]["reason"] == "adapters is not installed"
    assert rows["Unsloth full"]["status"] == "absent"
    assert rows["peftkit bottleneck"]["status"] == "ok"
    assert rows["Liger full"]["reason"] == "Liger's kernels run on GPUs only"
    assert suite.absence("Liger", sys.executable, gpu=True) == "liger_kernel is not installed"


def test_the_axes_change_one_size_at_a_time(commands):
    found = commands.of_axes(commands.BASE, commands.AXES)
    for axis, point in found:
        base = replace(commands.BASE, library=point.library)
        assert replace(point, **{axis: getattr(base, axis)}) == base
    assert {p.length for _, p in found} >= {128, 8192}
    assert {p.rank for _, p in found} >= {4, 512}
    assert {p.adapters for _, p in found} >= {1, 64}


def test_another_interpreter_has_versions_of_its_own(measure, commands, suite, monkeypatch):
    monkeypatch.setattr(suite, "_installed", lambda module, python: module != "unsloth")
    points = commands.of_methods(commands.SMOKE_BASE, ["bottleneck"], None)
    options = ("--python", f"adapters={sys.executable}", "--resume")
    _, own, other = measure(points, (), *options)
    assert own["environment"]["versions"] == SETTINGS["versions"]
    assert other["environment"]["versions"] == {"adapters": "1"}
    assert len(measure.ran) == 3 * 2
    measure(points, (), *options)
    assert measure.ran == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warm", "0"], "--warm 0: it must be 1 or more"),
        (["--steps", "1"], "--steps 1: it must be 2 or more"),
        (["--python", "adapters=/no/python"], "there is no interpreter /no/python"),
        (["--python", "pandas=/x"], "write LIBRARY=PATH with one of PEFT"),
        (["--gpu"], "torch sees no GPU"),
    ],
)
def test_wrong_options_are_refused(measure, points, options, message):
    with pytest.raises(SystemExit, match=message):
        measure(points, (), *options)


def test_instructions_beyond_the_limit_are_refused(measure, points):
    newer = {"instructions": {"torch": "AVX2", "oneDNN": "Intel AVX-512 with Intel DL Boost"}}
    stock, own = measure(points, {"peftkit lora": newer}, "--isa", "avx2")
    assert stock["status"] == "ok"
    assert own["reason"] == "oneDNN runs Intel AVX-512 with Intel DL Boost in spite of --isa avx2"
    with pytest.raises(SystemExit, match="--isa avx2 has no effect: oneDNN runs Intel AVX-512"):
        measure(points, (), "--isa", "avx2", environment=SETTINGS | newer)


def test_each_limit_of_instructions_has_its_own_compiled_code():
    variables = load_script("instructions").variables
    native, limited = variables("native"), variables("avx2")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert native[name] != limited[name]
    assert limited["ATEN_CPU_CAPABILITY"] == "avx2"
    assert "ATEN_CPU_CAPABILITY" not in native


def test_a_limit_is_seen_in_every_library():
    limits = load_script("instructions")
    code = f"import sys, json; sys.path.insert(0, {str(FOLDER)!r}); import instructions; print(json.dumps(instructions.in_use(native=True)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | limits.ISA["avx2"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"torch", "oneDNN", "MKL", "peftkit"} >= found.keys() >= {"torch", "peftkit"}
    assert limits.too_new(found, "avx2") is None
    if torch.cpu._is_avx512_supported():
        here = limits.in_use(native=True)
        assert limits.too_new({"torch": here["torch"]}, "avx2") is not None
        assert limits.too_new({"oneDNN": here["oneDNN"]}, "avx2") is not None
        assert limits.too_new({"peftkit": here["peftkit"]}, "avx2") is not None


def test_the_time_to_a_target_is_in_row_and_table(measure, points):
    tables = load_script("suite_tables")
    rows = measure(points, {"peftkit lora": {"losses": [9.0, 1.0]}}, "--target", "3")
    assert [asked["library"] for asked in measure.trained] == ["PEFT"]  # the other row is refused
    assert rows[0]["target"] == TARGET
    assert rows[1]["target"] is None
    text = tables.tables(rows)
    assert "| to a held-out loss of 3 (s) |" in text
    assert "| 8 | 2.5, 20 steps |" in text
    late = {**TARGET, "reached": False}
    assert tables.to_target(late) == "not reached: 2.9 after 20 steps"


def test_methods_are_named_with_commas(commands):
    parser = argparse.ArgumentParser(exit_on_error=False)
    commands.Methods.add_options(parser)
    found = parser.parse_args(["--methods", "lora,full", "--method", "dora"])
    assert found.methods == ["lora", "full", "dora"]
    with pytest.raises(argparse.ArgumentError, match="'lara' is none of full, partial, lora"):
        parser.parse_args(["--methods", "lara"])


def test_a_model_of_a_folder_is_measured_as_it_is(commands, base, tmp_path):
    parser = argparse.ArgumentParser()
    commands.Methods.add_options(parser)
    point = commands._base(parser.parse_args(["--model", str(base), "--length", "8"]))
    assert (point.case, point.batch, point.length) == (str(base), 2, 8)
    bases = load_script("suite_bases")
    assert bases.base_folder(point.case, tmp_path) == base
    with pytest.raises(SystemExit, match=r"--model .*; name a folder or a model of the hub"):
        bases.check_model(str(tmp_path))


def test_a_case_is_written_for_older_transformers_too(tmp_path):
    folder = load_script("suite_bases").base_folder("tiny", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
def test_the_case_with_real_weights_is_written_with_its_tokenizer(tmp_path):
    folder = load_script("suite_bases").base_folder("smollm2", tmp_path)
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    encode = load_script("suite_target").encoder(folder, 49152)
    assert len(encode("Every fifth topic is held out.")) < 12


def test_rows_of_a_file_that_was_cut_off_name_the_line(suite, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"suite": "methods"}\n{"suite')
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 2 is not JSON"):
        suite.records.read(path)


def test_tables_show_speeds_and_reasons(measure, points):
    tables = load_script("suite_tables").tables
    text = tables(measure(points, {"peftkit lora": {"seconds": [0.05, 0.05, 0.05]}}))
    assert "Chip (family 1, model 2), 1 thread, AVX2, products by MKL; commit abc1234" in text
    assert "| lora | peftkit | 0.05 | 0.05..0.05 | 0.50 | 640 | 1 | 0 | 8 |" in text
    text = tables(measure(points, {"peftkit lora": {"leaking": ["w"]}}))
    assert "| lora | peftkit | refused: w gets a gradient, although it is frozen |" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seconds": [0.2, 0.2, 0.2]}, "PEFT in lora, with 0.50 x its time and 1.00 x its memory."),
        ({"seconds": [0.11, 0.11, 0.11]}, "with 0.91 x its time (the ranges overlap) and 1.00 x"),
        ({"peak_bytes": 2**21}, "with 1.00 x its time and 0.50 x its memory."),
        ({"seconds": [0.05, 0.05, 0.05]}, None),
        ({"leaking": ["w"]}, None),
    ],
)
def test_the_table_says_who_is_ahead_of_peftkit(change, expected, measure, points):
    text = load_script("suite_tables").tables(measure(points, {"peftkit lora": change}))
    assert ("Ahead of peftkit: " in text) == (expected is not None)
    assert (expected or "") in text


def test_the_tables_of_scaling_have_a_line_for_each_value(measure, commands):
    axes = {"rank": (2, 4), "length": (16,)}
    points = [point for _, point in commands.of_axes(commands.SMOKE_BASE, axes)]
    changes = {"peftkit lora": {"seconds": [0.05, 0.05, 0.05]}}
    write = load_script("suite_tables").along_axes
    text = write(measure(points, changes), axes, commands.SMOKE_BASE)
    assert text.count("| 2 | 0.1 | 0.05 | 0.50 | 1 | 1 | 1.00 |") == 1
    assert text.count("**rank**; length 16, batch 2, adapters 1, case tiny (Chip") == 1
    assert "| 16 | 0.1 | 0.05 | 0.50 |" in text
    text = write(measure(points, {"peftkit lora": {"leaking": ["w"]}}), axes, commands.SMOKE_BASE)
    assert "| 4 | 0.1 | refused |  | 1 | refused |  |" in text
    assert "4 in peftkit was refused: w gets a gradient, although it is frozen" in text


def test_plots_have_the_measured_points(measure, commands, tmp_path):
    plots, suite = load_script("scaling_plots"), commands
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
    assert measure.ran == ["PEFT lora", "peftkit lora"]
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


def test_mapped_weights_are_in_memory_before_a_step_is_measured(tmp_path):
    stepping, size = load_script("stepping"), 2**25
    (tmp_path / "weights").write_bytes(bytes(size))
    mapped = torch.from_file(str(tmp_path / "weights"), size=size, dtype=torch.uint8)
    model = torch.nn.Module()
    model.register_buffer("weights", mapped)
    before = stepping.reset_peak()
    stepping.read_weights(model)
    assert stepping.peak_bytes() - before > 0.9 * size


def test_a_point_trains_to_a_target(base):
    script = load_script("suite_target")
    sizes = {"batch": 2, "length": 16, "rank": 4, "adapters": 1, "checkpointing": False}
    first = script.run(str(base), "full", "transformers", **sizes, target=0.0, most=20)
    assert not first["reached"]
    assert [step for step, _ in first["held_out"]] == [0, 10, 20]
    start, middle, end = (loss for _, loss in first["held_out"])
    assert start > middle > end
    again = script.run(str(base), "full", "transformers", **sizes, target=middle, most=20)
    assert (again["reached"], again["steps"]) == (True, 10)
    assert again["seconds"] > 0
