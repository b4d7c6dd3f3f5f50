"""The modules that "all-linear" selects on each architecture, compared with lists written by hand."""

import models
import pytest
import torch
import transformers as hf
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peftkit import check, load_adapter, load_base, wrap
from peftkit.compatibility.batches import training_batch
from peftkit.compatibility.tiny import tiny_model
from peftkit.find.targets import (
    ATTENTION,
    CONVOLUTION,
    HEAD,
    INDEXER,
    MAMBA,
    REWRITTEN,
    ROUTER,
    STACKED,
    all_linear,
    fill_targets,
)

_DECODER = models._DECODER
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4))


def _qwen2_moe():
    config = hf.Qwen2MoeConfig(**_DECODER, **_MOE, shared_expert_intermediate_size=40)
    return hf.Qwen2MoeForCausalLM(config)


def _qwen3_moe():
    """One dense layer, then one layer of experts."""
    config = hf.Qwen3MoeConfig(**_DECODER, **_MOE, head_dim=8, mlp_only_layers=[0])
    return hf.Qwen3MoeForCausalLM(config)


def _qwen3_next():
    config = hf.Qwen3NextConfig(
        **_DECODER,
        **_MOE,
        head_dim=8,
        shared_expert_intermediate_size=40,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    return hf.Qwen3NextForCausalLM(config)


def _gpt_oss():
    config = hf.GptOssConfig(
        **_DECODER,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return hf.GptOssForCausalLM(config)


def _distilbert():
    config = hf.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    return hf.DistilBertForSequenceClassification(config)


def _roberta():
    config = hf.RobertaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return hf.RobertaForSequenceClassification(config)


def _whisper_audio():
    """A head next to an encoder, without a backbone module around the encoder."""
    config = hf.WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        classifier_proj_size=16,
        pad_token_id=0,
    )
    return hf.WhisperForAudioClassification(config)


def _mamba():
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2))


_QKVO = "self_attn.{q_proj,k_proj,v_proj,o_proj}"
_GATED = "mlp.{gate_proj,up_proj,down_proj}"
_STACKED = STACKED.format(ndim=3)


def _expand(*patterns: str) -> set[str]:
    """Expand ``a.{b,c}`` and ``[0-1]``."""
    names = set()
    for pattern in patterns:
        if "[" in pattern:
            head, _, rest = pattern.partition("[")
            span, _, tail = rest.partition("]")
            first, last = map(int, span.split("-"))
            names |= _expand(*(f"{head}{i}{tail}" for i in range(first, last + 1)))
        elif "{" in pattern:
            head, _, rest = pattern.partition("{")
            options, _, tail = rest.partition("}")
            names |= _expand(*(f"{head}{option}{tail}" for option in options.split(",")))
        else:
            names.add(pattern)
    return names


_LLAMA = _expand(f"model.layers.[0-1].{_QKVO}", f"model.layers.[0-1].{_GATED}")
_EXPERTS = "model.layers.[0-1].mlp.experts.{gate_up_proj,down_proj}"
_LM_HEAD = {"lm_head": HEAD}

