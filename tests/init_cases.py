"""A Llama with rows of whole blocks in every storage, new adapters on it, and weights computed from definitions."""

import base_cases as cases
import models
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig
from safetensors.torch import load_file

from peftkit import load_base, wrap

NAMES = ["q_proj", "v_proj", "down_proj"]
PICKED = "model.layers.1.self_attn.v_proj"


def saved(folder):
    """A checkpoint whose weights have a few large singular values and a long tail, as trained ones do."""
    cases.save_llama(folder, dtype=torch.float32, shards="60KB")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        generator = torch.Generator().manual_seed(len(tensors))
        for name, weight in tensors.items():
            if weight.ndim == 2 and "embed" not in name:
                N, K = weight.shape
                left, right = (torch.randn(n, 3, generator=generator) for n in (N, K))
                weight += 0.02 * left @ right.T
        cases.save_file(tensors, file, metadata={"format": "pt"})
    return folder


def configured(init=True, **changes):
    return LoraConfig(r=4, lora_alpha=12, target_modules=NAMES, init_lora_weights=init, **changes)


def adapted(folder, base="nf4", init=True, **changes):
    """The base with a new adapter of scale 3."""
    torch.manual_seed(0)
    return wrap(load_base(folder, base, dtype="float32"), configured(init, **changes))


def loftq(bits=4, iterations=1):
    """PEFT's class refuses LoftQ without scipy, which nothing here needs."""
    config = configured()
    config.init_lora_weights = "loftq"
    config.loftq_config = {"loftq_bits": bits, "loftq_iter": iterations}
    return config


def originals(folder):
    """The weights of the adapted layers in float64, by layer."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    ends = tuple(f"{name}.weight" for name in NAMES)
    return {n.removesuffix(".weight"): t.double() for n, t in tensors.items() if n.endswith(ends)}


def decoded(linear):
    """The weight of a linear in float64, by bitsandbytes' own functions."""
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        return bnb.dequantize_4bit(weight.data, state).double()
    if type(weight).__name__ == "Int8Params":
        held = weight if weight.SCB is not None else linear.state
        return held.CB.double() * held.SCB.double()[:, None] / 127
    return weight.detach().double()


def parts(model, adapter="default"):
    """By layer: the decoded base weight, and ``scale · B A`` of its adapter, in float64."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "base_layer") and adapter in layer.lora_A:
            A, B = (
                getattr(layer, f)[adapter].weight.detach().double() for f in ("lora_A", "lora_B")
            )
            found[name] = decoded(layer.base_layer), layer.scaling[adapter] * B @ A
    return found


def relative(value, truth):
    return (torch.linalg.norm(value) / torch.linalg.norm(truth)).item()


def logits(model):
    """In training mode, in which bitsandbytes does not repack weights on the CPU."""
    with torch.no_grad():
        return model.train()(input_ids=models.batch("llama")["input_ids"]).logits


def trained(model, steps=3):
    """Run a few steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for seed in range(steps):
        model(**models.batch("llama", seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
