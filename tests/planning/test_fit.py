"""Settings that fit: never one that the plan refuses, and what is nearest if there is none."""

import functools

import finetune_cases
import pytest
import yaml
from planning import cases

from peftkit import ContractError, fit, plan
from peftkit.planning import search
from peftkit.planning.recipe import METHODS

BENCHMARK = cases.benchmark()
AXES = {"base": ["fp32", "bf16"], "seq_len": 64, "rank": 4, "batch_size": [1, 2, 4, 8]}


@pytest.fixture
def remembered(monkeypatch):
    """Make each plan once."""
    known = {}

    @functools.wraps(plan)
    def planned(model, *configs, **options):
        key = str((configs, sorted(options.items())))
        if key not in known:
            known[key] = plan(model, *configs, **options)
        made = known[key]
        return type(made)(**made.to_dict())

    monkeypatch.setattr(search, "plan", planned)
    return planned


def test_only_what_fits_is_proposed_for_any_budget(remembered):
    config = cases.llama()
    least, most = (
        remembered(config, *search.configs_of("lora", 4), base=base, batch_size=size, seq_len=64,
                   optimizer="adamw_fused", checkpointing=checkpoints, device="cpu", keep=(), auto_class=None).peak_bytes
        for base, size, checkpoints in (("bf16", 1, True), ("fp32", 8, False))
    )  # fmt: skip
    proposed = set()
    for step in range(20):
        budget = round(least * 0.95 + step / 19 * (most - 0.95 * least))
        found = fit(config, budget, device="cpu", **AXES)
        if budget < least:
            assert not found.options
            assert found.nearest.reserved_bytes == least
            assert found.lacking_bytes == least - budget
            assert "more: base bf16, batch_size 1" in str(found)
            continue
        assert found.options
        assert found.nearest is None
        assert found.options[0].relative == 1.0
        for option in found.options:
            settings = {
                k: v
                for k, v in option.plan.settings.items()
                if k not in ("model", "method", "rank")
            }
            again = remembered(
                config, *search.configs_of("lora", 4), **settings, keep=(), auto_class=None
            )
            assert again.reserved_bytes == option.plan.reserved_bytes <= budget
            larger = AXES["batch_size"].index(settings["batch_size"]) + 1
            if larger < 4:
                settings["batch_size"] = AXES["batch_size"][larger]
                too_large = remembered(
                    config, *search.configs_of("lora", 4), **settings, keep=(), auto_class=None
                )
                assert not too_large.fits(budget)
            proposed.add((settings["base"], settings["checkpointing"]))
    assert proposed == {(b, c) for b in ("fp32", "bf16") for c in (False, True)}


@pytest.mark.slow
def test_real_steps_fit_into_the_budget_for_which_they_were_proposed(remembered, one_thread):
    benchmark = cases.benchmark()
    config = benchmark.config_of(benchmark.PlannedCase("llama", "lora"))
    measured, proposed = {}, set()
    for step in range(20):
        budget = (17 + 8 * step) * 2**20
        options = {"base": ["fp32", "int8", "nf4"], "batch_size": [1, 2, 4, 8]}
        found = fit(config, budget, seq_len=[64, 128, 256], device="cpu", **options)
        assert found.options
        for option in found.options[:2]:
            settings = option.plan.settings
            case = benchmark.PlannedCase(
                *("llama", "lora", settings["base"], settings["batch_size"], settings["seq_len"]),
                *(settings["checkpointing"], settings["optimizer"]),
            )
            if case not in measured:
                measured[case], _ = benchmark.measured_peak(case)
            assert measured[case] <= budget, case
            proposed.add(case)
    assert len(proposed) > 10


def test_a_card_has_its_memory_less_what_its_driver_needs():
    found = fit(cases.llama(), device="T4", seq_len=64, batch_size=1, checkpointing=False)
    assert found.budget_bytes == 16 * 10**9 - search.CONTEXT_BYTES
    assert {option.plan.settings["base"] for option in found.options} == {"fp16", "int8", "nf4"}
    assert all(option.plan.basis == "predicted" for option in found.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "24 bananas"}, "budget='24 bananas' is no size; write"),
        ({"budget": -1}, "budget=-1 must be positive"),
        ({"budget": None}, "budget=None: the CPU has no fixed memory"),
        ({"budget": 1, "method": "magic"}, "method='magic' is unknown; use one of lora"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ContractError, match=message):
        fit(cases.llama(), **options, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_written_as_a_recipe_that_trains(method, tmp_path, one_thread):
    model = finetune_cases.save_model(tmp_path / "m", "llama", chat=True)
    rows = finetune_cases.write_jsonl(tmp_path / "rows.jsonl", finetune_cases.chats(8))
    file = tmp_path / "recipe.yaml"
    sizes = ["--seq-len", "32", "--rank", "4", "--batch-size", "2", "--no-checkpointing"]
    budget = ["--fit", "1GiB", "--base", "fp32", "--device", "cpu"]
    finetune_cases.run("plan", model, "--method", method, *sizes, *budget, "--out", file)
    settings = [f"data.train={rows}", f"out={tmp_path / 'run'}", "training.max_steps=1"]
    finetune_cases.run("train", file, "task=sft", *settings, "training.samples=0", "--quiet")
    trained = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert trained["strategy"]["name"] == {"dora": "lora"}.get(method, method)
    assert trained["strategy"].get("use_dora", False) == (method == "dora")
    written = trained["training"]
    assert (written["batch_size"], written["seq_len"]) == (2, 32)
    assert written["optimizer"] in ("adamw_torch_fused", "adamw_8bit")
    assert "peftkit train" in file.read_text()


def test_models_without_checkpointing_and_without_text():
    images = BENCHMARK.config_of(BENCHMARK.PlannedCase("convnext", "full"))
    found = fit(images, "300MiB", device="cpu", method="full", optimizer="sgd")
    assert {option.plan.settings["checkpointing"] for option in found.options} == {False}
    with pytest.raises(ContractError, match="does not support gradient checkpointing; use"):
        fit(images, "300MiB", device="cpu", method="full", checkpointing=True)
    sound = BENCHMARK.config_of(BENCHMARK.PlannedCase("wav2vec2", "full"))
    found = fit(sound, "2GiB", device="cpu", base="fp32", batch_size=1, checkpointing=True)
    assert {option.plan.settings["seq_len"] for option in found.options} == {80000, 160000, 240000}
