"""``load_base`` gives what transformers and bitsandbytes give, for every kind of base and many architectures."""

import logging

import base_cases
import models
import pytest
import torch
import transformers as hf
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import LoraConfig, prepare_model_for_kbit_training

import peftkit
from peftkit import base_report, explain, load_base, wrap

KINDS = ("nf4", "int8")
ROUTER = "router or gate of a mixture of experts"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return base_cases.save_llama(tmp_path_factory.mktemp("llama"))


def stock(path, base=None, cls=hf.AutoModelForCausalLM, **options):
    if base is not None:
        options["quantization_config"] = base_cases.settings(base)
    return cls.from_pretrained(path, dtype="auto", **options)


@pytest.mark.parametrize("base", KINDS)
def test_storage_and_attributes_equal_those_of_transformers(saved, base):
    expected = stock(saved, base)

    model = load_base(saved, base)

    base_cases.assert_same(model, expected)
    assert vars(model).keys() == vars(expected).keys()
    assert type(model.hf_quantizer) is type(expected.hf_quantizer)
    assert vars(model.hf_quantizer).keys() == vars(expected.hf_quantizer).keys()
    assert model.quantization_method == expected.quantization_method
    assert model.name_or_path == str(saved)
    assert not model.training
    layer, other = (m.model.layers[0].mlp.up_proj for m in (model, expected))
    assert type(layer) is type(other) is (Linear4bit if base == "nf4" else Linear8bitLt)
    assert vars(layer.weight).keys() == vars(other.weight).keys()
    assert layer.weight.requires_grad is other.weight.requires_grad is False


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3", "t5", "qwen3"])
def test_other_architectures_equal_those_of_transformers(tmp_path, name, base):
    original = models.tiny(name, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path, max_shard_size="20KB")

    model = load_base(tmp_path, base)

    base_cases.assert_same(model, stock(tmp_path, base, type(original)))


@pytest.mark.parametrize("name", models.NAMES)
def test_a_base_that_is_not_quantised_equals_that_of_transformers(tmp_path, name):
    original = models.tiny(name, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path, max_shard_size="20KB")

    base_cases.assert_same(load_base(tmp_path), stock(tmp_path, cls=type(original)))
    in_float32 = type(original).from_pretrained(tmp_path, dtype=torch.float32)
    base_cases.assert_same(load_base(tmp_path, "fp32"), in_float32)


def test_rows_in_the_last_chunk_and_zero_rows_are_quantised_as_by_bitsandbytes(tmp_path):
    original = hf.LlamaForCausalLM(base_cases.llama_config(intermediate_size=9000))
    with torch.no_grad():
        original.model.layers[0].mlp.up_proj.weight[:70] = 0
    original.save_pretrained(tmp_path)

    for base in KINDS:
        expected = stock(tmp_path, base)
        model = load_base(tmp_path, base, compute_dtype="bfloat16")
        base_cases.assert_same(model, expected)


