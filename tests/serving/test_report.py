"""What PEFT, vLLM, SGLang and llama.cpp do with an adapter, tensor by tensor, and whether it serves as trained."""

import json
import re

import models
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from peftkit import LoraConfig, PrefixConfig, serving_report, wrap
from peftkit.serving import TARGETS, vllm

SERVERS = ("vllm", "sglang", "gguf")


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def lora(**fields) -> LoraConfig:
    fields = {
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    } | fields
    return LoraConfig(**fields)


def saved(folder, *configs, base="llama"):
    wrap(models.tiny(base), *configs).save_pretrained(folder)
    return folder


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def rewrite(folder, change):
    """Rename the tensors of an adapter, or replace them: ``change(name, tensor) -> (name, tensor)``."""
    file = folder / "adapter_model.safetensors"
    save_file(dict(change(n, t) for n, t in load_file(file).items()), file)
    return folder


@pytest.fixture
def base(tmp_path):
    models.tiny("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_lora_serves_as_trained(target, tmp_path, base):
    found = serving_report(saved(tmp_path / "lora", lora()), target, base=base)
    assert found.serves == "as trained"
    assert found.problems == ()
    names = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert {row.subject: row.verdict for row in found.rows} == dict.fromkeys(names, "loads")
    assert json.loads(json.dumps(found.to_dict()))["serves"] == "as trained"


@pytest.mark.parametrize("target", TARGETS)
def test_a_zero_lora_b_is_the_base_model(target, tmp_path, base):
    folder = saved(tmp_path / "lora", lora(init_lora_weights=True))
    found = serving_report(folder, target, base=base)
    assert found.serves == "as the base model"
    assert {row.verdict for row in found.rows} == {"no effect"}
    assert "lora_B is zero in every pair" in found.problems[0]
    # one trained pair is enough, but the others are named
    rewrite(folder, lambda n, t: (n, t + ("layers.0.self_attn.q_proj.lora_B" in n)))
    found = serving_report(folder, target, base=base)
    assert found.serves == "as trained"
    assert any("lora_B is zero in 3 modules" in note for note in found.notes)


def test_peft_itself_ignores_the_keys_that_the_report_names(tmp_path, base):
    """The rules for PEFT are those of the installed PEFT: loading such a folder leaves the outputs of the base model."""
    batch = models.batch("llama")
    plain = hf.AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        expected = plain(batch["input_ids"]).logits
    for number, change in enumerate(
        (
            lambda n, t: (n.removeprefix("base_model.model."), t),
            lambda n, t: (n.replace(".weight", ".mine.weight"), t),
            lambda n, t: (n.replace("model.layers", "_orig_mod.model.layers"), t),
        )
    ):
        folder = rewrite(saved(tmp_path / str(number), lora()), change)
        found = serving_report(folder, "peft")
        assert found.serves == "as the base model", number
        assert "peftkit convert" in found.problems[0]
        with pytest.warns(UserWarning, match="missing adapter keys"):
            model = peft.PeftModel.from_pretrained(
                hf.AutoModelForCausalLM.from_pretrained(base), folder
            )
        for module in model.modules():  # PEFT leaves lora_B at the value of the config's init
            if hasattr(module, "lora_B"):
                torch.nn.init.zeros_(module.lora_B["default"].weight)
        with torch.no_grad():
            assert torch.equal(model.eval()(batch["input_ids"]).logits, expected)


@pytest.mark.parametrize(
    ("config", "verdicts"),
    [
        ({"use_dora": True}, {"vllm": "not at all", "sglang": "not at all", "gguf": "not at all"}),
        (
            {"modules_to_save": ["lm_head"]},
            {"vllm": "not at all", "sglang": "differently", "gguf": "not at all"},
        ),
        (
            {"use_rslora": True},
            {"vllm": "as trained", "sglang": "differently", "gguf": "differently"},
        ),
        (
            {"alpha_pattern": {"q_proj": 4}},
            {"vllm": "as trained", "sglang": "differently", "gguf": "differently"},
        ),
        (
            {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}},
            {"vllm": "as trained", "sglang": "not at all", "gguf": "differently"},
        ),
        (
            {"trainable_token_indices": [1]},
            {"vllm": "not at all", "sglang": "differently", "gguf": "not at all"},
        ),
        (
            {"target_modules": ["k_proj", "v_proj"]},
            {"vllm": "as trained", "sglang": "as the base model", "gguf": "as trained"},
        ),
        (
            {"target_modules": ["q_proj"]},
            {"vllm": "as trained", "sglang": "not at all", "gguf": "as trained"},
        ),
        (
            {"target_modules": ["up_proj", "q_proj", "v_proj"]},
            {"vllm": "as trained", "sglang": "differently", "gguf": "as trained"},
        ),
    ],
)
def test_features_of_peft_in_each_server(config, verdicts, tmp_path, base):
    folder = saved(tmp_path / "lora", lora(**config))
    for target, expected in verdicts.items():
        found = serving_report(folder, target, base=base)
        assert found.serves == expected, (target, found.problems)
        assert bool(found.problems) == (expected != "as trained")
        assert all("Way out: " in problem for problem in found.problems)


