"""LoRA+: the groups hold every trainable parameter once, at the rates of the paper, and train."""

import models
import pytest
import torch
import transformers as hf
from integration.support import arguments, rows
from peft import LoraConfig

from peftkit import lora_plus_groups, wrap

pytestmark = pytest.mark.usefixtures("one_thread")


def by_name(model, groups):
    """``(lr, weight_decay)`` of every parameter by its name."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


def test_every_trainable_parameter_has_its_rate():
    model = wrap(models.tiny("llama"), LoraConfig(r=4, use_dora=True, modules_to_save=["lm_head"]))
    groups = lora_plus_groups(model, lr=1e-3, ratio=8, weight_decay=0.1)
    rates = by_name(model, groups)
    assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    expected = {"lora_A": (1e-3, 0.1), "lora_B": (8e-3, 0.1), "lora_magnitude": (1e-3, 0.0)}
    for name, rate in rates.items():
        key = next((key for key in expected if key in name), None)
        assert rate == expected.get(key, (1e-3, 0.1)), name
    assert [g["name"] for g in groups] == ["other", "lora_B", "other, no decay"]
    assert all(g["params"] for g in groups)


@pytest.mark.parametrize(
    ("embedding_lr", "expected"), [(None, (1e-3, 16e-3)), (1e-6, (1e-6, 1e-6))]
)
def test_embeddings(embedding_lr, expected):
    model = wrap(models.tiny("llama"), LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    rates = by_name(model, lora_plus_groups(model, lr=1e-3, embedding_lr=embedding_lr))
    for letter, rate in zip("AB", expected, strict=True):
        (found,) = {r for n, (r, _) in rates.items() if f"lora_embedding_{letter}" in n}
        assert found == rate
    assert {r for n, (r, _) in rates.items() if "q_proj.lora_B" in n} == {16e-3}


def test_experts_and_a_bias_of_an_adapter_belong_to_b():
    model = wrap(models.tiny("opt"), LoraConfig(target_modules=["fc1"], lora_bias=True))
    rates = by_name(model, lora_plus_groups(model, lr=1e-3, ratio=4, weight_decay=0.1))
    assert {rate for name, rate in rates.items() if name.endswith("lora_B.default.bias")} == {
        (4e-3, 0.0)
    }


def test_an_optimiser_moves_b_faster():
    model = wrap(models.tiny("llama"), LoraConfig(r=4, init_lora_weights=False))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-3, ratio=16))
    model(**models.batch("llama")).loss.backward()
    optimizer.step()
    # Adam's first step moves every element by the learning rate
    after = {n: p.detach() for n, p in model.named_parameters()}
    moved = {n: (after[n] - p).abs().max().item() for n, p in before.items()}
    for name, distance in moved.items():
        rate = 16e-3 if "lora_B" in name else 1e-3
        assert distance == pytest.approx(rate, rel=1e-2), name


def test_trainer_schedules_all_groups_alike(tmp_path):
    model = wrap(models.tiny("llama"), LoraConfig(r=4))
    optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-3, ratio=16))
    settings = arguments(tmp_path, max_steps=4, lr_scheduler_type="linear", learning_rate=1e-3)
    trainer = hf.Trainer(model, settings, train_dataset=rows(8), optimizers=(optimizer, None))
    seen = []

    class Watch(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    trainer.add_callback(Watch())
    trainer.train()
    assert len(seen) == 4
    assert all(b == pytest.approx(16 * a) for a, b in seen)
    assert seen[0][0] > seen[-1][0]


def test_the_documented_trainer_subclass(tmp_path):
    class LoraPlusTrainer(hf.Trainer):
        def create_optimizer(self, *args):
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr")
            groups = lora_plus_groups(self.model, lr=self.args.learning_rate)
            self.optimizer = cls(groups, **options)
            return self.optimizer

    model = wrap(models.tiny("llama"), LoraConfig(r=4))
    settings = arguments(tmp_path, max_steps=2, learning_rate=1e-3)
    trainer = LoraPlusTrainer(model, settings, train_dataset=rows(8))
    trainer.train()
    assert [g["initial_lr"] for g in trainer.optimizer.param_groups] == [1e-3, 16e-3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr": 1e-3, "ratio": 0.5}, "ratio=0.5 must be at least 1"),
        ({"lr": 1e-3, "weight_decay": -1.0}, "weight_decay=-1.0 must not be negative"),
        ({"lr": 1e-3, "embedding_lr": 0.0}, "embedding_lr=0.0 must be positive"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        lora_plus_groups(wrap(models.tiny("llama")), **options)


def test_a_model_without_adapter():
    with pytest.raises(ValueError, match="no trainable lora_B; add a LoRA adapter first"):
        lora_plus_groups(models.tiny("llama"), lr=1e-3)
