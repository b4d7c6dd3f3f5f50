"""Trainer and SFTTrainer on the bases of ``load_base``: training stops and resumes bit for bit; stock PEFT reads the adapter."""

import base_cases
import pytest
import torch
import transformers as hf
from integration.support import adapter_tensors, fused_calls, largest_difference, trainer
from integration.test_trl import sft
from peft import PeftModel

from peftkit import LoraConfig, load_base, wrap

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

BASES = {
    "nf4": ("nf4", {}),
    "int8": ("int8", {}),
    "int8 compute": ("int8", {"int8_mode": "compute"}),
    "nf4 merge-aware": ("nf4", {"merge_into": "nf4"}),
    "fp8": ("fp8", {}),
}
every_base = pytest.mark.parametrize("name", BASES)
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with the tokens of the tokenizer of the tests."""
    path = tmp_path_factory.mktemp("base")
    return base_cases.save_llama(path, dtype=torch.float32, vocab_size=96)


def adapted(folder, name):
    base, options = BASES[name]
    torch.manual_seed(0)
    return wrap(load_base(folder, base), LoraConfig(r=4, task_type="CAUSAL_LM"), **options)


def assert_resumes(whole, rest, checkpoint):
    """The second run, from the checkpoint of the first, ends with the same adapter."""
    before = {name: value.clone() for name, value in adapter_tensors(whole.model).items()}
    whole.train()
    assert largest_difference(adapter_tensors(whole.model), before) > 0
    with fused_calls() as calls:
        rest.train(resume_from_checkpoint=str(checkpoint))
    assert sum(calls.values()) > 0
    assert rest.losses == whole.losses[2:]
    assert largest_difference(adapter_tensors(rest.model), adapter_tensors(whole.model)) == 0


@every_base
def test_trainer_resumes(folder, name, tmp_path):
    runs = [trainer(adapted(folder, name), tmp_path / part, **SAVING) for part in ("whole", "rest")]
    assert_resumes(*runs, tmp_path / "whole" / "checkpoint-2")


@every_base
def test_sft_trainer_resumes(folder, name, tokenizer, tmp_path):
    runs = [
        sft(adapted(folder, name), tokenizer, tmp_path / part, **SAVING)
        for part in ("whole", "rest")
    ]
    for run in runs:
        # TRL makes them bfloat16 on bitsandbytes' layers, and PEFT loads a checkpoint's in float32, so a run would not resume exactly
        wanted = torch.float32 if name == "fp8" else torch.bfloat16
        assert {p.dtype for p in adapter_tensors(run.model).values()} == {wanted}
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    assert_resumes(*runs, tmp_path / "whole" / "checkpoint-2")


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_stock_peft_with_bitsandbytes_gives_the_same_outputs(folder, name, tmp_path):
    run = trainer(adapted(folder, name), tmp_path, max_steps=4)
    run.train()
    run.model.save_pretrained(tmp_path / "adapter")
    config = base_cases.settings(name, torch.float32)
    base = hf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(24).view(2, 12)

    def logits(model):
        # in evaluation bitsandbytes itself computes in bfloat16 on some CPUs
        with torch.no_grad():
            return model.train()(input_ids=ids).logits

    found, expected = logits(run.model), logits(stock)
    with stock.disable_adapter():
        trained = expected - logits(stock)
    # far less than what was trained changes
    assert (found - expected).norm() < 1e-3 * trained.norm()