@pytest.mark.parametrize("base", KINDS)
def test_saved_and_loaded_again_it_is_the_same(saved, base, tmp_path):
    model = load_base(saved, base, keep=["down_proj"])
    model.save_pretrained(tmp_path)

    again = load_base(tmp_path)

    base_cases.assert_same(again, model)
    base_cases.assert_same(again, stock(tmp_path))
    base_cases.assert_same(load_base(tmp_path, base), model)
    assert type(again.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_a_checkpoint_keeps_its_compute_dtype_unless_another_is_asked_for(saved, tmp_path):
    stock(saved, "nf4").save_pretrained(tmp_path)

    model = load_base(tmp_path, compute_dtype=torch.float32)

    assert load_base(tmp_path).model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.compute_dtype is torch.float32
    assert model.config.quantization_config.bnb_4bit_compute_dtype is torch.float32


@pytest.mark.parametrize(
    ("dtype", "compute"), [("auto", torch.bfloat16), (torch.float32, torch.float32)]
)
def test_layers_multiply_in_the_dtype_of_the_rest(saved, dtype, compute):
    model = load_base(saved, "nf4", dtype=dtype)

    assert model.lm_head.weight.dtype is compute
    assert model.model.layers[0].mlp.up_proj.compute_dtype is compute
    assert not any(p.dtype is torch.float32 for p in model.parameters()) or dtype != "auto"


@pytest.mark.parametrize("base", KINDS)
def test_wrapped_it_runs_the_same_code_with_the_same_gradients_as_a_model_of_transformers(
    saved, base
):
    runs = []
    for model in (load_base(saved, base), stock(saved, base)):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(1)
        model = wrap(model, peftkit.LoraConfig(r=4, init_lora_weights=False)).train()
        ids = torch.arange(24).view(2, 12) % 90
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        runs.append((explain(model), loss.detach(), gradients))

    (report, loss, gradients), (other, other_loss, others) = runs
    assert report == other
    assert report.fused_fraction == 1
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, others[name]), name


def test_heads_and_routers_stay_as_they_are_and_the_report_says_why(tmp_path):
    original = hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **models.tiny("llama").config.to_dict(),
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=32,
        )
    )
    original.save_pretrained(tmp_path)

    report = base_report(load_base(tmp_path, "nf4"))

    kept = report.kept
    assert kept["lm_head.weight"] == "output head"
    assert kept["model.embed_tokens.weight"] == "embedding"
    assert kept["model.norm.weight"] == "norm"
    assert kept["model.layers.0.mlp.gate.weight"] == ROUTER
    assert kept["model.layers.0.mlp.shared_expert_gate.weight"] == ROUTER
    assert kept["model.layers.0.self_attn.q_proj.bias"] == "bias"
    assert kept["model.layers.1.mlp.experts.down_proj"].startswith("experts stacked")
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" not in kept


@pytest.mark.parametrize("base", [*KINDS, "fp8"])
def test_a_pooler_that_is_not_in_the_checkpoint_is_trained_in_full(tmp_path, base):
    config = models.tiny("bert").config
    hf.BertForMaskedLM(config).save_pretrained(tmp_path)

    model = load_base(tmp_path, base, auto_class="AutoModelForSequenceClassification", num_labels=3)

    assert model.bert.pooler.dense.weight.dtype is torch.float32
    adapted = wrap(model, LoraConfig(r=4))
    assert list(explain(adapted).trained_in_full) == ["bert.pooler", "classifier"]


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("vit", "classifier")])
def test_task_heads_are_not_quantised(tmp_path, name, head):
    models.tiny(name).save_pretrained(tmp_path)

    model = load_base(tmp_path, "nf4")

    assert type(model.get_submodule(head)) is torch.nn.Linear
    assert base_report(model).kept[f"{head}.weight"] == "task head, which is trained in full"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("down_proj", {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        ("layers.1.mlp", {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}),
        ("*.0.self_attn.[qk]_proj", {f"model.layers.0.self_attn.{n}_proj" for n in "qk"}),
        ("model.layers.0.mlp.up_proj", {"model.layers.0.mlp.up_proj"}),
    ],
)
def test_keep_takes_names_ends_of_names_containers_and_patterns(saved, entry, expected):
    model = load_base(saved, "nf4", keep=[entry])

    dense = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert dense == expected | {"lm_head"}
    kept = {n.removesuffix(".weight") for n, r in base_report(model).kept.items() if "keep" in r}
    assert kept == expected


def test_report_counts_parameters_and_bytes(saved):
    model = load_base(saved, "nf4")
    original = stock(saved)

    report = base_report(model)

    assert report.kind == "nf4"
    linears = sum(m.weight.numel() for n, m in original.named_modules() if "proj" in n)
    assert report.storage["nf4"][0] == linears
    assert sum(count for count, _ in report.storage.values()) == original.num_parameters()
    tensors = {k: v for k, v in model.state_dict().items() if ".quant_state." not in k}
    in_states = sum(v.nbytes for v in tensors.values())
    offsets = 4 * sum(isinstance(m, Linear4bit) for m in model.modules())
    assert report.nbytes == in_states + offsets + sum(b.nbytes for b in model.buffers())
    assert "output head" in str(report)
    assert report.to_dict()["nbytes"] == report.nbytes
    assert explain(model).storage["nf4"] == linears


