"""Rewriting an adapter: the same products of the factors, and folders that appear only when complete."""

import json
import math

import models
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from peftkit import ContractError, LoraConfig, convert_adapter, load_adapter, serving_report
from peftkit.serving import convert

EXPERTS = 4
# PEFT 0.21 applies patterns to target_parameters, and warns that they matched no module.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def qwen3_moe():
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return hf.Qwen3MoeForCausalLM(config).eval()


def mixtral():
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    return hf.MixtralForCausalLM(config).eval()


def saved(model, folder, **fields):
    fields = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    } | fields
    peft.get_peft_model(model, LoraConfig(**fields)).save_pretrained(folder)
    return folder


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def logits(model, folder):
    """Of the model with the adapter, loaded by PEFT itself."""
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return adapted(torch.arange(2, 26).view(2, 12)).logits


@pytest.fixture
def base(tmp_path):
    qwen3_moe().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_one_pair_per_expert_has_the_same_products(tmp_path, base):
    stacked = saved(qwen3_moe(), tmp_path / "stacked")
    convert_adapter(stacked, tmp_path / "single", experts="per-expert", base=base)
    old, new = tensors(stacked), tensors(tmp_path / "single")
    stem = "base_model.model.model.layers.1.mlp.experts"
    A = old[f"{stem}.base_layer.lora_A.weight"].view(EXPERTS, 3, 32)
    B = old[f"{stem}.base_layer.lora_B.weight"].view(48, 3, EXPERTS)
    down_A = old[f"{stem}.lora_A.weight"].view(EXPERTS, 3, 24)
    down_B = old[f"{stem}.lora_B.weight"].view(32, 3, EXPERTS)
    for expert in range(EXPERTS):
        for part, rows in (("gate_proj", slice(0, 24)), ("up_proj", slice(24, 48))):
            assert torch.equal(new[f"{stem}.{expert}.{part}.lora_A.weight"], A[expert])
            assert torch.equal(new[f"{stem}.{expert}.{part}.lora_B.weight"], B[rows, :, expert])
        assert torch.equal(new[f"{stem}.{expert}.down_proj.lora_A.weight"], down_A[expert])
        assert torch.equal(new[f"{stem}.{expert}.down_proj.lora_B.weight"], down_B[..., expert])
    written = config(tmp_path / "single")
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (3, 6, {})
    assert written["target_parameters"] is None
    assert {"gate_proj", "up_proj", "down_proj", "q_proj"} <= set(written["target_modules"])


