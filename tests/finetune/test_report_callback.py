"""``ReportCallback``: what the page of a training has, and that it changes nothing."""

import re

import finetune_cases as cases
import pytest
import torch
from browser import in_browser  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peftkit import ContractError, ReportCallback, plan, wrap


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.save_model(tmp_path_factory.mktemp("model") / "m", "llama", chat=True)


def trained(folder, out, callbacks, tokenizer=None, **options):
    torch.manual_seed(0)
    model = wrap(AutoModelForCausalLM.from_pretrained(folder))
    rows = [{"input_ids": list(range(4, 20)), "labels": list(range(4, 20))}] * 8
    arguments = TrainingArguments(
        str(out),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=11,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:2],
        processing_class=tokenizer,
        data_collator=lambda batch: {k: torch.tensor([r[k] for r in batch]) for k in batch[0]},
        callbacks=callbacks,
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_page_has_curves_settings_memory_answers_and_machine(folder, tmp_path, in_browser):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = tmp_path / "deep" / "report.html"
    chat = [{"role": "user", "content": "say <it>"}]
    planned = plan(str(folder), device="cpu", batch_size=2, seq_len=16)
    callback = ReportCallback(path, prompts=["one two", chat], max_new_tokens=4, plan=planned)
    with_report = trained(
        folder, tmp_path / "a", [callback], tokenizer, eval_strategy="steps", eval_steps=2
    )
    without = trained(folder, tmp_path / "b", [], tokenizer, eval_strategy="steps", eval_steps=2)
    assert with_report.keys() == without.keys()
    assert all(with_report[name].equal(without[name]) for name in without)
    text = path.read_text()
    for part in (
        "Training loss",
        "Evaluation loss",
        "Norm of the gradients",
        "<td>seed</td><td>11</td>",
        "<td>learning rate</td><td>0.001</td>",
        "LORA r=16, lora_alpha=32",
        "user: say &lt;it&gt;",
        "before training",
        "after training",
        "planned",
        "measured",
        "processor",
        "100% of the adapter layers are fused",
    ):
        assert part in text, part
    assert "still running" not in text
    assert not re.search(r"\b(src|href)=|https?://", text)
    width = in_browser(text, "document.documentElement.scrollWidth", width=390)
    assert width == 390


def test_a_stopped_training_leaves_a_page_that_says_so(folder, tmp_path):
    class Stop(ReportCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 3:
                raise KeyboardInterrupt

    path = tmp_path / "report.html"
    with pytest.raises(KeyboardInterrupt):
        trained(folder, tmp_path / "a", [Stop(path)], eval_strategy="steps", eval_steps=1)
    assert "still running, or it was stopped" in path.read_text()
    assert "step 2 of 4" in path.read_text()


def test_prompts_need_a_tokenizer_and_a_list(folder, tmp_path):
    with pytest.raises(
        ContractError, match=r"prompts=\['a'\] need a tokenizer; pass processing_class"
    ):
        trained(folder, tmp_path / "a", [ReportCallback(tmp_path / "r.html", prompts=["a"])])
    with pytest.raises(ContractError, match="prompts='a' is one text; pass a list"):
        ReportCallback(prompts="a")


def test_trl(tmp_path, folder):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    arguments = trl.SFTConfig(
        str(tmp_path / "a"),
        max_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(
        wrap(AutoModelForCausalLM.from_pretrained(folder)),
        arguments,
        train_dataset=Dataset.from_list(cases.chats(8)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[ReportCallback(tmp_path / "report.html", prompts=["one"], max_new_tokens=2)],
    )
    trainer.train()
    text = (tmp_path / "report.html").read_text()
    assert "Accuracy of the next token" in text
    assert "Training loss" in text