TRUTH = {
    "llama": (lambda: models.tiny("llama"), _LLAMA, _LM_HEAD),
    "gpt2": (
        lambda: models.tiny("gpt2"),
        _expand("transformer.h.[0-1].{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}"),
        _LM_HEAD,
    ),
    "bert": (
        lambda: models.tiny("bert"),
        _expand(
            "bert.encoder.layer.[0-1].attention.{self.query,self.key,self.value,output.dense}",
            "bert.encoder.layer.[0-1].{intermediate.dense,output.dense}",
            "bert.pooler.dense",
        ),
        {"classifier": HEAD},
    ),
    "vit": (
        lambda: models.tiny("vit"),
        _expand(
            "vit.layers.[0-1].attention.{q_proj,k_proj,v_proj,o_proj}",
            "vit.layers.[0-1].mlp.{fc1,fc2}",
        ),
        {"classifier": HEAD, "vit.embeddings.patch_embeddings.projection": CONVOLUTION},
    ),
    "t5": (
        lambda: models.tiny("t5"),
        _expand(
            "{encoder,decoder}.block.[0-1].layer.0.SelfAttention.{q,k,v,o}",
            "decoder.block.[0-1].layer.1.EncDecAttention.{q,k,v,o}",
            "encoder.block.[0-1].layer.1.DenseReluDense.{wi_0,wi_1,wo}",
            "decoder.block.[0-1].layer.2.DenseReluDense.{wi_0,wi_1,wo}",
        ),
        _LM_HEAD,
    ),
    "mixtral": (
        _mixtral,
        _expand(f"model.layers.[0-1].{_QKVO}"),
        _LM_HEAD | dict.fromkeys(_expand("model.layers.[0-1].mlp.gate"), ROUTER),
    ),
    "qwen2_moe": (
        _qwen2_moe,
        _expand(
            f"model.layers.[0-1].{_QKVO}",
            "model.layers.[0-1].mlp.shared_expert.{gate_proj,up_proj,down_proj}",
        ),
        _LM_HEAD
        | dict.fromkeys(_expand("model.layers.[0-1].mlp.{gate,shared_expert_gate}"), ROUTER),
    ),
    "qwen3_moe": (
        _qwen3_moe,
        _expand(f"model.layers.[0-1].{_QKVO}", f"model.layers.0.{_GATED}"),
        _LM_HEAD | {"model.layers.1.mlp.gate": ROUTER},
    ),
    "qwen3_next": (
        _qwen3_next,
        _expand(
            "model.layers.0.linear_attn.{in_proj_qkvz,in_proj_ba,out_proj}",
            f"model.layers.1.{_QKVO}",
            "model.layers.[0-1].mlp.shared_expert.{gate_proj,up_proj,down_proj}",
        ),
        _LM_HEAD
        | dict.fromkeys(_expand("model.layers.[0-1].mlp.{gate,shared_expert_gate}"), ROUTER)
        | {"model.layers.0.linear_attn.conv1d": CONVOLUTION},
    ),
    "gpt_oss": (
        _gpt_oss,
        _expand(f"model.layers.[0-1].{_QKVO}"),
        _LM_HEAD | dict.fromkeys(_expand("model.layers.[0-1].mlp.router"), ROUTER),
    ),
    "distilbert": (
        _distilbert,
        _expand(
            "distilbert.transformer.layer.[0-1].attention.{q_lin,k_lin,v_lin,out_lin}",
            "distilbert.transformer.layer.[0-1].ffn.{lin1,lin2}",
        ),
        {"classifier": HEAD, "pre_classifier": HEAD},
    ),
    "roberta": (
        _roberta,
        _expand(
            "roberta.encoder.layer.[0-1].attention.{self.query,self.key,self.value,output.dense}",
            "roberta.encoder.layer.[0-1].{intermediate.dense,output.dense}",
        ),
        {"classifier.dense": HEAD, "classifier.out_proj": HEAD},
    ),
    "whisper_audio": (
        _whisper_audio,
        _expand("encoder.layers.0.{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj}")
        | _expand("encoder.layers.0.{self_attn.out_proj,fc1,fc2}"),
        {"classifier": HEAD, "projector": HEAD}
        | dict.fromkeys(_expand("encoder.{conv1,conv2}"), CONVOLUTION),
    ),
    "mamba": (
        _mamba,
        _expand("backbone.layers.[0-1].mixer.in_proj"),
        _LM_HEAD
        | dict.fromkeys(_expand("backbone.layers.[0-1].mixer.{x_proj,dt_proj,out_proj}"), MAMBA)
        | dict.fromkeys(_expand("backbone.layers.[0-1].mixer.conv1d"), CONVOLUTION),
    ),
}


STACKS = {
    "mixtral": _expand(_EXPERTS),
    "qwen2_moe": _expand(_EXPERTS),
    "qwen3_moe": _expand("model.layers.1.mlp.experts.{gate_up_proj,down_proj}"),
    "qwen3_next": _expand(_EXPERTS),
    "gpt_oss": _expand(_EXPERTS),
}
"""The parameters with the weights of all experts of a layer."""


@pytest.fixture(params=TRUTH)
def case(request):
    build, chosen, left_out = TRUTH[request.param]
    return build(), chosen, STACKS.get(request.param, set()), left_out


def test_every_linear_layer_of_the_backbone_and_nothing_else(case):
    model, chosen, stacks, left_out = case
    selection = all_linear(model)
    assert set(selection.modules) == chosen
    assert set(selection.stacks) == stacks
    assert selection.left_out == left_out


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_peft_adapts_exactly_the_selection(case):
    model, chosen, stacks, _ = case
    config = LoraConfig()
    fill_targets(model, config)
    tuner = get_peft_model(model, config).base_model
    adapted, parameters = set(), set()
    for name, module in tuner.model.named_modules():
        if isinstance(module, ParamWrapper):
            parameters.add(f"{name.replace('.base_layer', '')}.{module.parameter_name}")
        elif isinstance(module, BaseTunerLayer):
            adapted.add(name)
    bare = {f"{name}.weight" for name in chosen - adapted}
    assert adapted | {name.removesuffix(".weight") for name in bare} == chosen
    assert parameters == stacks | bare


