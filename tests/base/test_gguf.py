"""Models that transformers has decoded from a GGUF file are ordinary dense models."""

import base_cases
import pytest
import torch
import transformers as hf

from peftkit import base_report, explain, export_gguf, load_base, wrap

pytestmark = pytest.mark.filterwarnings("ignore:.*gguf.*")


@pytest.fixture
def decoded(tmp_path):
    """A function that reads a small Llama from GGUF."""
    base_cases.save_llama(tmp_path / "base")
    export_gguf(str(tmp_path / "base"), tmp_path / "m.gguf", tokenizer=False)
    return lambda: hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )


def rows():
    ids = torch.arange(12) % 60
    return [{"input_ids": ids, "labels": ids}] * 2


def trainer(model, folder):
    arguments = hf.TrainingArguments(
        folder, max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    return hf.Trainer(model, arguments, train_dataset=rows())


def test_transformers_itself_does_not_train_them(decoded, tmp_path):
    with pytest.raises(ValueError, match="quantized"):
        trainer(decoded(), tmp_path / "out")


def test_trainer_trains_a_wrapped_one(decoded, tmp_path):
    model = wrap(decoded())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(model, tmp_path / "out").train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if "lora_B" in n}
    assert "gguf" not in explain(model).storage


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_they_can_be_quantised(decoded, base):
    model = load_base(decoded(), base)
    assert base_report(model).kind == base
    assert model.quantization_method == "bitsandbytes"
    assert {row.path for row in explain(wrap(model).train()).layers if row.is_adapter} == {
        "fused:torch"
    }


@pytest.mark.parametrize("base", ["auto", "bf16"])
def test_they_are_saved_as_dense_models(decoded, base, tmp_path):
    model = load_base(decoded(), base)
    model.save_pretrained(tmp_path / "dense")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert not hasattr(again.config, "quantization_config")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
