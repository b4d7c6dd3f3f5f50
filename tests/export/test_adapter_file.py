"""An adapter in a GGUF file has the products that PEFT computes, in llama.cpp's names, scale and row order."""

import models
import peft
import pytest
import torch
from gguf import GGUFReader, dequantize

from peftkit import ContractError, LoraConfig, PrefixConfig, export_adapter_gguf, wrap
from peftkit.export import adapter_file
from peftkit.export.tensors import interleave


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


@pytest.fixture
def base(tmp_path):
    models.tiny("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def saved(folder, name="llama", **fields):
    fields = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
    } | fields
    model = peft.get_peft_model(models.tiny(name), LoraConfig(**fields))
    model.save_pretrained(folder)
    return model


def products(file):
    """``alpha / rank · B A`` of every pair, as llama.cpp computes it."""
    read = GGUFReader(file)
    alpha = read.fields["adapter.lora.alpha"].contents()
    held = {
        t.name: torch.tensor(dequantize(t.data, t.tensor_type)).reshape(*reversed(t.shape.tolist()))
        for t in read.tensors
    }
    found = {}
    for name in held:
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".lora_a")
            A, B = held[name], held[f"{stem}.lora_b"]
            A = A.T if stem == "token_embd.weight" else A
            found[stem] = alpha / A.shape[0] * (B @ A)
    return found


NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "down_proj": "ffn_down",
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {"down_proj": 6}, "use_rslora": True},
    ],
    ids=["plain", "rslora", "patterns", "both"],
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_products_are_those_of_peft(name, fields, tmp_path):
    models.tiny(name).save_pretrained(tmp_path / "base")
    model = saved(tmp_path / "adapter", name, **fields)
    export_adapter_gguf(tmp_path / "adapter", tmp_path / "a.gguf", base=str(tmp_path / "base"))
    read = GGUFReader(tmp_path / "a.gguf")
    assert read.fields["general.type"].contents() == "adapter"
    assert read.fields["adapter.type"].contents() == "lora"
    assert read.fields["general.architecture"].contents() == name
    found = products(tmp_path / "a.gguf")
    assert len(found) == 8
    for index, layer in enumerate(model.get_base_model().model.layers):
        for leaf, theirs in NAMES.items():
            part = layer.mlp if leaf == "down_proj" else layer.self_attn
            delta = getattr(part, leaf).get_delta_weight("default").detach()
            if name == "llama" and leaf in ("q_proj", "k_proj"):
                delta = interleave(delta, 4 if leaf == "q_proj" else 2)
            torch.testing.assert_close(
                found[f"blk.{index}.{theirs}.weight"], delta, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2)])
def test_storage(dtype, bound, tmp_path, base):
    saved(tmp_path / "adapter", target_modules=["v_proj"])
    for kind in ("f32", dtype):
        export_adapter_gguf(tmp_path / "adapter", tmp_path / f"{kind}.gguf", base=base, dtype=kind)
    wanted, found = products(tmp_path / "f32.gguf"), products(tmp_path / f"{dtype}.gguf")
    for name, delta in wanted.items():
        assert 0 < (found[name] - delta).norm() / delta.norm() < bound


def test_an_adapted_embedding(tmp_path, base):
    with pytest.warns(UserWarning, match="embedding layers found"):
        model = saved(tmp_path / "adapter", target_modules=["embed_tokens"])
    export_adapter_gguf(tmp_path / "adapter", tmp_path / "a.gguf", base=base)
    delta = model.get_base_model().model.embed_tokens.get_delta_weight("default").detach()
    # PEFT's delta is [vocabulary, hidden]; llama.cpp looks up rows of A and multiplies them by B
    (found,) = products(tmp_path / "a.gguf").values()
    torch.testing.assert_close(found.T, delta, rtol=1e-5, atol=1e-6)


def test_what_llama_cpp_does_not_apply_is_refused(tmp_path, base, monkeypatch):
    def refused(match, error=ContractError, **arguments):
        with pytest.raises(error, match=match):
            export_adapter_gguf(
                tmp_path / "adapter", tmp_path / "out" / "a.gguf", **{"base": base, **arguments}
            )
        assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True

    saved(tmp_path / "adapter", use_dora=True)
    refused("use_dora=True: llama.cpp does not support DoRA; merge the adapter")
    saved(tmp_path / "adapter", modules_to_save=["lm_head"])
    refused("lm_head.weight is not a factor that llama.cpp applies")
    wrap(models.tiny("llama"), PrefixConfig()).save_pretrained(tmp_path / "adapter")
    refused("peft_type=PEFTKIT_PREFIX: llama.cpp applies LoRA only")
    saved(tmp_path / "adapter")
    refused("base=None: .*pass base", base=None)
    refused("is neither a folder with a config.json", error=ValueError, base=str(tmp_path))
    refused("dtype='q4_0' is unknown", error=ValueError, dtype="q4_0")
    models.tiny("opt").save_pretrained(tmp_path / "opt")
    refused("model_type='opt' cannot be exported", base=str(tmp_path / "opt"))
    with monkeypatch.context() as patch:
        kept = adapter_file.stored
        patch.setattr(adapter_file, "stored", lambda tensor, kind: kept(tensor * 1.01, kind))
        refused("differs by 0.01 in the file")