def test_report_leaves_adapters_out(saved):
    model = load_base(saved, "nf4")
    before = base_report(model)

    assert base_report(wrap(model)) == before


def test_loading_logs_the_report(saved, caplog):
    with caplog.at_level(logging.INFO, "peftkit.base"):
        load_base(saved, "nf4")

    assert "not quantised" in caplog.text


def test_tied_embeddings_stay_tied(tmp_path):
    base_cases.save_llama(tmp_path, tie_word_embeddings=True)

    model = load_base(tmp_path, "nf4")

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert base_report(model).storage["bfloat16"][0] < 2 * model.lm_head.weight.numel()


def test_generation_settings_are_loaded(saved, tmp_path):
    model = stock(saved)
    model.generation_config.max_length = 7
    model.save_pretrained(tmp_path)

    assert load_base(tmp_path, "nf4").generation_config.max_length == 7
    (tmp_path / "generation_config.json").unlink()
    ours, theirs = (load(tmp_path).generation_config for load in (load_base, stock))
    assert ours.to_dict() == theirs.to_dict()


def test_a_new_head_may_be_missing_if_another_class_is_asked_for(saved):
    model = load_base(saved, "nf4", auto_class="AutoModelForSequenceClassification", num_labels=3)

    assert type(model) is hf.LlamaForSequenceClassification
    assert model.score.weight.shape == (3, 64)
    assert model.score.weight.isfinite().all()
    assert type(model.score) is torch.nn.Linear
    base_cases.assert_same(
        load_base(saved, auto_class=hf.LlamaModel), stock(saved, cls=hf.LlamaModel)
    )


def test_arguments_reach_the_config_and_the_model(saved):
    model = load_base(saved, attn_implementation="eager", attention_dropout=0.5)

    assert model.config._attn_implementation == "eager"
    assert model.config.attention_dropout == 0.5


def test_a_repository_in_the_local_cache_is_found_by_its_id(tmp_path):
    commit = "0" * 40
    repository = tmp_path / "models--someone--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    base_cases.save_llama(repository / "snapshots" / commit)

    model = load_base("someone/llama", "nf4", cache_dir=tmp_path)

    assert model.name_or_path == "someone/llama"
    base_cases.assert_same(model, stock("someone/llama", "nf4", cache_dir=tmp_path))


def test_variants_and_single_files_are_found(tmp_path):
    original = hf.LlamaForCausalLM(base_cases.llama_config())
    original.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    one = hf.LlamaForCausalLM(base_cases.llama_config())
    one.save_pretrained(tmp_path / "one")

    assert torch.equal(load_base(tmp_path, variant="fp16").lm_head.weight, original.lm_head.weight)
    assert torch.equal(load_base(tmp_path / "one").lm_head.weight, one.lm_head.weight)


def test_files_may_change_after_loading(tmp_path):
    base_cases.save_llama(tmp_path)
    model = load_base(tmp_path, "nf4")
    before = model.model.embed_tokens.weight.clone()

    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)

    assert torch.equal(model.model.embed_tokens.weight, before)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_checkpoint_is_saved_again(tmp_path, base):
    """A second ``save_pretrained`` of transformers' own model raises ``NotImplementedError``."""
    load_base(base_cases.save_llama(tmp_path / "base"), base).save_pretrained(tmp_path / "first")
    load_base(tmp_path / "first").save_pretrained(tmp_path / "second")
    base_cases.assert_same(load_base(tmp_path / "second"), load_base(tmp_path / "first"))
