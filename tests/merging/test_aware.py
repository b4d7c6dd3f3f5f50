"""Models tuned with ``merge_into``: the merge stores the weights that were tuned, so everything is kept."""

import merge_cases as cases
import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig

from peftkit import ContractError, merge, wrap

pytestmark = pytest.mark.usefixtures("one_thread")

BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose rows are whole blocks of 64."""
    config = models.tiny("llama").config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    model = hf.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def tuned(folder, kind, aware, lr=1e-2):
    torch.manual_seed(0)
    config = hf.BitsAndBytesConfig(**BITS[kind])
    base = hf.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    into = ("int8" if kind == "int8" else "nf4") if aware else None
    model = wrap(base, LoraConfig(r=4, target_modules="all-linear"), merge_into=into).train()
    batch = cases.inputs(rows=8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(12):
        optimiser.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
    return model.eval(), batch


@pytest.mark.parametrize("rounding", ["nearest", "outputs"])
@pytest.mark.parametrize("dtype", ["base", "fp32"])
@pytest.mark.parametrize("kind", BITS)
def test_everything_is_kept(kind, dtype, rounding, folder, tmp_path):
    model, batch = tuned(folder, kind, True)
    found = merge(model, tmp_path / "merged", dtype, rounding=rounding, probe=batch)
    assert found.recovery > 1 - 1e-6
    assert found.outputs.effect > 0.01
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if kind != "int8" or dtype == "fp32":  # bitsandbytes would quantise the activations
        torch.testing.assert_close(
            cases.logits(loaded, batch), cases.logits(model, batch), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["nf4", "nested"])
def test_without_it_nearest_rounding_keeps_less(kind, folder, tmp_path):
    model, batch = tuned(folder, kind, False, 1e-3)
    options = {"rounding": "nearest", "probe": batch}
    found = merge(model, tmp_path / "merged", "base", min_recovery=None, **options)
    assert found.recovery < 0.95
    with pytest.raises(ContractError, match="below min_recovery"):
        merge(model, tmp_path / "refused", "base", min_recovery=0.95, **options)
