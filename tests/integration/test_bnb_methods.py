"""Prefixes, bottlenecks and mixes on a 4-bit bitsandbytes base: the function of the decoded base, trained by the Trainer."""

import bitsandbytes as bnb
import methods
import models
import peft
import pytest
import torch
import transformers as hf
from integration.support import adapter_tensors, largest_difference, trainer

from lab.testing import assert_no_worse_than
from peftkit import load_adapter
from peftkit.find.points import find_points
from peftkit.fuse.storage import nf4_weight
from peftkit_kernels.storage.nf4.reference import dequantize_nf4_reference

every = pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "LoRA"])


@pytest.fixture
def quantized(tmp_path):
    """Load the tiny Llama with NF4 linears, ready for training."""
    models.tiny("llama").save_pretrained(tmp_path / "base")

    def load():
        settings = hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings, dtype=torch.float32
        )
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    return load


def decoded(quantized_model):
    """The same base with its weights as numbers."""
    base = models.tiny("llama")
    for name, module in quantized_model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = dequantize_nf4_reference(nf4_weight(module), torch.float32)
            base.get_submodule(name).weight.data.copy_(weight)
    return base


def packed_weights(model):
    """4-bit weights by name."""
    return [(n, p) for n, p in model.named_parameters() if hasattr(p, "quant_state")]


def logits(model, ids):
    """In training mode: in evaluation bitsandbytes repacks its weights for the CPU, with block maxima rounded to bfloat16."""
    with torch.no_grad():
        return model.train()(input_ids=ids).logits


def test_finding_the_places_leaves_the_packed_weights_alone(quantized):
    model = quantized().eval()
    before = {n: (p.detach().clone(), p.quant_state.absmax) for n, p in packed_weights(model)}
    assert len(before) == 14
    find_points(model)
    for name, weight in packed_weights(model):
        assert torch.equal(weight, before[name][0]), name
        assert weight.quant_state.absmax is before[name][1], name
    assert not any(module.training for module in model.modules())


@every
def test_the_function_of_the_decoded_base(method, quantized, tmp_path):
    ids = models.batch("llama")["input_ids"]
    base = quantized()
    plain = methods.trained(methods.on(decoded(base), method))
    model = methods.trained(methods.on(base, method))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    actual, expected = logits(model, ids), logits(plain, ids)
    assert_no_worse_than(actual, expected, logits(plain.double(), ids))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(quantized(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), actual)
    with model.disable_adapter():
        assert not torch.equal(logits(model, ids), actual)


def loss_of(model, batch):
    """In evaluation: losses of different batches of random texts would not tell learning from chance."""
    with torch.no_grad():
        return model.eval()(**batch).loss


@pytest.mark.parametrize("method", ["parallel", "prefix", "all three"])
def test_trainer_trains_the_adapter_and_nothing_else(method, quantized, tmp_path):
    model = methods.on(quantized(), method)
    packed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = adapter_tensors(model)
    run = trainer(model, tmp_path, max_steps=10, learning_rate=1e-2)
    batch = next(iter(run.get_train_dataloader()))
    before = loss_of(model, batch)
    run.train()
    assert loss_of(model, batch) < before
    assert largest_difference(adapter_tensors(model), start) > 1e-3
    assert all(torch.equal(model.get_parameter(n), p) for n, p in packed.items())
