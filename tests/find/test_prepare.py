"""Invalid arguments of ``wrap``: each error names the argument, its value and a way to fix it, and the model is unchanged."""

import models
import pytest
import task_models
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from peftkit import BottleneckConfig, ContractError, PrefixConfig, wrap

NAN = float("nan")


class Holder:
    def __init__(self, model):
        self.model = model


SLIPS = {
    "a name for the model": (
        lambda m: wrap("some/model"),
        r"model='some/model' is not a model but a str; .*from_pretrained\('some/model'\)",
    ),
    "no model": (lambda m: wrap(None), "model=None is not a model but None"),
    "a class": (lambda m: wrap(type(m)), r"but the class LlamaForCausalLM; pass an instance"),
    "a holder": (lambda m: wrap(Holder(m)), r"but a Holder; pass its .model"),
    "a config alone": (lambda m: wrap(m.config), "is not a model but a LlamaConfig"),
    "swapped": (
        lambda m: wrap(LoraConfig(), m),
        r"the first argument is a LoraConfig, but it must be the model; call wrap\(model, config\)",
    ),
    "two models": (lambda m: wrap(m, m), "one of the configs is a model, LlamaForCausalLM"),
    "a dict": (
        lambda m: wrap(m, {"r": 4, "lora_alpha": 8}),
        r"is not a config but a dict; pass a config, such as peft.LoraConfig\(r=4, lora_alpha=8\)",
    ),
    "a list": (
        lambda m: wrap(m, [LoraConfig()]),
        r"is not a config but a list; pass configs one by one: wrap\(model, first, second\)",
    ),
    "a class of configs": (
        lambda m: wrap(m, LoraConfig),
        r"but the class LoraConfig; pass an instance: LoraConfig\(\)",
    ),
    "None for a config": (
        lambda m: wrap(m, None),
        "config=None is not a config but None; leave it",
    ),
    "a name for a config": (lambda m: wrap(m, "default"), "config='default' .*as adapter_name"),
    "a number": (lambda m: wrap(m, 16), "config=16 is not a config but an int"),
    "a number for a name": (lambda m: wrap(m, adapter_name=3), "adapter_name=3 is an int"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_wrong_kinds_of_arguments(slip):
    call, message = SLIPS[slip]
    with pytest.raises(TypeError, match=message):
        call(models.tiny("llama"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is empty"),
        ("a.b", "has a dot in it"),
        ("keys", "is an attribute of torch.nn.ModuleDict"),
        ("lora", "is part of 'lora_'"),
    ],
)
def test_names_that_peft_cannot_use(name, message):
    with pytest.raises(ValueError, match=f"adapter_name={name!r} {message}.*'default'"):
        wrap(models.tiny("llama"), adapter_name=name)


def test_configs_and_models_that_are_not_ready():
    with pytest.raises(ValueError, match=r"this PeftConfig has no method.*LoraConfig\(r=16\)"):
        wrap(models.tiny("llama"), PeftConfig())
    adapted = get_peft_model(models.tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="LlamaForCausalLM already has adapters"):
        wrap(adapted.get_base_model())


LORA = [
    ({"r": "16"}, TypeError, "r='16' is a str; it must be a whole number, such as 16"),
    ({"r": 4.0}, TypeError, "r=4.0 is a float"),
    ({"r": True}, TypeError, "r=True is a bool"),
    ({"r": None}, TypeError, "r=None is None"),
    ({"r": 0}, ValueError, "r=0 is below 1"),
    ({"r": -1}, ValueError, "r=-1 is below 1"),
    ({"r": 10_000}, ContractError, "r=10000 is larger than both sides .* useful rank is 32"),
    ({"lora_alpha": 0}, ValueError, "lora_alpha=0 multiplies the adapter by zero"),
    ({"lora_alpha": NAN}, ValueError, "lora_alpha=nan is not finite"),
    ({"lora_alpha": float("inf")}, ValueError, "lora_alpha=inf is not finite"),
    ({"lora_alpha": "8"}, TypeError, "lora_alpha='8' is a str"),
    ({"lora_alpha": None}, TypeError, "lora_alpha=None is None"),
    ({"lora_dropout": 1.0}, ValueError, "lora_dropout=1.0 drops every input"),
    ({"lora_dropout": -0.1}, ValueError, "lora_dropout=-0.1 is not a probability"),
    ({"lora_dropout": 1.5}, ValueError, "lora_dropout=1.5 is not a probability"),
    ({"lora_dropout": NAN}, ValueError, "lora_dropout=nan is not finite"),
    ({"lora_dropout": None}, TypeError, "lora_dropout=None is None"),
    ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\]=0 is below 1"),
    ({"rank_pattern": {"q_proj": "4"}}, TypeError, r"rank_pattern\['q_proj'\]='4' is a str"),
    ({"rank_pattern": {"q_proj": 999}}, ContractError, "rank_pattern=999 is larger"),
    ({"rank_pattern": ["q_proj"]}, TypeError, r"rank_pattern=\['q_proj'\] is a list"),
    ({"rank_pattern": {3: 4}}, TypeError, "rank_pattern has the key 3"),
    ({"alpha_pattern": {"q_proj": 0}}, ValueError, r"alpha_pattern\['q_proj'\]=0 multiplies"),
    ({"alpha_pattern": {"(": 4}}, ValueError, r"alpha_pattern: '\(' is not a regular expression"),
    ({"target_modules": 5}, TypeError, "target_modules=5 is an int"),
    ({"target_modules": []}, ValueError, "target_modules is empty"),
    ({"target_modules": ["q_proj", 3]}, TypeError, "target_modules has the entry 3"),
    ({"target_modules": "("}, ValueError, r"target_modules: '\(' is not a regular expression"),
    ({"modules_to_save": "lm_head"}, TypeError, r"is a string.*modules_to_save=\['lm_head'\]"),
    ({"modules_to_save": [3]}, TypeError, "modules_to_save has the entry 3"),
    ({"layers_to_transform": "0"}, TypeError, "layers_to_transform='0' is a str"),
    ({"layers_to_transform": [-1]}, ValueError, "layers_to_transform has the entry -1"),
    ({"layers_to_transform": [True]}, TypeError, "layers_to_transform has the entry True"),
    ({"bias": "some"}, ValueError, "bias='some' is unknown; pass 'none', 'all' or 'lora_only'"),
    ({"init_lora_weights": "nope"}, ValueError, "init_lora_weights='nope' is unknown.*pissa"),
    ({"trainable_token_indices": [96]}, ContractError, r"the entry 96, .*96 rows \(0 to 95\)"),
    ({"trainable_token_indices": [-1]}, ContractError, "trainable_token_indices has the entry -1"),
    ({"trainable_token_indices": ["a"]}, TypeError, "trainable_token_indices has the entry 'a'"),
    (
        {"trainable_token_indices": {"embed_tokens": [1000]}},
        ContractError,
        r"trainable_token_indices\['embed_tokens'\] has the entry 1000",
    ),
    (
        {"trainable_token_indices": {"embed": [1]}},
        ContractError,
        "trainable_token_indices: 'embed' matches nothing; the embeddings of this model are model.embed_tokens",
    ),
    ({"task_type": "SEQ_CLS"}, ValueError, "'SEQ_CLS' does not fit LlamaForCausalLM, .*CAUSAL_LM"),
    ({"task_type": "SEQ_2_SEQ_LM"}, ValueError, "does not fit LlamaForCausalLM"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), LORA)
def test_values_of_lora_that_cannot_work(fields, kind, message):
    model = models.tiny("llama")
    before = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    with pytest.raises(kind, match=message):
        wrap(model, LoraConfig(**fields))
    assert {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (lambda: LoHaConfig(r=0, target_modules=["q_proj"]), ValueError, "r=0 is below 1"),
        (lambda: LoHaConfig(alpha=0, target_modules=["q_proj"]), ValueError, "alpha=0 multiplies"),
        (
            lambda: LoHaConfig(module_dropout=1.0, target_modules=["q_proj"]),
            ValueError,
            "module_dropout=1.0 drops",
        ),
        (
            lambda: AdaLoraConfig(init_r=0, total_step=9, target_modules=["q_proj"]),
            ValueError,
            "init_r=0 is below 1",
        ),
        (lambda: PrefixConfig(num_virtual_tokens="16"), TypeError, "num_virtual_tokens='16' is a"),
        (lambda: PrefixConfig(num_virtual_tokens=True), TypeError, "num_virtual_tokens=True is a"),
        (lambda: PrefixConfig(init_std=NAN), ValueError, "init_std=nan is not finite"),
        (lambda: PrefixConfig(init_std=-1), ValueError, "init_std=-1 is negative"),
        (lambda: PrefixConfig(layers=0), TypeError, "layers=0 is an int; it must be a list"),
        (
            lambda: PrefixConfig(attention="encoder"),
            ValueError,
            "attention='encoder' is not a list of encoder, decoder, cross",
        ),
        (lambda: PrefixConfig(gate="yes"), TypeError, "gate='yes' is a str"),
        (
            lambda: PrefixConfig(init="text", init_token_ids=[999]),
            ContractError,
            "init_token_ids has the entry 999, but Embedding has 96 rows",
        ),
        (lambda: BottleneckConfig(bottleneck_size="4"), TypeError, "bottleneck_size='4' is a str"),
        (lambda: BottleneckConfig(reduction_factor=NAN), ValueError, "reduction_factor=nan is not"),
        (
            lambda: BottleneckConfig(reduction_factor="a"),
            TypeError,
            "reduction_factor='a' is a str",
        ),
        (lambda: BottleneckConfig(scaling=0), ValueError, "scaling=0 multiplies the adapter"),
        (lambda: BottleneckConfig(scaling=True), TypeError, "scaling=True is a bool"),
        (lambda: BottleneckConfig(layer_norm="no"), TypeError, "layer_norm='no' is a str"),
        (lambda: BottleneckConfig(layers="0"), TypeError, "layers='0' is a str"),
    ],
)
def test_values_of_other_methods_that_cannot_work(config, kind, message):
    with pytest.raises(kind, match=message):
        wrap(models.tiny("llama"), config())


