"""The report says what runs where and why, and agrees with the model it describes."""

import models
import pytest
import torch
from peft import IA3Config, LoraConfig
from rich.console import Console
from torch import nn

from peftkit import Report, explain, restore, wrap
from peftkit.find.targets import HEAD
from peftkit.report import NOT_TARGETED, LayerReport

_ATTENTION = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
_LAYER = "base_model.model.model.layers.0"


def _paths(report: Report) -> set[str]:
    return {layer.path for layer in report.layers if layer.is_adapter}


def test_every_layer_of_a_wrapped_model_is_fused():
    report = explain(wrap(models.tiny("llama")))
    adapters = [layer for layer in report.layers if layer.is_adapter]
    assert len(adapters) == 14
    assert {(layer.method, layer.path) for layer in adapters} == {("LoRA", "fused:torch")}
    assert report.fused_fraction == 1.0
    assert report.left_out == {"lm_head": HEAD}
    assert report.blocks == {"shared input": 2, "gated MLP": 2, "frozen RMSNorm": 5}
    assert report.logit_free


def test_restored_layers_run_peft_and_say_why():
    report = explain(restore(wrap(models.tiny("llama"))))
    assert report.fused_fraction == 0.0
    assert {layer.reason for layer in report.layers} == {
        "not accelerated; call peftkit.accelerate(model)"
    }
    assert report.blocks == {}
    assert not report.logit_free


def test_one_obstacle_is_told_of_its_layer_alone():
    model = wrap(models.tiny("llama"))
    model.get_submodule(f"{_LAYER}.self_attn.o_proj").merge()
    report = explain(model)
    odd = [layer for layer in report.layers if layer.path == "peft" and layer.is_adapter]
    assert [layer.name for layer in odd] == [f"{_LAYER}.self_attn.o_proj"]
    assert "merged" in odd[0].reason
    assert report.fused_fraction == pytest.approx(13 / 14)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            LoraConfig(
                target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
            ),
            "variant",
        ),
        (LoraConfig(target_modules=["embed_tokens"]), "Embedding"),
        (LoraConfig(target_modules=[], target_parameters=["embed_tokens.weight"]), "neither"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3 has no fused forward"),
    ],
    ids=["alora", "embedding", "parameter", "ia3"],
)
def test_layers_without_a_fused_forward_have_a_reason(config, reason):
    report = explain(wrap(models.tiny("llama"), config))
    adapters = [layer for layer in report.layers if layer.is_adapter]
    assert adapters
    assert all(layer.path == "peft" and reason in layer.reason for layer in adapters)
    assert report.fused_fraction == 0.0


def test_modules_no_config_names_are_left_out_as_not_targeted():
    report = explain(wrap(models.tiny("llama"), _ATTENTION))
    gated = {f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up", "down")}
    assert report.left_out == dict.fromkeys(gated, NOT_TARGETED) | {"lm_head": HEAD}


def test_heads_trained_as_a_whole_are_not_left_out():
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    left_out = explain(wrap(models.tiny("bert"), config)).left_out
    assert "classifier" not in left_out
    assert left_out["bert.pooler.dense"] == NOT_TARGETED


def test_a_model_without_adapters():
    report = explain(models.tiny("llama"))
    assert report.layers == ()
    assert report.fused_fraction == 0.0
    assert len(report.left_out) == 15
    assert report.trainable == report.total


def test_counts_agree_with_peft_and_take_tied_weights_once():
    model = wrap(models.tiny("llama"))
    assert (explain(model).trainable, explain(model).total) == model.get_nb_trainable_parameters()
    tied = models.tiny("gpt2")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    report = explain(tied)
    assert report.total == sum({id(p): p.numel() for p in tied.parameters()}.values())


def test_packed_weights_count_by_the_numbers_they_stand_for():
    from bitsandbytes.nn import Linear4bit

    model = models.tiny("llama")
    before = explain(model).total
    plain = model.model.layers[0].mlp.up_proj
    packed = Linear4bit(32, 64, bias=False, quant_type="nf4")
    packed.load_state_dict({"weight": torch.randn(64, 32)})
    model.model.layers[0].mlp.up_proj = packed.to("cpu")
    assert packed.weight.dtype is torch.uint8
    assert packed.weight.numel() == 64 * 32 // 2
    assert explain(model).total == before - plain.weight.numel() + 64 * 32


def test_layers_that_speak_for_themselves_are_reported_as_they_say():
    class Block(nn.Module):
        peftkit_method = "gated MLP"

        def peftkit_verdict(self):
            return "fused:triton", "because"

    model = models.tiny("llama")
    model.extra = Block()
    assert explain(model).layers == (
        LayerReport("extra", "gated MLP", "fused:triton", "because", is_adapter=False),
    )
    assert explain(model).blocks == {"gated MLP": 1}


def test_data_holds_all_of_the_report():
    report = explain(wrap(models.tiny("llama"), _ATTENTION))
    data = report.to_dict()
    assert data["fused_fraction"] == 1.0
    assert data["trainable"] == report.trainable
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in report.layers]
    assert data["left_out"] == report.left_out
    assert data["blocks"] == report.blocks


def test_the_table_has_one_row_for_the_same_module_of_all_layers():
    report = explain(wrap(models.tiny("llama"), _ATTENTION))
    console = Console(record=True, width=160)
    console.print(report)
    text = console.export_text()
    rows = [line for line in text.splitlines() if "model.layers.*.self_attn.q_proj " in line]
    assert len(rows) == 1
    assert [cell.strip() for cell in rows[0].split("│")[1:5]] == [
        "model.layers.*.self_attn.q_proj",
        "2",
        "LoRA",
        "fused:torch",
    ]
    assert "layers.0" not in text
    assert f"trainable {report.trainable:,} of {report.total:,}" in text
    assert "output head" in text
    assert "model.layers.*.self_attn.q_proj" in str(report)


def test_explaining_changes_nothing():
    model = wrap(models.tiny("llama"))
    before = {n: (type(m), sorted(m.__dict__)) for n, m in model.named_modules()}
    rng = torch.get_rng_state()
    explain(model)
    assert {n: (type(m), sorted(m.__dict__)) for n, m in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_peak_of_a_plan_stands_next_to_what_a_gpu_allocated(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftkit.report as report
    from peftkit import plan

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=64)
    model = wrap(LlamaForCausalLM(config))
    planned = plan(config, device="cpu", seq_len=8)
    found = explain(model, plan=planned)
    assert (found.planned_bytes, found.measured_bytes) == (planned.peak_bytes, None)
    assert f"peak memory: planned {planned.peak_bytes / 2**30:.2f} GiB\n" in f"{found}\n"
    assert "peak memory" not in str(explain(model))
    monkeypatch.setattr(report, "_most_allocated", lambda model: 3 * 2**30)
    assert "measured so far 3.00 GiB" in str(explain(model, plan=planned))