def test_peft_and_the_servers_read_both_layouts(tmp_path, base):
    stacked = saved(qwen3_moe(), tmp_path / "stacked")
    single = convert_adapter(stacked, tmp_path / "single", experts="per-expert", base=base)
    expected = logits(qwen3_moe(), stacked)
    assert (expected - qwen3_moe()(torch.arange(2, 26).view(2, 12)).logits).abs().max() > 0.01
    torch.testing.assert_close(logits(qwen3_moe(), single), expected, rtol=0, atol=1e-5)
    loaded = load_adapter(qwen3_moe(), single).eval()
    with torch.no_grad():
        found = loaded(torch.arange(2, 26).view(2, 12)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for target in ("vllm", "sglang", "gguf", "peft"):
        assert serving_report(single, target, base=base).serves == "as trained"
    for target in ("vllm", "gguf"):
        assert serving_report(stacked, target, base=base).serves == "not at all"
    found = serving_report(stacked, "sglang", base=base)
    assert found.serves == "differently"
    assert "--experts per-expert" in found.problems[0]


def test_both_directions_are_inverse_bit_by_bit(tmp_path, base):
    stacked = saved(qwen3_moe(), tmp_path / "stacked")
    convert_adapter(stacked, tmp_path / "single", experts="per-expert", base=base)
    again = convert_adapter(tmp_path / "single", tmp_path / "again", experts="stacked", base=base)
    old, new = tensors(stacked), tensors(again)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert set(config(again)["target_parameters"]) == set(config(stacked)["target_parameters"])
    assert config(again)["target_modules"] == sorted(config(stacked)["target_modules"])
    assert torch.equal(logits(qwen3_moe(), again), logits(qwen3_moe(), stacked))


def test_pairs_of_their_own_become_block_diagonal_and_back(tmp_path, base):
    """Gate and up with different lora_A, as trained with one linear layer for each expert."""
    stacked = saved(qwen3_moe(), tmp_path / "stacked")
    single = convert_adapter(stacked, tmp_path / "single", experts="per-expert", base=base)
    file = single / "adapter_model.safetensors"
    held = {
        name: torch.randn_like(t) if "up_proj.lora_A" in name else t
        for name, t in load_file(file).items()
    }
    save_file(held, file)
    again = convert_adapter(single, tmp_path / "again", experts="stacked", base=base)
    written = config(again)
    assert written["rank_pattern"] == {r"mlp\.experts\.gate_up_proj": 6}
    assert written["alpha_pattern"] == {r"mlp\.experts\.gate_up_proj": 12}
    torch.testing.assert_close(logits(qwen3_moe(), again), logits(qwen3_moe(), single))
    back = convert_adapter(again, tmp_path / "back", experts="per-expert", base=base)
    new = tensors(back)
    assert new.keys() == held.keys()
    assert all(torch.equal(held[name], new[name]) for name in held)


def test_mixtral_has_other_names_for_single_experts(tmp_path):
    mixtral().save_pretrained(tmp_path / "base")
    stacked = saved(mixtral(), tmp_path / "stacked", target_modules=["q_proj"])
    single = convert_adapter(
        stacked, tmp_path / "single", experts="per-expert", base=str(tmp_path / "base")
    )
    names = set(tensors(single))
    assert "base_model.model.model.layers.0.block_sparse_moe.experts.3.w2.lora_B.weight" in names
    torch.testing.assert_close(
        logits(mixtral(), single), logits(mixtral(), stacked), rtol=0, atol=1e-5
    )
    again = convert_adapter(
        single, tmp_path / "again", experts="stacked", base=str(tmp_path / "base")
    )
    old, new = tensors(stacked), tensors(again)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_different_ranks_are_padded_for_single_experts(tmp_path, base):
    pattern = {"rank_pattern": {"mlp.experts.gate_up_proj": 5}, "use_rslora": True}
    stacked = saved(qwen3_moe(), tmp_path / "stacked", **pattern)
    single = convert_adapter(stacked, tmp_path / "single", experts="per-expert", base=base)
    written = config(single)
    assert written["r"] == 5
    assert not written["use_rslora"]
    assert {t.shape[0] for n, t in tensors(single).items() if "lora_A" in n} == {5}
    assert serving_report(single, "sglang", base=base).serves == "as trained"
    torch.testing.assert_close(
        logits(qwen3_moe(), single), logits(qwen3_moe(), stacked), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_one_adapted_parameter(parameter, tmp_path, base):
    stacked = saved(
        qwen3_moe(), tmp_path / "stacked", target_parameters=[f"mlp.experts.{parameter}"]
    )
    single = convert_adapter(stacked, tmp_path / "single", experts="per-expert", base=base)
    parts = {name.split(".")[-3] for name in tensors(single) if ".experts." in name}
    assert parts == ({"down_proj"} if parameter == "down_proj" else {"gate_proj", "up_proj"})
    again = convert_adapter(single, tmp_path / "again", experts="stacked", base=base)
    old, new = tensors(stacked), tensors(again)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert torch.equal(logits(qwen3_moe(), again), logits(qwen3_moe(), stacked))


def test_uniform_ranks_and_scales_compute_the_same(tmp_path):
    fields = {
        "target_parameters": None,
        "target_modules": r".*\.(q_proj|v_proj|down_proj)",
        "rank_pattern": {"q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"v_proj": 5},
        "use_rslora": True,
    }
    mixed = saved(models.tiny("llama"), tmp_path / "mixed", **fields)
    plain = convert_adapter(mixed, tmp_path / "plain", uniform=True)
    written = config(plain)
    assert written["r"] == 7
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert written["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    old, new = tensors(mixed), tensors(plain)
    scale = written["lora_alpha"] / written["r"]
    for name, A in old.items():
        if "lora_A" not in name:
            continue
        other = name.replace("lora_A", "lora_B")
        alpha = 5 if "v_proj" in name else 6
        expected = alpha / math.sqrt(A.shape[0]) * (old[other].double() @ A.double())
        found = scale * (new[other].double() @ new[name].double())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(models.tiny("llama").eval(), plain), logits(models.tiny("llama").eval(), mixed))  # fmt: skip
    assert serving_report(mixed, "sglang").serves == "not at all"
    for target in ("sglang", "gguf", "vllm"):
        assert serving_report(plain, target).serves == "as trained"


def test_stacks_get_a_uniform_rank_too(tmp_path, base):
    pattern = {"rank_pattern": {"mlp.experts.gate_up_proj": 5}}
    stacked = saved(qwen3_moe(), tmp_path / "stacked", **pattern)
    plain = convert_adapter(stacked, tmp_path / "plain", uniform=True)
    assert (config(plain)["r"], config(plain)["rank_pattern"]) == (5, {})
    torch.testing.assert_close(
        logits(qwen3_moe(), plain), logits(qwen3_moe(), stacked), rtol=0, atol=1e-5
    )


def test_names_are_written_as_peft_writes_them(tmp_path):
    fields = {"target_parameters": None, "target_modules": ["q_proj"]}
    folder = saved(models.tiny("llama"), tmp_path / "lora", **fields)
    held = tensors(folder)
    save_file(
        {
            n.replace("base_model.model.model", "_orig_mod.module.model").replace(
                ".weight", ".default.weight"
            ): t
            for n, t in held.items()
        },
        folder / "adapter_model.safetensors",
    )
    assert serving_report(folder, "vllm").serves == "not at all"
    new = tensors(convert_adapter(folder, tmp_path / "out"))
    assert new.keys() == held.keys()
    assert all(torch.equal(held[name], new[name]) for name in held)
    assert serving_report(tmp_path / "out", "vllm").serves == "as trained"


def test_refusals_name_the_argument_and_write_nothing(tmp_path, base):
    fields = {"target_parameters": None, "target_modules": ["q_proj"]}
    plain = saved(models.tiny("llama"), tmp_path / "plain", **fields)
    stacked = saved(qwen3_moe(), tmp_path / "stacked")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="experts='3d' is unknown; use 'per-expert'"):
        convert_adapter(plain, tmp_path / "out", experts="3d")
    with pytest.raises(ContractError, match="the adapter has no stacked experts"):
        convert_adapter(plain, tmp_path / "out", experts="per-expert", base=base)
    with pytest.raises(ContractError, match="experts='stacked': the adapter has no pairs"):
        convert_adapter(stacked, tmp_path / "out", experts="stacked", base=base)
    with pytest.raises(ContractError, match=r"base=None: .*pass base"):
        convert_adapter(stacked, tmp_path / "out", experts="per-expert")
    with pytest.raises(ContractError, match="exists; choose another folder"):
        convert_adapter(plain, stacked)
    models.tiny("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ContractError, match="llama has no layout with one pair for each expert"):
        convert_adapter(plain, tmp_path / "out", experts="per-expert", base=str(tmp_path / "llama"))
    dora = saved(models.tiny("llama"), tmp_path / "dora", **fields, use_dora=True)
    with pytest.raises(ContractError, match="use_dora=True: only plain LoRA"):
        convert_adapter(dora, tmp_path / "out", uniform=True)
    file = stacked / "adapter_config.json"
    file.write_text(json.dumps(config(stacked) | {"r": 5}))
    with pytest.raises(ContractError, match="do not consist of pairs of rank 5"):
        convert_adapter(stacked, tmp_path / "out", experts="per-expert", base=base)
    after = sorted(tmp_path.iterdir())
    assert set(after) - set(before) == {tmp_path / "llama", tmp_path / "dora"}


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    fields = {"target_parameters": None, "target_modules": ["q_proj"]}
    plain = saved(models.tiny("llama"), tmp_path / "plain", **fields)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        convert_adapter(plain, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain"]