@pytest.mark.parametrize("target", SERVERS)
def test_biases_of_lora_layers_are_refused(target, tmp_path):
    folder = edit(saved(tmp_path / "lora", lora()), lora_bias=True)
    found = serving_report(folder, target)
    assert found.serves == "not at all"
    assert "biases" in found.problems[0]


def test_a_regular_expression_as_target_is_refused_by_sglang_only(tmp_path, base):
    folder = edit(saved(tmp_path / "lora", lora()), target_modules=".*_proj")
    assert serving_report(folder, "vllm").serves == "as trained"
    assert "reads lists of names here" in serving_report(folder, "sglang").problems[0]


def test_vllm_ignores_modules_that_it_does_not_have(tmp_path, base):
    """Such an adapter serves as the base model, without an error."""
    bare = peft.get_peft_model(
        hf.AutoModel.from_pretrained(base),
        peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    bare.save_pretrained(tmp_path / "bare")
    found = serving_report(tmp_path / "bare", "vllm")
    assert found.serves == "as the base model"
    assert "its name lacks 'model.'" in found.problems[0]
    found = serving_report(tmp_path / "bare", "vllm", base=base)
    assert "this module is called model.layers.0.self_attn.q_proj there" in found.problems[0]
    assert serving_report(tmp_path / "bare", "sglang").serves == "as trained"
    assert (
        serving_report(edit(tmp_path / "bare", task_type="SEQ_CLS"), "vllm").serves == "as trained"
    )


def test_wrapped_names_are_named(tmp_path):
    folder = rewrite(
        saved(tmp_path / "lora", lora()),
        lambda n, t: (n.replace("model.layers", "_orig_mod.model.layers"), t),
    )
    assert serving_report(folder, "vllm").serves == "as the base model"
    assert serving_report(folder, "gguf").serves == "not at all"
    assert serving_report(folder, "sglang").serves == "as trained"


@pytest.mark.parametrize("target", SERVERS)
def test_other_methods_than_lora_are_refused(target, tmp_path):
    found = serving_report(saved(tmp_path / "prefix", PrefixConfig()), target)
    assert found.serves == "not at all"
    assert "loads only LoRA adapters, but this adapter is PEFTKIT_PREFIX" in found.problems[0]
    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    assert serving_report(saved(tmp_path / "ia3", ia3), target).serves == "not at all"


def test_ranks_and_the_servers_limits(tmp_path, base):
    folder = saved(tmp_path / "24", lora(r=24))
    found = serving_report(folder, "vllm", base=base)
    assert found.serves == "as trained"
    assert "rank 24: start vLLM with --max-lora-rank 32" in found.notes[0]
    assert serving_report(folder, "vllm", base=base, max_rank=32).notes[0].startswith("it is float32")  # fmt: skip
    for target, needed in (("vllm", 32), ("sglang", 24)):
        found = serving_report(folder, target, base=base, max_rank=16)
        assert found.serves == "not at all"
        assert f"--max-lora-rank {needed}" in found.problems[0]
    assert serving_report(folder, "gguf", base=base, max_rank=16).serves == "as trained"
    # wrap refuses a rank that no weight of the tiny model could have
    large = peft.get_peft_model(models.tiny("llama"), lora(r=vllm.RANKS[-1] + 1))
    large.save_pretrained(tmp_path / "513")
    problem = serving_report(tmp_path / "513", "vllm").problems[0]
    assert "rank 513: the largest value of vLLM's --max-lora-rank is 512" in problem


def test_embeddings_depend_on_the_model(tmp_path, base):
    config = lora(target_modules=["embed_tokens", "q_proj", "v_proj"])

    def save(name, folder):
        with pytest.warns(UserWarning, match="embedding layers found"):
            peft.get_peft_model(models.tiny(name), config).save_pretrained(folder)

    save("llama", tmp_path / "lora")
    assert serving_report(tmp_path / "lora", "vllm", base=base).serves == "as trained"
    assert serving_report(tmp_path / "lora", "vllm").serves == "unknown"
    save("mistral", tmp_path / "mistral")
    models.tiny("mistral").save_pretrained(tmp_path / "mistral_base")
    found = serving_report(tmp_path / "mistral", "vllm", base=str(tmp_path / "mistral_base"))
    assert "vLLM does not adapt embed_tokens of MistralForCausalLM" in found.problems[0]
    assert serving_report(tmp_path / "lora", "sglang", base=base).serves == "as trained"


def test_saved_embeddings_of_new_tokens_are_not_silently_dropped(tmp_path, base):
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(models.VOCAB_SIZE + 4)
    config = lora(target_modules=["embed_tokens", "q_proj", "v_proj"])
    with pytest.warns(UserWarning, match="embedding"):
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    names = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert "base_model.model.model.embed_tokens.base_layer.weight" in names
    assert serving_report(tmp_path / "lora", "vllm").serves == "unknown"
    found = serving_report(tmp_path / "lora", "vllm", base=base)
    fates = {row.subject: row.verdict for row in found.rows}
    assert fates["base_model.model.model.embed_tokens.base_layer.weight"] == "ignored"
    assert serving_report(tmp_path / "lora", "sglang", base=base).serves == "differently"
    (tmp_path / "lora" / "added_tokens.json").write_text(f'{{"<new>": {models.VOCAB_SIZE}}}')
    assert any(
        "adapters that add tokens" in p
        for p in serving_report(tmp_path / "lora", "sglang", base=base).problems
    )


def test_an_adapted_head(tmp_path, base):
    with pytest.warns(UserWarning, match="embedding layers found"):
        folder = saved(tmp_path / "lora", lora(target_modules=["q_proj", "v_proj", "lm_head"]))
    for target in SERVERS:
        assert serving_report(folder, target, base=base).serves == "as trained"


def test_tied_embeddings_and_an_adapted_head_in_llama_cpp(tmp_path):
    model = models.tiny("llama")
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="embedding layers found"):
        folder = saved(tmp_path / "lora", lora(target_modules=["q_proj", "lm_head"]))
    assert serving_report(folder, "gguf").serves == "unknown"
    found = serving_report(folder, "gguf", base=str(tmp_path / "base"))
    assert "lm_head is the input embedding in this model's file" in found.problems[0]


