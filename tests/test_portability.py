"""What an adapter's folder holds, and whether PEFT, vLLM and a base model take it."""

import json

import models
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from peftkit import BottleneckConfig, ContractError, LoraConfig, PrefixConfig, wrap
from peftkit.loading import check_fits
from peftkit.portability import VLLM_RANKS, fit, inspect_adapter


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


@pytest.fixture
def base(tmp_path):
    models.tiny("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_facts_of_a_lora(tmp_path):
    facts = inspect_adapter(saved(tmp_path, lora(rank_pattern={"layers.0.self_attn.q_proj": 2})))
    assert (facts.method, facts.written_by) == ("LORA", "PEFT")
    assert facts.modules == {"q_proj": 2, "v_proj": 2}
    assert facts.sizes == {"rank": {2: 1, 8: 3}}
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert facts.shapes == {key: tuple(tensor.shape) for key, tensor in held.items()}
    assert facts.dtypes == {"float32": 8}
    assert facts.parameters == sum(t.numel() for t in held.values())
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


def test_peft_takes_a_lora_and_our_types_after_one_line(tmp_path, base):
    found = fit(inspect_adapter(saved(tmp_path / "lora", lora())), base=base)
    assert (found.problems, found.notes) == ((), ())
    found = fit(inspect_adapter(saved(tmp_path / "own", PrefixConfig())), base=base)
    assert found.problems == ()
    assert "import peftkit.bridge" in found.notes[0]
    found = fit(inspect_adapter(edit(tmp_path / "lora", peft_version="99.0")))
    assert [note.partition(" ")[0] for note in found.notes] == ["it", "not"]
    found = fit(inspect_adapter(edit(tmp_path / "lora", peft_type="FUTURE")))
    assert "peft_type='FUTURE' is unknown to the installed PEFT" in found.problems[0]


def test_a_base_it_does_not_fit_is_a_problem_that_names_the_keys(tmp_path, base):
    folder = saved(tmp_path / "lora", lora())
    config = hf.AutoConfig.from_pretrained(base)
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path / "short")
    (problem,) = fit(inspect_adapter(folder), base=str(tmp_path / "short")).problems
    assert "4 keys are left over" in problem
    assert "layers.1.self_attn.q_proj.lora_A" in problem
    with pytest.raises(ValueError, match=r"base='.*nowhere' is neither a folder"):
        fit(inspect_adapter(folder), base=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="target='tgi' is unknown; use one of peft, vllm"):
        fit(inspect_adapter(folder), "tgi")


def test_a_head_of_another_size_than_the_bases_is_built(tmp_path):
    model = models.tiny("bert")
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"])
    wrap(model, config).save_pretrained(tmp_path / "lora")
    model.config.num_labels = 2
    model.config.save_pretrained(tmp_path / "base")
    assert fit(inspect_adapter(tmp_path / "lora"), base=str(tmp_path / "base")).problems == ()


def test_fitting_is_judged_without_weights_and_changes_nothing(tmp_path):
    folder = saved(tmp_path, lora())
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(models.tiny("llama").config)
    before = {n: type(m) for n, m in model.named_modules()}
    check_fits(model, folder)
    assert {n: type(m) for n, m in model.named_modules()} == before
    with pytest.raises(ContractError, match="cannot be applied to OPTModel"):
        check_fits(models.tiny("opt").model, edit(folder, target_modules=["gate_proj"]))


def test_vllm_takes_plain_lora_of_any_rank_up_to_its_limit(tmp_path, base):
    facts = inspect_adapter(saved(tmp_path / "4", lora(r=4, use_rslora=True)))
    found = fit(facts, "vllm", base)
    assert found.problems == ()
    assert not any("--max-lora-rank" in note for note in found.notes)
    facts = inspect_adapter(saved(tmp_path / "24", lora(r=24)))
    found = fit(facts, "vllm", base)
    assert found.problems == ()
    assert "rank 24: start vLLM with --max-lora-rank 32" in found.notes[0]
    # wrap refuses a rank that no weight of the tiny model could have
    large = peft.get_peft_model(models.tiny("llama"), lora(r=VLLM_RANKS[-1] + 1))
    large.save_pretrained(tmp_path / "513")
    facts = inspect_adapter(tmp_path / "513")
    assert (
        "rank 513: the largest value of vLLM's --max-lora-rank is 512"
        in fit(facts, "vllm").problems[0]
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: lora(use_dora=True), "use_dora=True: vLLM does not yet support DoRA"),
        (lambda: lora(modules_to_save=["lm_head"]), "modules_to_save=.* being None"),
        (lambda: lora(alpha_pattern={"q_proj": 4}), "alpha_pattern is set: vLLM scales every"),
        (lambda: lora(rank_pattern={"q_proj": 4}), "rank_pattern is set"),
        (lambda: lora(trainable_token_indices=[1]), "trainable_token_indices"),
        (
            lambda: PrefixConfig(),
            "vLLM loads only LoRA adapters, but this adapter is PEFTKIT_PREFIX",
        ),
        (
            lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
            "this adapter is IA3",
        ),
    ],
)
def test_what_vllm_does_not_take_is_named(config, message, tmp_path):
    import re

    problems = fit(inspect_adapter(saved(tmp_path, config())), "vllm").problems
    assert len(problems) == 1
    assert re.search(message, problems[0])
    assert "https://docs.vllm.ai/" in problems[0]


def test_biases_of_lora_layers_are_a_problem_for_vllm(tmp_path):
    folder = edit(saved(tmp_path, lora()), lora_bias=True)
    assert (
        "lora_bias=True: vLLM does not support biases"
        in fit(inspect_adapter(folder), "vllm").problems[0]
    )


def test_keys_vllm_does_not_read_are_problems(tmp_path):
    folder = saved(tmp_path, lora())
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    save_file(held | {"base_model.model.score.weight": torch.ones(2)}, file)
    problem = fit(inspect_adapter(folder), "vllm").problems[0]
    assert "vLLM does not read 1 key, such as base_model.model.score.weight" in problem
    save_file({"base_model.model.conv.lora_A.weight": torch.ones(8, 3, 3, 3)}, file)
    assert "belongs to a convolution" in fit(inspect_adapter(folder), "vllm").problems[0]


@pytest.mark.parametrize("target", ["peft", "vllm"])
def test_adapterhub_checkpoints_are_to_be_imported(target, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"config": {}, "model_name": "bert"}')
    stem = "bert.encoder.layer.0.output.adapters.sst.adapter_"
    tensors = {f"{stem}down.0.weight": torch.ones(4, 8), f"{stem}up.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    facts = inspect_adapter(tmp_path)
    assert (facts.method, facts.written_by) == ("bottleneck", "AdapterHub")
    assert (facts.trained_on, facts.sizes) == ("bert", {"bottleneck size": {4: 1}})
    assert "peftkit.import_adapter" in fit(facts, target).problems[0]
