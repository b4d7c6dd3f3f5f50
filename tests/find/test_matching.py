"""Which modules the entries of a config match, and the errors for entries that match nothing."""

import models
import pytest
import transformers as hf
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from peftkit import ContractError, PrefixConfig, wrap
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
    """Configs made for transformers 4 name one linear per expert. PEFT converts them to expert parameters."""
    config = LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"])
    found = match_targets(_mixtral(), config)
    assert found["target_modules", "w1"] == [
        f"model.layers.{i}.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj") for i in range(2)
    ]
    check_targets(_mixtral(), config)


def test_modules_that_peft_would_silently_skip_are_an_error():
    config = LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(
        ContractError,
        match=r"(?s)would get no adapter.*model.layers.1.mlp.down_proj.*Leave target_modules out",
    ):
        check_targets(_experts_then_dense(), config)


def _problem(fields, model=None):
    with pytest.raises(ContractError) as error:
        check_targets(model or models.tiny("llama"), LoraConfig(**fields))
    return str(error.value)


def test_the_error_for_one_entry_is_singular():
    assert _problem({"target_modules": ["q_porj"]}).startswith("1 entry of this LoraConfig would")
    assert _problem({"target_modules": ["q_porj", "x"]}).startswith("2 entries of this LoraConfig")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_name_given_as_a_regular_expression_is_not_suggested_to_itself(field):
    text = _problem({"target_modules": ["q_proj"], field: "down_proj"})
    assert f"pass a list to match the ends of names: {field}=['down_proj']" in text
    assert "did you mean" not in text


def test_the_error_names_the_field_that_removes_all_matches():
    targets = ["q_proj", "down_proj"]
    text = _problem({"target_modules": targets, "exclude_modules": ["down_proj"]})
    assert "'down_proj' matches nothing, because exclude_modules has all 2 modules" in text
    text = _problem({"target_modules": [*targets, "lm_head"], "modules_to_save": ["lm_head"]})
    assert "'lm_head' matches nothing, because modules_to_save has the one module" in text
    assert "did you mean" not in text
    text = _problem(
        {"target_modules": targets, "layers_to_transform": [1], "exclude_modules": ["layers.1.mlp"]}
        | {"exclude_modules": ["layers.1.mlp.down_proj"]}
    )
    assert "'down_proj' matches nothing in the layers that layers_to_transform and" in text


def test_a_missing_layer_is_named_once_without_the_targets():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    text = _problem({"target_modules": targets, "layers_to_transform": [7]})
    assert text == "layers_to_transform: '7' matches nothing; the targets are in layers 0 to 1"
    text = _problem({"target_modules": targets, "layers_to_transform": 7})
    assert text == "layers_to_transform: '7' matches nothing; the targets are in layers 0 to 1"


def test_the_error_names_a_wrong_layers_pattern():
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"}
    text = _problem(fields)
    assert text.startswith("layers_pattern='blocks' is not the name of a numbered list")
    assert "'layers'" in text
    check_targets(models.tiny("llama"), LoraConfig(**fields | {"layers_pattern": ["h", "layers"]}))


@pytest.mark.parametrize("field", ["target_modules", None])
@pytest.mark.parametrize("excluded", [["down_proj"], r".*\.down_proj", ["layers.1.mlp.down_proj"]])
def test_peft_adapts_all_linear_without_the_excluded_modules(field, excluded):
    model = models.tiny("llama")
    fields = {field: "all-linear"} if field else {}
    wrapped = wrap(model, LoraConfig(**fields, exclude_modules=excluded))
    stock = LoraConfig(target_modules="all-linear", exclude_modules=excluded)
    expected = get_peft_model(models.tiny("llama"), stock).targeted_module_names
    assert sorted(wrapped.targeted_module_names) == sorted(expected)
    assert 12 <= len(expected) < 14