def test_the_head_of_a_language_model_inside_another_module():
    outer = nn.Module()
    outer.language = models.tiny("llama")
    selection = all_linear(outer)
    assert selection.left_out == {"language.lm_head": HEAD}
    assert set(selection.modules) == {f"language.{name}" for name in _LLAMA}


def test_entries_are_as_short_as_they_can_be():
    assert all_linear(models.tiny("llama")).names == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    # "dense" alone would also match the head's classifier.dense.
    assert set(all_linear(_roberta()).names) == {
        "query",
        "key",
        "value",
        "output.dense",
        "intermediate.dense",
    }


def test_selection_of_a_wrapped_model_equals_that_of_its_base():
    model = models.tiny("bert")
    before = all_linear(model)
    config = LoraConfig(target_modules=before.names, task_type="SEQ_CLS")
    assert all_linear(get_peft_model(model, config)) == before


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Conv1d(4, 4, 1)})
        self.attention = nn.MultiheadAttention(4, 1)


def test_plain_modules_and_names_without_a_safe_suffix():
    selection = all_linear(_Block())
    assert selection.modules == ("proj",)
    # "proj" as a list entry would match "inner.proj" too.
    assert selection.names == "proj"
    assert selection.left_out == {"inner.proj": CONVOLUTION, "attention.out_proj": ATTENTION}
    adapted = get_peft_model(_Block(), LoraConfig(target_modules=selection.names))
    assert adapted.targeted_module_names == ["proj"]


def test_names_that_peft_confuses_with_experts_are_targeted_by_their_weights(tmp_path):
    model = _qwen3_next().eval()
    config = LoraConfig(init_lora_weights=False)
    selection = fill_targets(model, config)
    bare = ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    assert selection.parameters == sorted([*bare, "experts.down_proj", "experts.gate_up_proj"])
    base = {name: p.clone() for name, p in model.named_parameters()}
    wrapped = get_peft_model(model, config)
    ids = models.batch("llama")["input_ids"]
    tuned = wrapped(input_ids=ids).logits
    wrapped.save_pretrained(tmp_path)

    again = _qwen3_next().eval()
    again.load_state_dict(base)
    assert torch.equal(PeftModel.from_pretrained(again, tmp_path)(input_ids=ids).logits, tuned)
    again = _qwen3_next().eval()
    again.load_state_dict(base)
    assert torch.equal(load_adapter(again, tmp_path, accelerate=False)(input_ids=ids).logits, tuned)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(lora_dropout=0.1),
        LoraConfig(use_dora=True),
        LoHaConfig(target_modules="all-linear"),
    ],
)
def test_weights_that_a_method_cannot_reach_are_left_out_with_the_reason(config):
    model = _qwen3_next()
    selection = fill_targets(model, config)
    assert selection.parameters == []
    assert selection.left_out["model.layers.0.mlp.shared_expert.up_proj"] == REWRITTEN
    assert selection.left_out["model.layers.0.mlp.experts.down_proj"] == _STACKED
    assert selection.stacks == ()
    assert not any("shared_expert" in name for name in selection.modules)


def test_a_config_with_its_own_targets_is_not_changed():
    model = models.tiny("llama")
    for config in (
        LoraConfig(target_modules=["q_proj"]),
        LoraConfig(target_parameters=["q_proj.weight"]),
        LoHaConfig(),
    ):
        before = config.to_dict()
        assert fill_targets(model, config) is None
        assert config.to_dict() == before


@pytest.mark.parametrize(
    ("kind", "reason", "leaves"),
    [
        ("wavlm", ATTENTION, {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("falcon_mamba", MAMBA, {"x_proj", "dt_proj", "out_proj"}),
        ("jamba", MAMBA, {"dt_proj"}),
    ],
)
def test_weights_that_a_model_uses_without_the_layer_are_left_out(kind, reason, leaves):
    model = tiny_model(kind)
    left_out = all_linear(model).left_out
    assert {n.rpartition(".")[2] for n, why in left_out.items() if why == reason} == leaves
    check(wrap(model), training_batch(model))
    quantised = load_base(tiny_model(kind), "nf4")
    check(wrap(quantised), training_batch(quantised))


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_what_chooses_the_keys_of_sparse_attention_is_left_out(kind):
    """It has no gradient, so an adapter on it would end every first step with an error."""
    model = tiny_model(kind)
    selection = all_linear(model)
    left_out = {name for name, reason in selection.left_out.items() if reason == INDEXER}
    assert left_out
    assert all(".indexer." in name for name in left_out)
    assert not any(".indexer." in name for name in selection.modules)
    check(wrap(model), training_batch(model))
