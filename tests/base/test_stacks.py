"""Stacks of experts in four bits: bitsandbytes' storage, reports, checkpoints, and what is not packed."""

import expert_cases as cases
import pytest
import torch
import transformers as hf
from base_cases import assert_same
from safetensors.torch import load_file, save_file

from peftkit import BottleneckConfig, ContractError, base_report, explain, load_base, wrap

pytestmark = pytest.mark.usefixtures("one_thread")

every = pytest.mark.parametrize("name", cases.NAMES)


@every
@pytest.mark.parametrize("way", ["read", "in place"])
def test_the_storage_is_bitsandbytes_own(name, way, tmp_path):
    cases.saved(name, tmp_path, torch.bfloat16)
    model = load_base(tmp_path, "nf4")
    if way == "in place":
        model = load_base(load_base(tmp_path), "nf4")
    expected = cases.packed_by_bitsandbytes(load_base(tmp_path)).state_dict()
    actual = model.state_dict()
    packed = [key for key in expected if ".experts." in key]
    # codes, block maxima, their table, the table of levels, their maxima and the description, for two stacks of two layers
    assert sum("bias" not in key for key in packed) == 6 * 4
    for key in packed:
        assert torch.equal(actual[key], expected[key]), key


@every
def test_the_report_counts_them_and_routers_stay(name, tmp_path):
    model = load_base(cases.saved(name, tmp_path, torch.bfloat16), "nf4")
    report = base_report(model)
    stacks = [part for part in report.parts if part.name.rpartition(".")[2] in cases.STACKS]
    assert len(stacks) == 4
    for part in stacks:
        assert (part.storage, part.reason) == ("nf4", "")
        numel = model.get_submodule(part.name.rpartition(".")[0]).num_experts * 64 * 128
        numel *= 2 if part.name.endswith("gate_up_proj") else 1
        assert part.parameters == numel
        # half a byte, one byte for each block, one maximum for 256 of these, two tables and the offset
        blocks = numel // 64
        assert part.nbytes == numel // 2 + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
    routers = [part for part in report.parts if part.name.split(".")[-2] in ("gate", "router")]
    assert {part.storage for part in routers} == {"bfloat16"}
    assert explain(model).storage["nf4"] == report.storage["nf4"][0]
    original = sum(p.numel() for p in load_base(tmp_path).parameters())
    assert explain(model).total == original


@every
def test_a_saved_model_is_loaded_again(name, tmp_path):
    model = load_base(cases.saved(name, tmp_path / "base", torch.bfloat16), "nf4")
    model.save_pretrained(tmp_path / "saved")
    for base in ("auto", "nf4"):
        again = load_base(tmp_path / "saved", base)
        assert_same(again, model)
        assert [p.reason for p in base_report(again).parts] == [
            p.reason for p in base_report(model).parts
        ]
    again.save_pretrained(tmp_path / "again")
    assert_same(load_base(tmp_path / "again"), model)


def test_transformers_alone_refuses_such_a_checkpoint(tmp_path):
    model = load_base(cases.saved("qwen3_moe", tmp_path / "base"), "nf4")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_stacks_of_another_model_are_refused(tmp_path):
    model = load_base(cases.saved("qwen3_moe", tmp_path / "base"), "nf4")
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = {key.replace(".experts.", ".others."): t for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ContractError, match=r"no stack of experts of this name"):
        load_base(tmp_path / "saved")


def test_what_is_kept_is_not_packed(tmp_path):
    cases.saved("mixtral", tmp_path, torch.bfloat16)
    first = "model.layers.0.mlp.experts"
    for keep, kept in {
        "experts": 4,
        "model.layers.0.*": 2,
        "down_proj": 2,
        f"{first}.gate_up_proj": 1,
    }.items():
        report = base_report(load_base(tmp_path, "nf4", [keep]))
        names = [name for name in report.kept if ".experts." in name]
        assert len(names) == kept, keep
        assert all(report.kept[name].startswith("experts stacked") for name in names)
    report = base_report(load_base(tmp_path, "int8"))
    assert report.kept[f"{first}.down_proj"].endswith("stores in 4 bits only")
    with pytest.raises(ContractError, match="'expert' matches nothing"):
        load_base(tmp_path, "nf4", ["expert"])


def test_rows_that_are_no_whole_blocks_stay(tmp_path):
    """On the CPU bitsandbytes does not decode such a weight as it was quantised."""
    config = hf.MixtralConfig(**cases._SIZES, num_local_experts=4, intermediate_size=96)
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = load_base(tmp_path, "nf4")
    kept = base_report(model).kept
    assert {name for name in kept if ".experts." in name} == {
        f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)
    }
    assert kept["model.layers.0.mlp.experts.down_proj"].endswith("no whole blocks of 64")
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_base(tmp_path / "saved"), model)


def test_values_that_are_not_finite_are_named(tmp_path):
    cases.saved("qwen3_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ContractError, match=r"layers\.1\.mlp\.experts\.2\.down_proj"):
        load_base(tmp_path, "nf4")
    model = load_base(tmp_path, "fp32", strict=False)
    before = type(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(ContractError, match=r"layers\.1\.mlp\.experts\.down_proj has 1 value"):
        load_base(model, "nf4")
    assert type(model.model.layers[0].self_attn.q_proj) is before


@every
def test_methods_that_run_the_model_to_find_their_places_find_them(name, tmp_path):
    model = load_base(cases.saved(name, tmp_path), "nf4").eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        wrapped = wrap(model, BottleneckConfig(bottleneck_size=4)).eval()
        torch.testing.assert_close(wrapped(ids).logits, expected)
    assert any(p.requires_grad for p in wrapped.parameters())
    assert not any("_hidden_stacks" in module.__dict__ for module in wrapped.modules())
