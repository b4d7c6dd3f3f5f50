"""PEFT's prefix tuning, imported: the same outputs as PEFT's own model, in float64."""

import json

import families
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peftkit import ContractError, PrefixConfig, import_adapter, load_adapter, restore
from peftkit.compatibility.rounding import same_up_to_rounding
from peftkit.prefix import add_prefixes, remove_prefixes
from peftkit.prefix.positions import MovedPositions

P = 3
ROTARY = ("llama", "qwen2", "qwen3", "phi", "phi3", "gpt_neox", "granite", "cohere", "gpt_oss")
LEARNED = ("gpt2", "opt")
IDS = torch.arange(3, 8)[None]


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def base(name: str) -> nn.Module:
    model = families.family(name).double()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    return model


def tuned(name: str, folder, **fields) -> peft.PeftModel:
    """A prefix of PEFT's with numbers of the size of keys, saved."""
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **fields)
    model = peft.get_peft_model(base(name), config).double().eval()
    for parameter in model.prompt_encoder.parameters():
        nn.init.normal_(parameter, std=0.7)
    model.save_pretrained(folder)
    return model


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**({"input_ids": IDS} | inputs)).logits


def rounded(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Rotary embeddings compute cosines and sines in float32 whatever the model's dtype; no turning can be closer than that."""
    return tensor if name in LEARNED else tensor.float()


@pytest.mark.parametrize("name", [*ROTARY, *LEARNED])
def test_outputs_are_those_of_peft(name, tmp_path, recwarn):
    theirs = logits(tuned(name, tmp_path / "peft"))
    imported = import_adapter(base(name), tmp_path / "peft", "from_peft")
    plain = logits(base(name))
    assert not same_up_to_rounding(logits(restore(imported)), plain)
    assert same_up_to_rounding(rounded(logits(imported), name), rounded(theirs, name))
    imported.save_pretrained(tmp_path / "ours")
    again = load_adapter(base(name), tmp_path / "ours" / "from_peft", accelerate=False)
    assert torch.equal(logits(again), logits(imported))
    with imported.disable_adapter():
        assert torch.equal(logits(imported), plain)
    unloaded = imported.unload()
    assert torch.equal(logits(unloaded), plain)
    assert not any(isinstance(module, MovedPositions) for module in unloaded.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_padded_batches_and_generation_are_those_of_peft(name, tmp_path):
    theirs = tuned(name, tmp_path)
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    imported = restore(import_adapter(base(name), tmp_path))
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(imported.generate(**settings), theirs.generate(**settings))
    without = imported.generate(**settings, use_cache=False)
    assert torch.equal(imported.generate(**settings), without)


def test_a_reparametrised_prefix_is_evaluated(tmp_path):
    """PEFT saves what its encoder computes; a state dict saved in training has the encoder itself."""
    theirs = tuned("llama", tmp_path, prefix_projection=True, encoder_hidden_size=8)
    expected = logits(theirs)
    expected = rounded(expected, "llama")

    def imported() -> torch.Tensor:
        return rounded(logits(restore(import_adapter(base("llama"), tmp_path))), "llama")

    assert same_up_to_rounding(imported(), expected)
    encoder = theirs.prompt_encoder.default.state_dict()
    state = {f"prompt_encoder.default.{key}": value for key, value in encoder.items()}
    assert len(state) == 5
    save_file(state, tmp_path / "adapter_model.safetensors")
    assert same_up_to_rounding(imported(), expected)
    del state["prompt_encoder.default.transform.2.bias"]
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ContractError, match=r"has no transform\.2\.bias"):
        import_adapter(base("llama"), tmp_path)


def test_where_a_sliding_window_parts_the_two_is_said(tmp_path):
    """The tiny Mistral sees 8 tokens back: PEFT's three fall out of sight after the fifth token, ours never."""
    theirs = tuned("mistral", tmp_path)
    with pytest.warns(UserWarning, match="window of 8 tokens.*agree only on the first 5 tokens"):
        imported = restore(import_adapter(base("mistral"), tmp_path))
    ids = torch.arange(3, 15)[None]
    ours, peft_logits = logits(imported, input_ids=ids), logits(theirs, input_ids=ids)
    assert same_up_to_rounding(ours[:, :5].float(), peft_logits[:, :5].float())
    assert not same_up_to_rounding(ours[:, 8:], peft_logits[:, 8:])


def test_an_offset_of_our_own_moves_the_tokens_and_goes_with_the_prefix(tmp_path):
    model = base("gpt2")
    plain = logits(model)
    moved = logits(model, position_ids=torch.arange(4, 4 + IDS.shape[1])[None])
    add_prefixes(model, PrefixConfig(num_virtual_tokens=2, gate=True, position_offset=4))
    assert torch.equal(logits(model), moved)
    remove_prefixes(model)
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="no position embedding with a known name"):
        add_prefixes(base("llama"), PrefixConfig(position_offset=1))
    with pytest.raises(ValueError, match="position_offset=-1 is negative"):
        PrefixConfig(position_offset=-1)


@pytest.mark.parametrize(
    ("name", "why"),
    [("t5", "adds a relative position bias"), ("bart", "decoder's cache only")],
)
def test_encoder_decoders_are_refused_with_the_reason(name, why, tmp_path):
    written = {"peft_type": "PREFIX_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": P}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    save_file({"prompt_embeddings": torch.ones(P, 8)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ContractError, match=why):
        import_adapter(base(name), tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"prompt_embeddings": torch.ones(P, 8)},
            r"has the shape \[3, 8\], but this model needs \[3, 64\]",
        ),
        ({"prompt_embeddings": torch.ones(64)}, r"has the shape \[64\] instead of \[tokens"),
        ({"prompt_embeddings": torch.ones(P, 64), "classifier.weight": torch.ones(2)}, "1 key "),
        ({"lora_A": torch.ones(2)}, "has no prompt_embeddings, but lora_A"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(tensors, message, tmp_path):
    written = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": P}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = base("llama")
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ContractError, match=message):
        import_adapter(model, tmp_path)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_positions_that_are_no_rotation_of_the_keys_are_noticed(tmp_path):
    """A Llama whose keys also grow with the position."""
    tuned("llama", tmp_path)
    model = base("llama")
    project = model.model.layers[1].self_attn.k_proj.forward
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def by_position(x, position_ids):
        rotary.last = position_ids
        return forward(x, position_ids)

    rotary.forward = by_position
    model.model.layers[1].self_attn.k_proj.forward = lambda x: (
        project(x) * (1 + rotary.last[..., None].to(x.dtype))
    )
    with pytest.raises(ContractError, match=r"layers.1.self_attn does not rotate its keys"):
        import_adapter(model, tmp_path)
