"""The logic of the operations' benchmark, with a clock that says what it is told."""

import sys

import pytest
import torch
from benchmark_scripts import load_script

from lab.case import Sizes
from lab.cases import OPERATIONS
from peftkit_kernels.core.calibration import Calibration
from peftkit_kernels.low_rank import passes

SMALL = Sizes(M=20, K=64, N=64, R=4)


@pytest.fixture(scope="module")
def operations():
    """benchmarks/operations.py, a script rather than a module of a package."""
    return load_script("operations")


@pytest.fixture
def arguments(operations):
    """What the command line gives."""
    parser = operations.argparse.ArgumentParser()
    operations.add_options(parser)
    return parser.parse_args


class Clock:
    """Calls, and says one second more each time."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        call()
        self.calls += 1
        return float(self.calls)


def test_providers_take_turns_and_the_first_round_is_not_kept(operations):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = operations.interleaved(calls, 2, Clock())
    assert order == list("ababab")
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.2, 1), (0.5, 3), (0.8, 4), (1.0, 5)])
def test_quantiles(operations, share, value):
    assert operations.quantile([5, 3, 1, 4, 2], share) == value


def test_rows_hold_medians_in_milliseconds_beside_eager(operations):
    clock = Clock()
    rows = operations.measure(
        "lora_linear",
        "lora_linear",
        SMALL,
        providers=("peftkit", "eager"),
        rounds=3,
        timer=clock,
    )
    assert [(row["mode"], row["provider"]) for row in rows] == [
        ("forward", "peftkit"),
        ("forward", "eager"),
        ("step", "peftkit"),
        ("step", "eager"),
    ]
    # peftkit has the calls 3, 5, 7 and eager 4, 6, 8: the first two warm up
    first, second = rows[:2]
    assert (first["p20_ms"], first["median_ms"], first["p80_ms"]) == (3000, 5000, 7000)
    assert second["median_ms"] == 6000
    assert (first["over_eager"], second["over_eager"]) == (round(5 / 6, 3), 1.0)
    table = operations.table(rows, "here").splitlines()
    assert table[0] == "here"
    assert table[-2] == "| lora_linear | 20, 64, 64 | forward | 5000.00 | 0.83 | 6000.00 |"


def test_nothing_is_timed_before_it_is_right(operations, monkeypatch):
    from peftkit_kernels.ops.lora_linear import torch_passes

    monkeypatch.setattr(torch_passes, "project", lambda x, weight, *rest: x @ weight.t() + 1)
    clock = Clock()
    with pytest.raises(AssertionError, match="output0: error"):
        operations.measure("lora_linear", "lora_linear", SMALL, timer=clock)
    assert clock.calls == 0


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_is_right_at_some_size(operations, op):
    for variant in OPERATIONS[op].variants:
        providers = ("peftkit", "eager")
        rows = operations.measure(op, variant, SMALL, providers=providers, rounds=1, timer=Clock())
        assert {row["provider"] for row in rows} == set(providers)


def test_the_compiled_provider_gives_what_eager_gives(operations):
    case = operations.build("lora_linear", "lora_linear", SMALL)
    compiled = torch.compile(
        operations.function_of(case, "compiled"), backend="eager", fullgraph=True
    )
    expected = operations.function_of(case, "eager")(case.leaves)
    torch.testing.assert_close(compiled(case.leaves), expected)


def test_predictions_stand_beside_the_steps_of_a_known_gpu(operations):
    sizes = {"M": 8192, "K": 4096, "N": 4096, "R": 16, "p": 0.0}
    rows = [
        {"op": "lora_linear", **sizes, "mode": mode, "provider": provider}
        for mode in ("forward", "step")
        for provider in operations.PROVIDERS
    ]
    operations.add_predictions(rows, "NVIDIA H100 80GB HBM3")
    predicted = [row["predicted_ms"] for row in rows]
    assert predicted[:3] == [None] * 3
    assert predicted[3] == pytest.approx(0.94, abs=0.01)
    assert predicted[4] > predicted[3]
    assert predicted[5] is None
    operations.add_predictions(rows, "Some other GPU")
    assert {row["predicted_ms"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3, 9], [2, 3, 4, 8], 30), ([3, 1], [2, 2], 0), ([1, 1], [1, 1], 20)],
)
def test_a_crossover_is_the_last_size_before_the_other_wins(operations, first, second, expected):
    sizes = [10 * (i + 1) for i in range(len(first))]
    by_size = [dict(zip(sizes, times, strict=True)) for times in (first, second)]
    assert operations.crossover(sizes, *(times.__getitem__ for times in by_size)) == expected


def test_calibration_asks_the_clock_for_both_schedules(operations, monkeypatch):
    ran = []
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, **_: real(4, 4))
    monkeypatch.setattr(torch, "mm", lambda *_: ran.append("decoded before"))
    monkeypatch.setattr(passes, "gemm_lora", lambda *a, **k: ran.append("fused"))
    monkeypatch.setattr(passes, "expand", lambda *a, **k: ran.append("added") or real(4, 4))
    monkeypatch.setattr("peftkit_kernels.storage.nf4.quantize_nf4", lambda w: w)
    monkeypatch.setattr("peftkit_kernels.storage.quantized.decode_triton", lambda q, dtype: q)
    small_m = "peftkit_kernels.storage.product.passes.small_m"
    monkeypatch.setattr(small_m, lambda *a: ran.append("decoded inside"))
    turns = {"fused": iter(range(1000)), "decoded inside": iter(range(1000))}
    wins = {"fused": 3, "decoded inside": 5}

    def clock(call):
        ran.clear()
        call()
        (first, *_) = ran
        # 20 calls and one more of each size: the schedule inside the product wins at some sizes
        return float(first in turns and next(turns[first]) >= wins[first] * 21)

    assert operations.calibrate(clock) == Calibration(fused_width=1536, small_m=64)


def test_without_a_gpu_gpu_options_are_refused_in_a_sentence(operations, arguments):
    with pytest.raises(SystemExit, match="torch sees no GPU on this machine: there is nothing"):
        operations.run(arguments(["--gpu"]))
    with pytest.raises(SystemExit, match="without them the CPU is measured"):
        operations.calibrate_and_keep()


def test_the_command_measures_what_it_is_asked(operations, arguments, monkeypatch):
    asked = []
    monkeypatch.setattr(operations, "measure", lambda *a, **k: asked.append((a, k)) or [])
    options = ["--op", "nf4", "--op", "frozen_norm", "--rounds", "3", "--providers", "peftkit"]
    assert operations.measure_all(arguments(options)) == []
    assert [a[1] for a, _ in asked] == ["dequantize_nf4", "frozen_rms_norm", "frozen_layer_norm"]
    assert asked[0][0][2] == Sizes(512, 2048, 2048)
    assert asked[0][1] == {"device": "cpu", "providers": ["peftkit"], "rounds": 3}


def test_every_benchmark_is_on_the_command_line(monkeypatch, capsys):
    run = load_script("run")
    for name in run.BENCHMARKS:
        monkeypatch.setattr(sys, "argv", ["run.py", name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            run.main()
        assert f"run.py {name}" in capsys.readouterr().out


def test_a_speed_with_other_losses_is_refused():
    steps = load_script("steps")
    peft = [{"losses": [2.0, 1.0]}]
    steps.check_losses({"peft": peft, "full": [{"losses": [2.0, 0.5]}], "peftkit": peft})
    with pytest.raises(SystemExit, match=r"peftkit: loss 1\.001 at step 1, peft has 1\.0"):
        steps.check_losses({"peft": peft, "peftkit": [{"losses": [2.0, 1.001]}]})
    with pytest.raises(SystemExit, match="providers must contain peft"):
        steps.check_losses({"peftkit": peft})


@pytest.mark.parametrize(("busy", "count"), [(0.0, 2), (1.0, 6)])
def test_a_disturbed_run_is_repeated_and_then_named(monkeypatch, busy, count):
    steps, asked = load_script("steps"), []
    quiet = steps.Guard.run.__globals__["quiet"]
    monkeypatch.setattr(quiet, "spin", lambda: 0.05)
    monkeypatch.setattr(quiet.Watch, "others", lambda self: busy)
    run = {"losses": [2.0], "step_seconds": 1.0, "first_seconds": 1.0, "tokens_per_second": 1.0}
    run |= {"peak_bytes": 2**20, "trainable": 1}
    monkeypatch.setattr(steps, "run_script", lambda *words: asked.append(words) or dict(run))
    parser = steps.argparse.ArgumentParser()
    steps.Training.add_options(parser)
    arguments = parser.parse_args(["--providers", "peft", "peftkit", "--rounds", "1"])
    result = steps.measure("tiny", arguments) | {"environment": {"cpu": "Chip", "threads": 1}}
    assert len(asked) == count
    said = "The best run of peft was disturbed: the machine was busy: other processes kept 1.00"
    assert (said in steps.table(result)) == bool(busy)


def test_documents_show_the_committed_results():
    documents = load_script("documents")
    for path, text in documents.documents().items():
        assert path.read_text() == text, f"{path.name}: run make bench ARGS=docs"


def test_documents_are_written_between_their_marks():
    documents = load_script("documents")
    page = "before\n<!-- a -->\nold\n<!-- /a -->\nafter"
    assert documents.between(page, "a", "new") == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter"
    with pytest.raises(SystemExit, match="lacks the marks <!-- b --> and <!-- /b -->"):
        documents.between(page, "b", "new")


def test_a_benchmark_writes_the_documents_only_if_asked(monkeypatch):
    run = load_script("run")
    calls = []
    monkeypatch.setattr(run.prefix, "run", lambda arguments: calls.append("measured"))
    monkeypatch.setattr(run.documents, "run", lambda arguments: calls.append("written"))
    for options in ([], ["--update-docs"]):
        monkeypatch.setattr(sys, "argv", ["run.py", "prefix", *options])
        run.main()
    assert calls == ["measured", "measured", "written"]


def gpu_row(provider, step_s, growth_gib, batch=1):
    model = {"model": "8 layers of Llama-3.1-8B", "batch": batch, "tokens": 4096}
    return {**model, "provider": provider, "step_s": step_s, "growth_gib": growth_gib}


def test_rivals_on_a_gpu_are_the_plain_ones_of_the_same_batch():
    summary = load_script("summary")
    rows = [
        gpu_row("peftkit", 0.1, 1),
        gpu_row("PEFT, checkpointed", 0.4, 1),
        gpu_row("PEFT DoRA", 0.4, 1),
        gpu_row("PEFT", 0.2, 4),
        gpu_row("Unsloth 2026.10.9", 0.05, 2),
        gpu_row("full", 0.9, 9, batch=2),
    ]
    found = summary.gpu_steps({"steps": rows})
    gib = 2**30
    assert found == {"": (0.1, gib), "PEFT": (0.2, 4 * gib), "Unsloth": (0.05, 2 * gib)}
    cells = summary._rows("GPU", found, {"full": "it did not fit"})
    assert list(cells.values()) == [
        "| GPU | PEFT | 0.50 x (100 ms : 200 ms) | 0.25 x (1.0 GiB : 4.0 GiB) |",
        "| GPU | Unsloth | 2.00 x (100 ms : 50 ms) | 0.50 x (1.0 GiB : 2.0 GiB) |",
        "| GPU | full fine-tuning | not measured: it did not fit | not measured |",
    ]


def test_the_table_says_why_a_rival_was_not_measured(monkeypatch):
    summary = load_script("summary")
    monkeypatch.setattr(summary.records, "stored", list)
    note = "Measured today. Unsloth was not measured: it does not start."
    assert summary._reasons({"note": note}) == {"Unsloth": "it does not start"}
    rows = [line for line in summary.table().splitlines() if line.startswith(("| CPU", "| GPU"))]
    assert len(rows) == 6
    assert all(" x (" in row or "not measured: " in row for row in rows)


def suite_row(provider, seconds, date="2026-01-01", **changes):
    """A stored row of the suite on smollm2."""
    library, _, method = provider.partition(" ")
    environment = {"device": "Chip (family 1, model 2)", "processor": "Chip", "gpu": None}
    environment |= {"threads": 2, "date": date}
    environment |= {"isa": "AVX2", "products": "MKL"}
    row = {"suite": "methods", "case": "smollm2", "provider": provider, "library": library}
    row |= {"method": method, "batch": 2, "length": 256, "rank": 16, "adapters": 1}
    row |= {"checkpointing": False, "isa": "native", "status": "ok", "reason": None}
    row |= {"step_seconds": seconds, "peak_bytes": 2**30, "environment": environment}
    return row | changes


def test_the_readme_shows_rows_of_the_suite_beside_those_of_training(monkeypatch):
    summary = load_script("summary")
    rows = [suite_row("peftkit lora", 0.5), suite_row("PEFT lora", 2.0)]
    rows += [suite_row("transformers full", 4.0)]
    rows += [suite_row("Unsloth lora", None, status="absent", reason="unsloth is not installed")]
    # other sizes are not shown
    rows += [suite_row("peftkit lora", 0.1, rank=8)]
    rows += [suite_row("peftkit lora", 1.0, isa="avx2"), suite_row("PEFT lora", 1.25, isa="avx2")]
    monkeypatch.setattr(summary.records, "stored", lambda: rows)
    text = summary.table()
    name = "| CPU: Chip, AVX2 |"
    assert f"{name} PEFT | 0.25 x (500 ms : 2.00 s) | 1.00 x (1.0 GiB : 1.0 GiB) |" in text
    assert f"{name} full fine-tuning | 0.12 x (500 ms : 4.00 s)" in text
    assert f"{name} Unsloth | not measured: absent: unsloth is not installed |" in text
    assert f"{name} PEFT | 0.80 x (1.00 s : 1.25 s)" in text
    assert "| CPU: AMD EPYC, AVX-512 | PEFT | " in text
    assert "Chip (family 1, model 2), 2 threads, AVX2; SmolLM2-135M" in " ".join(text.split())
    assert "benchmarks/results/chip-family-1-model-2.jsonl" in text
    assert 'make bench ARGS="methods --case smollm2 --isa avx2"' in " ".join(text.split())
    native, limited = (e for e in summary.expectations()["cpu"] if e["machine"] == "Chip")
    assert (native["step_time"], native["onednn"], native["switched_off"]) == (0.25, False, False)
    assert native["result"] == "chip-family-1-model-2.jsonl"
    assert (limited["step_time"], limited["switched_off"]) == (0.8, True)


def test_a_refused_row_does_not_reach_the_readme(monkeypatch):
    summary = load_script("summary")
    monkeypatch.setattr(summary.records, "stored", list)
    before = summary.table()
    rows = [suite_row("peftkit lora", 0.5), suite_row("PEFT lora", None, status="refused")]
    monkeypatch.setattr(summary.records, "stored", lambda: rows)
    assert summary.table() == before
