"""DPO: its loss is the formula's, that of plain PEFT and exact after a resume; faulty rows and adapters without a reference are named."""

import contextlib
import copy
import json
from types import SimpleNamespace

import finetune_cases as cases
import models
import pairs
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from peftkit import ContractError, accelerate
from peftkit.finetune import evaluate, read_recipe, train
from peftkit.finetune.tasks.base import Setting
from peftkit.finetune.tasks.preference import Preference, _require_reference
from peftkit.finetune.trainer import make_trainer

# TRL reads this name, which transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def choices(count=20):
    """Small letters are better than capital ones."""
    letters = [chr(97 + i % 26) for i in range(count)]
    return [
        {"prompt": f"say {c}", "chosen": c * (2 + i % 2), "rejected": c.upper() * (1 + i % 3)}
        for i, c in enumerate(letters)
    ]


def talk(*contents, first="user"):
    """Messages by turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def task(chat=True, **options):
    return Preference(Setting(cases.letter_tokenizer(chat), 64, Preference.Options(**options)))


def encoded(row, **options):
    (one,) = task(**options).encode(row)
    return one.features


def test_texts_and_conversations_are_the_same_rows():
    text = encoded({"prompt": "hi", "chosen": "ab", "rejected": "c"})
    answers = {"chosen": talk("ab", first="assistant"), "rejected": talk("c", first="assistant")}
    assert encoded({"prompt": talk("hi"), **answers}) == text
    whole = {"chosen": talk("hi", "ab"), "rejected": talk("hi", "c")}
    assert encoded(whole) == encoded({"prompt": "hi", **whole}) == text
    as_json = {name: json.dumps(value) for name, value in whole.items()}
    assert encoded(as_json) == text
    # <u>hi</s><a> and the answer with its end
    assert text["chosen_mask"] == [0] * 5 + [1] * 3
    assert text["rejected_mask"] == [0] * 5 + [1] * 2
    assert encoded({"prompt": "[{", "chosen": "[{a", "rejected": "c"})["rejected_mask"][-1] == 1
    system = encoded(whole, system="be")
    assert len(system["chosen_ids"]) > len(text["chosen_ids"])
    shown = task().render(text)
    assert shown == "<u>hi</s><a>«ab</s>» > <u>hi</s><a>«c</s>»"
    ids, answer = task().prompt(whole)
    assert (task().setting.tokenizer.decode(ids), answer) == ("<u>hi</s><a>", "ab")


FAULTS = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "d.jsonl:3: no column 'rejected'"),
    "no prompt": (
        {"chosen": "a", "rejected": "b"},
        "no column 'prompt', and column 'chosen' has no message before its answer",
    ),
    "a number": ({"prompt": "a", "chosen": 3, "rejected": "b"}, "column 'chosen' is 3, neither"),
    "the same answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "nothing to prefer"),
    "two prompts": (
        {"chosen": talk("a", "b"), "rejected": talk("c", "d")},
        "chosen and rejected answer different prompts",
    ),
    "another prompt": (
        {"prompt": "x", "chosen": talk("a", "b"), "rejected": talk("a", "d")},
        "the messages before the answer in column 'chosen' are not the prompt",
    ),
    "no answer": (
        {"prompt": "x", "chosen": talk("a", "b", "c"), "rejected": "d"},
        "the messages before the answer in column 'chosen' are not the prompt",
    ),
    "a question as answer": (
        {"prompt": "x", "chosen": talk("a"), "rejected": "d"},
        "the last message of column 'chosen' has the role 'user', not assistant",
    ),
    "an empty list": ({"prompt": "x", "chosen": [], "rejected": "d"}, "column 'chosen' is empty"),
    "answers of the same start": (
        {"prompt": "x", "chosen": "y" * 80 + "a", "rejected": "y" * 80 + "b"},
        "chosen and rejected are the same in the first 64 tokens",
    ),
    "a prompt that is too long": (
        {"prompt": "x" * 80, "chosen": "a", "rejected": "b"},
        "no label is left that the loss could use: it has 85 tokens",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_named_with_its_line(fault, model, tmp_path, one_thread):
    row, expected = FAULTS[fault]
    data = cases.write_jsonl(tmp_path / "d.jsonl", [*choices(2), row])
    values = cases.recipe(model, "preference", data, tmp_path / "run", training={"seq_len": 64})
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    printed = cases.run("train", file, code=1)
    assert "d.jsonl:3: " in printed
    assert expected in printed
    assert not (tmp_path / "run").exists()


ADAPTERS = {
    "dropout": ({"name": "lora", "lora_dropout": 0.1}, "lora_dropout=0.1 has no effect"),
    "biases": ({"name": "lora", "bias": "all"}, "bias='all' trains biases of the model itself"),
    "a start with an effect": (
        {"name": "lora", "init_lora_weights": "pissa"},
        "changes the logits by .* before training, but the reference",
    ),
    "a prefix without a gate": ("prefix", "prefix with gate=true"),
    "an adapter on the head": (
        {"name": "lora", "target_modules": ["q_proj", "lm_head"]},
        "TRL's DPOTrainer refuses this model",
    ),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(adapter, model, tmp_path, one_thread):
    strategy, expected = ADAPTERS[adapter]
    with pytest.raises(ContractError, match=expected):
        train(cases.recipe(model, "preference", choices(4), tmp_path / "run", strategy=strategy))
    assert not (tmp_path / "run").exists()


def test_settings_without_an_effect_are_refused(model, tmp_path):
    values = cases.recipe(model, "preference", choices(4), tmp_path / "run")
    with pytest.raises(ContractError, match=r"training.label_smoothing=0.1 has no effect"):
        read_recipe(values, ["training.label_smoothing=0.1"])


def trainer_of(model, tmp_path, **options):
    """The trainer of the task for a model, and four batches."""
    values = cases.recipe("m", {"name": "preference", **options}, choices(), tmp_path / "run")
    one = task(**options)
    rows = [one.encode(row)[0].features for row in choices()]
    trainer = make_trainer(
        read_recipe(values), one, model, Dataset.from_list(rows), None, str(tmp_path)
    )
    return trainer, [one.collate(rows[i : i + 5]) for i in range(0, 20, 5)]


def by_formula(model, batch, beta, loss):
    """The loss of Rafailov et al., 2023, equation 7, of SLiC and of IPO, from logits."""
    logps = []
    for adapted in (True, False):
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
        if adapted:
            logits = model(**inputs).logits
        else:
            with torch.no_grad(), model.disable_adapter():
                logits = model(**inputs).logits
        tokens = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        mask = batch["completion_mask"][:, 1:]
        logps.append((tokens * mask).sum(1) / (mask.sum(1) if loss == "ipo" else 1))
    chosen, rejected = (logps[0] - logps[1]).chunk(2)
    margin = chosen - rejected
    if loss == "ipo":
        return ((margin - 1 / (2 * beta)) ** 2).mean()
    if loss == "hinge":
        return torch.relu(1 - beta * margin).mean()
    return -torch.nn.functional.logsigmoid(beta * margin).mean()


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_the_loss_is_that_of_the_formula_and_of_plain_peft(loss, tmp_path, one_thread):
    plain = pairs.stock("llama", task_type="CAUSAL_LM")
    fused = accelerate(copy.deepcopy(plain))
    truth = pairs.in_float64(plain)
    steps = []
    for name, model in (("fused", fused), ("plain", plain)):
        trainer, batches = trainer_of(model, tmp_path / name, beta=0.3, loss=loss)
        assert "ref" not in model.peft_config
        steps.append([pairs.step(model, batch, trainer.compute_loss) for batch in batches])
    steps.append([pairs.step(truth, b, lambda m, b: by_formula(m, b, 0.3, loss)) for b in batches])
    pairs.assert_near_enough(list(zip(*steps, strict=True)))


def test_the_losses_of_a_run_are_those_of_plain_peft(model, tmp_path, one_thread):
    values = cases.recipe(
        model, "preference", choices(), tmp_path / "run", training={"max_steps": 12}
    )
    train(values)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    fused = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    recipe = read_recipe(values)
    config = LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", target_modules="all-linear")
    base = models.hf.AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(recipe.training.seed)
    plain = get_peft_model(base, config)
    one = task()
    rows = [one.encode(row)[0].features for row in choices()]
    data = Dataset.from_list(rows)
    trainer = make_trainer(recipe, one, plain, data, None, str(tmp_path / "plain"))
    trainer.train()
    stock = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert fused[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert fused == pytest.approx(stock, abs=1e-5)
    assert fused[-1] < 0.6, "weights that hardly move would hide a wrong gradient"


@pytest.mark.parametrize(("change", "accepted"), [(1e-4, True), (2e-3, False)])
def test_rounding_is_not_taken_for_an_effect_of_a_new_adapter(change, accepted):
    class Model(torch.nn.Linear):
        """A model whose logits are others with its adapter, as those of a quantised base with thirty layers."""

        config = models.tiny("llama").config
        factor = 1 + change

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=self.factor * torch.ones(*input_ids.shape, 4))

        @contextlib.contextmanager
        def disable_adapter(self):
            self.factor = 1
            yield

    if accepted:
        _require_reference(Model(1, 1))
        return
    with pytest.raises(ContractError, match=r"the new adapter changes the logits by 0.002 before"):
        _require_reference(Model(1, 1))


STRATEGIES = {
    "lora": {"name": "lora", "r": 4},
    "lora on nf4": {"name": "lora", "r": 4},
    "dora on int8": {"name": "lora", "r": 4, "use_dora": True},
    "gated prefix": {"name": "prefix", "gate": True},
    "full": "full",
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, model, tmp_path, one_thread):
    data = cases.write_jsonl(tmp_path / "d.jsonl", choices())
    values = cases.recipe(
        model,
        "preference",
        data,
        tmp_path / "whole",
        strategy=STRATEGIES[name],
        base=name.partition(" on ")[2] or "auto",
        data={"eval": 0.25},
        training={"max_steps": 6, "checkpoint_every": 3, "samples": 1, "gradient_accumulation": 2},
    )
    file = cases.write_recipe(tmp_path / "r.yaml", values)
    cases.run("train", file)
    out = f"out={tmp_path / 'parts'}"
    assert "stopped after step 4" in cases.run("train", file, out, "training.stop_after=4", code=3)
    assert "resuming from checkpoint-4" in cases.run("train", file, out, "resume=true")
    results = []
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        result = json.loads((folder / "result.json").read_text())
        # The reference of a finished run is the model before training, not the trained one.
        found = evaluate(folder)
        assert found["rewards/margins"] == result["metrics"]["eval_rewards/margins"] != 0
        results.append((result["metrics"], found))
        assert not list(folder.rglob("*/ref"))
    assert results[0] == results[1]
    weights = [sorted((tmp_path / f).glob("*/*model.safetensors")) for f in ("whole", "parts")]
    assert weights[0][0].read_bytes() == weights[1][0].read_bytes()
    logged = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert '"rewards/accuracies"' in logged
    assert '"final_rewards/accuracies"' in logged
