"""What an adapter's folder holds, and whether it fits a base model."""

import json

import models
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from peftkit import BottleneckConfig, ContractError, LoraConfig, PrefixConfig, serving_report, wrap
from peftkit.loading import check_fits
from peftkit.portability import inspect_adapter


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def saved(folder, *configs, base="llama"):
    wrap(models.tiny(base), *configs).save_pretrained(folder)
    return folder


def lora(**fields) -> LoraConfig:
    fields = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields
    return LoraConfig(**fields)


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def test_facts_of_a_lora(tmp_path):
    facts = inspect_adapter(saved(tmp_path, lora(rank_pattern={"layers.0.self_attn.q_proj": 2})))
    assert (facts.method, facts.written_by) == ("LORA", "PEFT")
    assert facts.modules == {"q_proj": 2, "v_proj": 2}
    assert facts.sizes == {"rank": {2: 1, 8: 3}}
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert facts.shapes == {key: tuple(tensor.shape) for key, tensor in held.items()}
    assert facts.dtypes == {"float32": 8}
    assert facts.parameters == sum(t.numel() for t in held.values())
    assert facts.zeros == [key for key in held if "lora_B" in key]
    assert facts.size_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert json.loads(json.dumps(facts.to_dict()))["sizes"] == {"rank": {"2": 1, "8": 3}}


def test_facts_of_our_own_types_and_of_others(tmp_path):
    own = (lora(), PrefixConfig(num_virtual_tokens=3), BottleneckConfig(bottleneck_size=4))
    facts = inspect_adapter(saved(tmp_path / "mix", *own))
    assert facts.method == "PEFTKIT_MIX"
    assert facts.sizes == {"bottleneck size": {4: 4}, "rank": {8: 4}, "virtual tokens": {3: 2}}
    assert facts.modules == {"mlp": 2, "o_proj": 2, "q_proj": 2, "self_attn": 2, "v_proj": 2}
    assert inspect_adapter(saved(tmp_path / "dora", lora(use_dora=True))).method == "DORA"
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    peft.get_peft_model(models.tiny("llama"), prefix).save_pretrained(tmp_path / "prefix")
    assert inspect_adapter(tmp_path / "prefix").sizes == {"virtual tokens": {5: 1}}
    (tmp_path / "dora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ContractError, match="pass a folder saved by PEFT, peftkit or AdapterHub"):
        inspect_adapter(tmp_path / "dora")


def test_a_head_of_another_size_than_the_bases_is_built(tmp_path):
    model = models.tiny("bert")
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    wrap(model, config).save_pretrained(tmp_path / "lora")
    model.config.num_labels = 2
    model.config.save_pretrained(tmp_path / "base")
    found = serving_report(tmp_path / "lora", "peft", base=str(tmp_path / "base"))
    assert found.problems == ()


def test_fitting_is_judged_without_weights_and_changes_nothing(tmp_path):
    folder = saved(tmp_path, lora())
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(models.tiny("llama").config)
    before = {n: type(m) for n, m in model.named_modules()}
    check_fits(model, folder)
    assert {n: type(m) for n, m in model.named_modules()} == before
    with pytest.raises(ContractError, match="cannot be applied to OPTModel"):
        check_fits(models.tiny("opt").model, edit(folder, target_modules=["gate_proj"]))
