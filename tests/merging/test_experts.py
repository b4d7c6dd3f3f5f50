"""Stacks of experts: adapters on parameters, and files in the layout of the architecture's checkpoints."""

import merge_cases as cases
import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from peftkit import merge

pytestmark = pytest.mark.usefixtures("one_thread")

_SIZES = {
    "vocab_size": models.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
}


def mixtral():
    torch.manual_seed(0)
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES)).eval()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], []]
)
def test_experts(parameters, dtype, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    model = cases.trained(get_peft_model(mixtral(), config))
    batch = cases.inputs()
    tuned = cases.logits(model, batch)
    found = merge(model, tmp_path / "merged", dtype, probe=batch, max_shard_size="50KB")
    assert found.recovery > (1 - 1e-8 if dtype == "fp32" else 0.99)
    written, reference = cases.tensors(tmp_path / "merged"), cases.by_peft(model, tmp_path / "peft")
    assert written.keys() == reference.keys()
    assert any(".experts.0." in name for name in written), "not the layout of Mixtral's checkpoints"
    if dtype == "fp32":
        for name, tensor in reference.items():
            assert torch.equal(written[name], tensor), name
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    close = 1e-4 if dtype == "fp32" else 0.05
    torch.testing.assert_close(cases.logits(loaded, batch), tuned, rtol=close, atol=close)