def test_values_that_other_methods_allow():
    wrap(models.tiny("llama"), VeraConfig(r=256, target_modules=["q_proj"]))
    wrap(models.tiny("llama"), OFTConfig(target_modules=["q_proj"], oft_block_size=4))
    wrap(
        models.tiny("llama"), LoraConfig(r=4, lora_alpha=0.5, lora_dropout=0, layers_to_transform=0)
    )
    wrap(models.tiny("llama"), LoraConfig(r=4, init_lora_weights="pissa_niter_4"))


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("bert", "CAUSAL_LM", "does not fit BertForSequenceClassification, whose task is SEQ_CLS"),
        ("bert", "TOKEN_CLS", "does not fit BertForSequenceClassification, whose task is SEQ_CLS"),
        ("t5", "CAUSAL_LM", "does not fit T5ForConditionalGeneration, whose task is SEQ_2_SEQ_LM"),
        ("vit", "SEQ_CLS", "PEFT would call ViTForImageClassification with input_ids"),
        ("vit", "CAUSAL_LM", "does not fit ViTForImageClassification, which cannot generate"),
    ],
)
def test_a_task_other_than_that_of_the_model(model, task, message):
    with pytest.raises(ValueError, match=f"task_type={task!r}.*{message}.*leave task_type out"):
        wrap(models.tiny(model), LoraConfig(task_type=task))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert tokens", "TOKEN_CLS"),
        ("bert answers", "QUESTION_ANS"),
        ("bert choices", "SEQ_CLS"),
        ("llama sequence", "SEQ_CLS"),
    ],
)
def test_a_task_that_fits_runs(name, task):
    model = wrap(task_models.task_model(name), LoraConfig(r=4, task_type=task))
    with torch.no_grad():
        assert task_models.outputs(model, task_models.batch(name))


def test_parts_of_a_mix_are_checked_too():
    model = models.tiny("llama")
    with pytest.raises(ValueError, match=r"lora_dropout=1.0 drops"):
        wrap(model, LoraConfig(lora_dropout=1.0), PrefixConfig())
    with pytest.raises(ContractError, match="exclude_modules: 'nope' matches nothing"):
        wrap(model, LoraConfig(), PrefixConfig(exclude_modules=["nope"]))
    with pytest.raises(ValueError, match=r"different tasks .*CAUSAL_LM, SEQ_CLS"):
        wrap(model, LoraConfig(task_type="CAUSAL_LM"), PrefixConfig(task_type="SEQ_CLS"))


def test_a_model_without_linear_layers_is_an_error_that_lists_its_modules():
    with pytest.raises(
        ContractError,
        match=r"(?s)no linear layer of Sequential is left to adapt; name the modules.*0: a convolution",
    ):
        wrap(nn.Sequential(nn.Conv1d(4, 4, 1)))