@pytest.mark.parametrize(
    "configs",
    [
        lambda: [LoHaConfig(target_modules="all-linear", exclude_modules=["down_proj"])],
        lambda: [
            AdaLoraConfig(target_modules="all-linear", exclude_modules=["down_proj"], total_step=9)
        ],
        lambda: [LoraConfig(exclude_modules=["down_proj"]), PrefixConfig()],
    ],
    ids=["LoHa", "AdaLoRA", "mix"],
)
def test_excludes_work_for_every_method(configs):
    names = wrap(models.tiny("llama"), *configs()).targeted_module_names
    assert not any("down_proj" in name for name in names)
    assert sum("mlp.up_proj" in name for name in names) == 2


def test_a_tower_can_be_excluded(tmp_path):
    text = {**models._DECODER, "model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    config = hf.LlavaConfig(
        text_config=text, vision_config={**vision, "model_type": "clip_vision_model"}
    )
    tower = r".*(vision_tower|multi_modal_projector).*"
    model = wrap(hf.LlavaForConditionalGeneration(config), LoraConfig(exclude_modules=tower))
    names = model.targeted_module_names
    assert len(names) == 14
    assert all("language_model" in name for name in names)
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).exclude_modules == tower


def test_excluding_modules_outside_all_linear_is_allowed_and_a_typo_is_not():
    names = wrap(
        models.tiny("llama"), LoraConfig(exclude_modules=["lm_head"])
    ).targeted_module_names
    assert len(names) == 14
    with pytest.raises(
        ContractError, match="exclude_modules: 'down_porj' matches nothing; did you"
    ):
        wrap(models.tiny("llama"), LoraConfig(exclude_modules=["down_porj"]))


def test_excluding_everything_is_an_error_that_says_so():
    with pytest.raises(
        ContractError,
        match=r"no linear layer .* is left to adapt; exclude_modules='\.\*' left out 14",
    ):
        wrap(models.tiny("llama"), LoraConfig(exclude_modules=".*"))


def test_all_linear_in_some_layers(tmp_path):
    model = wrap(models.tiny("llama"), LoraConfig(layers_to_transform=[1]))
    assert len(model.targeted_module_names) == 7
    assert all(".layers.1." in name for name in model.targeted_module_names)
    with pytest.raises(
        ContractError, match=r"^layers_to_transform: '7' matches nothing; the targets"
    ):
        wrap(models.tiny("llama"), LoraConfig(layers_to_transform=[7]))
    with pytest.raises(ContractError, match=r"^layers_pattern='blocks' is not the name"):
        wrap(models.tiny("llama"), LoraConfig(layers_to_transform=[0], layers_pattern="blocks"))


def test_names_that_need_a_regular_expression_can_be_loaded_again(tmp_path):
    """PEFT refuses layer numbers together with a regular expression when it reads a config."""

    def stack(layer):
        return nn.ModuleList([nn.ModuleDict({"proj": layer()}) for _ in range(2)])

    model = nn.ModuleDict({"layers": stack(lambda: nn.Linear(8, 8))})
    model["inner"] = nn.ModuleDict({"layers": stack(lambda: nn.Conv1d(8, 8, 1))})
    config = LoraConfig(r=4, layers_to_transform=[1], layers_pattern="layers")
    wrapped = wrap(model, config)
    assert wrapped.targeted_module_names == ["layers.1.proj"]
    wrapped.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).target_modules == r"layers\.1\.proj"


def test_experts_in_excluded_layers_get_no_adapter():
    model = wrap(_mixtral(), LoraConfig(exclude_modules=["layers.0.mlp.experts"]))
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert any("layers.1.mlp.experts" in name for name in names)
    assert not any("layers.0.mlp.experts" in name for name in names)


def test_a_rank_above_both_sides_of_every_weight_is_refused():
    model = models.tiny("llama")
    check_targets(model, LoraConfig(r=48, target_modules=["up_proj"]))
    for fields in ({"r": 49}, {"rank_pattern": {"up_proj": 49}}):
        with pytest.raises(ContractError, match=r"=49 is larger than both .* useful rank is 32"):
            check_targets(model, LoraConfig(target_modules=["up_proj"], **fields))
