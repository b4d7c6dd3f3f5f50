"""Small checkpoints for the tests of ``peftkit.load_base``, and comparisons of loaded models."""

import json
from pathlib import Path

import models
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def llama_config(**changes):
    return hf.LlamaConfig(**models.tiny("llama").config.to_dict() | SIZES | changes)


def save_llama(path, *, dtype=torch.bfloat16, cls=hf.LlamaForCausalLM, shards="60KB", **changes):
    """Save a Llama with rows of whole blocks of 64 in several files."""
    torch.manual_seed(0)
    cls(llama_config(**changes)).to(dtype).save_pretrained(path, max_shard_size=shards)
    return path


def settings(base, compute_dtype=torch.bfloat16):
    """What a user of transformers passes for the same storage."""
    if base == "int8":
        return hf.BitsAndBytesConfig(load_in_8bit=True)
    return hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def assert_same(actual, expected):
    """Assert that two models have the same state dicts and buffers, bit for bit, and the same
    configs except for the path.
    """
    first, second = actual.state_dict(), expected.state_dict()
    assert first.keys() == second.keys()
    buffers, others = dict(actual.named_buffers()), dict(expected.named_buffers())
    assert buffers.keys() == others.keys()
    for name, value in (first | buffers).items():
        other = (second | others)[name]
        assert value.dtype is other.dtype, name
        assert torch.equal(value, other), name
    configs = (actual.config.to_dict(), expected.config.to_dict())
    assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}


def edit_shard(folder, name, change):
    """Replace a tensor in its shard by ``change(tensor)``; ``None`` removes it from the shard."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    if tensors[name] is None:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def shard_of(folder, name):
    index = json.loads(Path(folder, "model.safetensors.index.json").read_text())
    return Path(folder, index["weight_map"][name])


def edit_json(file, change):
    data = json.loads(Path(file).read_text())
    change(data)
    Path(file).write_text(json.dumps(data))