def test_towers_of_multimodal_models_are_not_adapted_by_default(tmp_path):
    folder = rewrite(
        saved(tmp_path / "lora", lora()),
        lambda n, t: (n.replace("model.layers", "model.vision_tower.layers"), t),
    )
    found = serving_report(folder, "vllm")
    assert found.serves == "as the base model"
    assert "--enable-tower-connector-lora" in found.problems[0]
    assert serving_report(folder, "sglang").serves == "differently"


def test_models_without_lora_in_vllm(tmp_path):
    config = hf.StableLmConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = hf.StableLmForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    wrap(model, lora()).save_pretrained(tmp_path / "lora")
    found = serving_report(tmp_path / "lora", "vllm", base=str(tmp_path / "base"))
    assert "vLLM has no LoRA for StableLmForCausalLM" in found.problems[0]


def test_a_base_it_does_not_fit(tmp_path, base):
    folder = saved(tmp_path / "lora", lora())
    config = hf.AutoConfig.from_pretrained(base)
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path / "short")
    found = serving_report(folder, "peft", base=str(tmp_path / "short"))
    assert "4 keys are left over" in found.problems[0]
    found = serving_report(folder, "vllm", base=str(tmp_path / "short"))
    assert found.serves == "differently"
    assert "has no module model.layers.1.self_attn.q_proj" in found.problems[0]
    with pytest.raises(ValueError, match=r"base='.*nowhere' is neither a folder"):
        serving_report(folder, base=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="target='tgi' is unknown; use one of peft, vllm"):
        serving_report(folder, "tgi")
    # a wrong shape is found too
    config.num_hidden_layers, config.hidden_size = 2, 64
    config.save_pretrained(tmp_path / "wide")
    assert any(
        "the wrong shape" in p
        for p in serving_report(folder, "gguf", base=str(tmp_path / "wide")).problems
    )


