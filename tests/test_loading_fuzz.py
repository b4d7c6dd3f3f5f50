"""A damaged adapter either loads as it does in plain PEFT, or is refused and the model stays what it was."""

import copy
import json
import random

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from unchanged import differences, everything

from peftkit import ContractError, load_adapter

_CASES = 80
_KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"

_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3,
    10**12,
    10**30,
    0.5,
    -0.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "16",
    "all-linear",
    "(",
    ".*v_proj",
    "nope",
    "pissa",
    "olora",
    [],
    ["q_proj"],
    ["nothing"],
    [1],
    [[0, 1]],
    {},
    {"q_proj": 4},
    {"v_proj": -2},
    {"(": 4},
    {"a": {"b": []}},
]
_FIELDS = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "peft_type",
    "task_type",
    "use_dora",
    "use_rslora",
    "bias",
    "lora_bias",
    "fan_in_fan_out",
    "inference_mode",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "base_model_name_or_path",
    "auto_mapping",
    "a_field_of_the_future",
]
_DTYPES = [
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(models.tiny("llama"), config).save_pretrained(folder)
    return folder


def _damage(rng: random.Random, folder) -> str:
    """Change one or two things; returns what was done."""
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors = json.loads(config_file.read_text()), load_file(weights)
    done = []
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.choice(["field", "field", "field", "deletion", "dtype", "shape", "name", "key"])
        key = rng.choice(sorted(tensors)) if tensors else _KEY
        if kind == "field":
            field = rng.choice(_FIELDS)
            config[field] = copy.deepcopy(rng.choice(_VALUES))
            done.append(f"{field}={config[field]!r}")
        elif kind == "deletion":
            field = rng.choice(sorted(config))
            config.pop(field)
            done.append(f"no {field}")
        elif kind == "dtype":
            dtype = rng.choice(_DTYPES)
            tensors[key] = tensors[key].to(dtype)
            done.append(f"{key} as {dtype}")
        elif kind == "shape":
            change = rng.choice(
                [lambda t: t[:-1], lambda t: t.T, lambda t: t[None], lambda t: t[0]]
            )
            tensors[key] = change(tensors[key]).contiguous()
            done.append(f"{key} with shape {list(tensors[key].shape)}")
        elif kind == "name":
            other = rng.choice([key.replace("lora_A", "lora_B"), key[:-1], f"x.{key}", "", "a.b"])
            tensors[other] = tensors.pop(key).clone()
            done.append(f"{key} renamed to {other!r}")
        else:
            tensors.pop(key, None)
            done.append(f"no {key}")
    config_file.write_text(json.dumps(config))
    save_file(tensors, weights)
    if rng.random() < 0.1:
        file = rng.choice([config_file, weights])
        file.write_bytes(file.read_bytes()[: rng.randrange(0, 200)])
        done.append(f"{file.name} cut")
    return "; ".join(done)


def _try_to_load(model, folder, name):
    try:
        return load_adapter(model, folder, name, accelerate=False), ""
    except ContractError as error:
        return None, str(error)


@pytest.mark.parametrize("seed", range(_CASES))
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_adapter(seed, good, tmp_path):
    rng = random.Random(seed)
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    done = _damage(rng, tmp_path)
    model = models.tiny("llama")
    second = rng.random() < 0.4
    if second:
        model = get_peft_model(
            model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
        )
    plain = copy.deepcopy(model)
    name = "second" if second else "default"
    before = everything(model)
    loaded, refusal = _try_to_load(model, tmp_path, name)
    if loaded is None:
        assert differences(before, everything(model)) == [], done
        assert str(tmp_path) in refusal, done
        return
    if second:
        plain.load_adapter(str(tmp_path), name)
    else:
        plain = PeftModel.from_pretrained(plain, str(tmp_path))
    loaded.set_adapter(name)
    plain.set_adapter(name)
    batch = models.batch("llama")
    with torch.no_grad():
        ours, theirs = loaded.eval()(**batch).logits, plain.eval()(**batch).logits
    assert torch.equal(ours, theirs), done
