"""What the entries of a config match, and the errors for those that match nothing."""

import models
import pytest
import transformers as hf
from peft import LoraConfig, get_peft_model

from peftkit import ContractError
from peftkit.find.matching import check_targets, match_targets

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**models._DECODER, num_local_experts=4))


def _experts_then_dense():
    config = hf.Qwen3MoeConfig(**models._DECODER, **_MOE, head_dim=8, mlp_only_layers=[1])
    return hf.Qwen3MoeForCausalLM(config)


def test_matches_of_every_field():
    model = models.tiny("llama")
    config = LoraConfig(
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["layers.1.mlp.up_proj"],
        modules_to_save=["lm_head"],
        rank_pattern={"up_proj": 4},
        alpha_pattern={r"layers\.1\..*": 4},
    )
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert match_targets(model, config) == {
        ("target_modules", "q_proj"): layers,
        ("target_modules", "up_proj"): ["model.layers.0.mlp.up_proj"],
        ("exclude_modules", "layers.1.mlp.up_proj"): ["model.layers.1.mlp.up_proj"],
        ("modules_to_save", "lm_head"): ["lm_head"],
        ("rank_pattern", "up_proj"): ["model.layers.0.mlp.up_proj"],
        ("alpha_pattern", r"layers\.1\..*"): [layers[1]],
    }
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    assert match_targets(model, config) == {
        ("target_modules", "q_proj"): layers[1:],
        ("layers_to_transform", "1"): layers[1:],
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            r"target_modules: 'v_porj' .*did you mean 'v_proj'",
        ),
        (
            {"target_modules": ["q_proj", "mlp.upp_proj"]},
            r"'mlp.upp_proj' .*did you mean 'mlp.up_proj'",
        ),
        ({"target_modules": r".*\.query"}, r"target_modules: '.*query' matches nothing"),
        ({"exclude_modules": ["layers.7.self_attn.q_proj"]}, r"exclude_modules: 'layers.7"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save: 'lm_haed' .*did you mean 'lm_head'"),
        ({"layers_to_transform": [0, 2]}, r"layers_to_transform: '2' matches nothing"),
        (
            {"rank_pattern": {"k_proj": 4}},
            r"rank_pattern: 'k_proj' matches nothing that is adapted",
        ),
        (
            {"alpha_pattern": {"k_proj": 4}},
            r"alpha_pattern: 'k_proj' matches nothing that is adapted",
        ),
        ({"target_parameters": ["q_proj.wieght"]}, r"did you mean '?q_proj.weight"),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error_with_a_suggestion(fields, message):
    config = LoraConfig(**{"target_modules": ["q_proj"], **fields})
    with pytest.raises(ContractError, match=message):
        check_targets(models.tiny("llama"), config)


def test_heads_that_peft_adds_by_task_need_not_all_exist():
    model = models.tiny("bert")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert wrapped.peft_config["default"].modules_to_save == ["classifier", "score"]
    check_targets(wrapped, wrapped.peft_config["default"])


def test_names_of_experts_stored_one_by_one_still_match():
    """Configs made for transformers 4 name one linear an expert; PEFT turns them into expert parameters."""
    config = LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"])
    found = match_targets(_mixtral(), config)
    assert found["target_modules", "w1"] == [
        f"model.layers.{i}.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj") for i in range(2)
    ]
    check_targets(_mixtral(), config)


def test_modules_that_peft_would_silently_pass_over_are_an_error():
    config = LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(
        ContractError,
        match=r"(?s)would get no adapter.*model.layers.1.mlp.down_proj.*Leave target_modules open",
    ):
        check_targets(_experts_then_dense(), config)