def test_peft_needs_one_line_for_our_types_and_may_be_too_old(tmp_path, base):
    found = serving_report(saved(tmp_path / "own", PrefixConfig()), "peft", base=base)
    assert found.serves == "as trained"
    assert "import peftkit.bridge" in found.notes[0]
    folder = saved(tmp_path / "lora", lora())
    found = serving_report(edit(folder, peft_version="99.0"), "peft")
    assert [note.partition(" ")[0] for note in found.notes] == ["it", "not"]
    found = serving_report(edit(folder, peft_type="FUTURE"), "peft")
    assert "peft_type='FUTURE' is unknown to the installed PEFT" in found.problems[0]


@pytest.mark.parametrize("target", TARGETS)
def test_adapterhub_checkpoints_are_to_be_imported(target, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"config": {}, "model_name": "bert"}')
    stem = "bert.encoder.layer.0.output.adapters.sst.adapter_"
    tensors = {f"{stem}down.0.weight": torch.ones(4, 8), f"{stem}up.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    found = serving_report(tmp_path, target)
    assert found.serves == "not at all"
    assert "peftkit.import_adapter" in found.problems[0]


@pytest.mark.parametrize("target", SERVERS)
def test_convolutions_and_unknown_tensors(target, tmp_path):
    folder = saved(tmp_path / "lora", lora())
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.norm.other": torch.ones(2)}, file)
    fates = {row.subject: row.verdict for row in serving_report(folder, target).rows}
    assert fates["base_model.model.model.norm.other"] in ("refused", "ignored")
    save_file({"base_model.model.conv.lora_A.weight": torch.ones(8, 3, 3, 3)}, file)
    assert serving_report(folder, target).serves != "as trained"


def test_every_rule_names_a_field_of_peft_and_its_source():
    from peftkit.serving import llama_cpp, sglang

    known = set(LoraConfig.__dataclass_fields__)
    for server in (vllm.SERVER, sglang.SERVER, llama_cpp.SERVER):
        assert re.search(r"\d+\.\d+", server.version)
        assert server.source
        for rule in server.fields:
            assert rule.field in known, rule
            assert LoraConfig.__dataclass_fields__[rule.field].default in (*rule.harmless, None), rule  # fmt: skip
            assert rule.way_out
