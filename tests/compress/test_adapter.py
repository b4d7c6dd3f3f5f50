"""Ranks of a trained LoRA: the nearest update of a smaller rank, loaded by stock PEFT, with every kind of scale."""

import json

import finetune_cases as cases
import models
import pytest
import torch
import transformers as hf
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import peftkit
from peftkit import ContractError
from peftkit.compress.low_rank import Update
from peftkit.finetune import train

KINDS = {
    "all linears": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"q_proj": 6, r"layers\.1\.self_attn\.v_proj": 3},
        "alpha_pattern": {"v_proj": 20},
    },
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def fill(model):
    """Random numbers in every trained tensor, with a spectrum that falls."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
        if ("lora_B" in name or "lora_embedding_B" in name) and parameter.ndim > 1:
            sizes = 0.5 ** torch.arange(parameter.shape[1])
            parameter.data *= sizes.reshape(1, -1, *[1] * (parameter.ndim - 2))
    return model


def saved(folder, config, build=lambda: models.tiny("llama")):
    model = fill(get_peft_model(build(), config))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def truncated_by_hand(model, rank_of):
    """The same model with the product of each layer, truncated by a full decomposition, in place of its factors."""
    for name, module in model.named_modules():
        for kind, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if not getattr(module, kind, None):
                continue
            A, B = getattr(module, kind)["default"], getattr(module, second)["default"]
            A, B = (x if isinstance(x, torch.nn.Parameter) else x.weight for x in (A, B))
            update = (B.reshape(B.shape[0], -1) @ A.reshape(A.shape[0], -1)).double()
            u, s, vh = torch.linalg.svd(update.detach(), full_matrices=False)
            rank, width = rank_of(name, s), A.shape[0]
            near = torch.zeros(width, vh.shape[1], dtype=torch.float64)
            near[:rank] = s[:rank, None] * vh[:rank]
            A.data = near.to(A.dtype).reshape(A.shape)
            left = torch.zeros(u.shape[0], width, dtype=torch.float64)
            left[:, :rank] = u[:, :rank]
            B.data = left.to(B.dtype).reshape(B.shape)
    return model


def outputs(model, batch=None):
    with torch.no_grad():
        found = model.eval()(**(batch or {"input_ids": torch.arange(24).reshape(2, 12) + 3}))
    return found.logits


def assert_near(found, expected):
    # Two float32 factorings of one update; each output is a sum of hundreds of products.
    assert (found - expected).abs().max() <= 256 * torch.finfo(
        torch.float32
    ).eps * expected.abs().max()


def test_the_truncation_is_that_of_the_full_product():
    draw = torch.Generator().manual_seed(0)
    lora_A, lora_B = torch.randn(6, 20, generator=draw), torch.randn(9, 6, generator=draw)
    u, s, vh = torch.linalg.svd(1.5 * (lora_B.double() @ lora_A.double()), full_matrices=False)
    found = Update(lora_A, lora_B, 1.5).truncated(2, torch.float64)
    expected = (u[:, :2] * s[:2]) @ vh[:2]
    eps = torch.finfo(torch.float64).eps
    assert (found.B @ found.A - expected).abs().max() <= 64 * eps * s[0]
    lost = (s[2:].square().sum() / s.square().sum()).item()
    assert abs(found.energy - (1 - lost)) <= 64 * eps
    assert abs(found.error - lost**0.5) <= 64 * eps
    assert found.A.shape == (2, 20)
    assert abs(found.A.norm() - found.B.norm()) <= 64 * eps * s[0]


def test_energy_chooses_the_smallest_rank_by_hand():
    # Squares of the singular values: 16, 4, 1, so one keeps 76 % and two keep 95 %.
    update = Update(torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.eye(3), 1.0)
    assert [update.rank_for(share) for share in (0.5, 0.76, 0.77, 0.95, 0.96, 0.9999)] == [
        1, 1, 2, 2, 3, 3
    ]  # fmt: skip
    zero = Update(torch.zeros(3, 4), torch.zeros(5, 3), 1.0)
    assert zero.rank_for(0.9) == 1
    assert zero.truncated(1, torch.float32)[2:] == (1.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_loads_the_nearest_update(kind, tmp_path):
    config = LoraConfig(**{"r": 8, "lora_alpha": 12} | KINDS[kind])
    model = saved(tmp_path / "a", config)
    whole = outputs(model)
    report = peftkit.prune(tmp_path / "a", tmp_path / "b", rank=2)
    found = outputs(PeftModel.from_pretrained(models.tiny("llama"), tmp_path / "b"))
    assert_near(found, outputs(truncated_by_hand(model, lambda name, s: 2)))
    assert (found - whole).abs().max() > 1e-3
    assert {layer.after for layer in report.layers} == {2}
    assert all(0 < layer.energy < 1 and 0 < layer.error < 1 for layer in report.layers)
    # peftkit's own loader reads it too.
    assert_near(outputs(peftkit.load_adapter(models.tiny("llama"), tmp_path / "b")), found)
    assert json.loads((tmp_path / "b" / "prune.json").read_text()) == report.to_dict()


def test_each_layer_has_the_rank_that_its_energy_needs(tmp_path):
    config = LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", use_rslora=True)
    model = saved(tmp_path / "a", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1" in name and "lora_B" in name:
                parameter[:, 1:] = 0
    model.save_pretrained(tmp_path / "a")
    report = peftkit.prune(tmp_path / "a", tmp_path / "b", energy=0.95)
    ranks = {layer.name: layer.after for layer in report.layers}
    assert {rank for name, rank in ranks.items() if "layers.1" in name} == {1}
    assert min(rank for name, rank in ranks.items() if "layers.0" in name) > 1
    assert all(layer.energy >= 0.95 for layer in report.layers)
    expected = truncated_by_hand(
        model, lambda name, s: ranks[name.removeprefix("base_model.model.")]
    )
    found = PeftModel.from_pretrained(models.tiny("llama"), tmp_path / "b")
    assert_near(outputs(found), outputs(expected))
    file = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert report.numbers_after == sum(t.numel() for t in file.values()) < report.numbers_before


# PEFT takes a bias of lora_B for a tensor that was not gathered.
@pytest.mark.filterwarnings(
    r"ignore:.*LoRA tensor.s. have invalid shape:peft.utils.warning.PeftWarning"
)
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_transposed_linears_and_convolutions_are_pruned(name, tmp_path):
    def build():
        if name == "gpt2":
            return models.tiny("gpt2")
        torch.manual_seed(0)
        return hf.ResNetForImageClassification(
            hf.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
            )
        ).eval()

    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["convolution"]
    batch = None if name == "gpt2" else {"pixel_values": torch.randn(2, 3, 16, 16)}
    # PEFT multiplies the bias of lora_B with the scale, too.
    options = {"fan_in_fan_out": True, "lora_bias": True} if name == "gpt2" else {}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)
    model = saved(tmp_path / "a", config, build)
    peftkit.prune(tmp_path / "a", tmp_path / "b", rank=2)
    found = outputs(PeftModel.from_pretrained(build(), tmp_path / "b"), batch)
    assert_near(found, outputs(truncated_by_hand(model, lambda name, s: 2), batch))


def test_the_dtype_of_the_file_is_kept_and_its_rounding_is_in_the_error(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = fill(get_peft_model(models.tiny("llama"), config)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    report = peftkit.prune(tmp_path / "a", tmp_path / "b", rank=3)
    file = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {t.dtype for t in file.values()} == {torch.bfloat16}
    for layer in report.layers:
        lost = (1 - layer.energy) ** 0.5
        assert lost < layer.error < lost + 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which computes other weights"),
        (
            {"target_parameters": ["experts.w"]},
            r"has target_parameters=\['experts\.w'\], with which",
        ),
        ({"r": 5}, "has the rank 4 in the file and 5 in adapter_config.json"),
    ],
)
def test_other_updates_are_refused(changes, message, tmp_path):
    saved(tmp_path / "a", LoraConfig(r=4, target_modules=["q_proj"]))
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ContractError, match=message):
        peftkit.prune(tmp_path / "a", tmp_path / "b", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_wrong_arguments_are_refused(tmp_path):
    folder = tmp_path / "a"
    saved(folder, LoraConfig(r=4, target_modules=["q_proj"]))
    for arguments, message in (
        ({}, "nothing is given; give exactly one of rank, energy, sparsity, pattern"),
        ({"rank": 2, "energy": 0.9}, r"rank=2 and energy=0\.9 is given"),
        ({"rank": 0}, "rank=0 must be a whole number"),
        ({"energy": 1.0}, r"energy=1\.0 must be between 0 and 1"),
        ({"rank": 4}, r"rank=4 lowers no rank of .* \(the largest is 4\)"),
        ({"rank": 2, "data": "d.jsonl"}, "data='d.jsonl' needs the folder of a run"),
    ):
        with pytest.raises(ContractError, match=message):
            peftkit.prune(folder, tmp_path / "b", **arguments)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ContractError, match="is not empty"):
        peftkit.prune(folder, folder, rank=2)
    get_peft_model(
        models.tiny("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ContractError, match="an adapter of the kind IA3, and only LoRA has ranks"):
        peftkit.prune(tmp_path / "ia3", tmp_path / "b", rank=2)


def test_a_run_is_measured_before_and_after(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    rows = cases.write_jsonl(tmp_path / "d.jsonl", cases.chats(12))
    training = {"max_steps": 20, "samples": 0}
    lora = {"name": "lora", "r": 8, "target_modules": "all-linear"}
    values = cases.recipe(model, "sft", rows, tmp_path / "run", strategy=lora, training=training)
    train(values)
    printed = cases.run("prune", tmp_path / "run", tmp_path / "b", "--rank", 1, "--data", rows)
    assert "rank=1: 14 layers" in printed
    report = json.loads((tmp_path / "b" / "prune.json").read_text())
    assert report["before"] == peftkit.evaluate(tmp_path / "run", str(rows))
    assert report["after"]["loss"] != report["before"]["loss"]
    tuned = peftkit.load_adapter(hf.AutoModelForCausalLM.from_pretrained(model), tmp_path / "b")
    assert tuned.peft_config["default"].r == 1
    assert "smaller by `peftkit prune` (rank=1)" in (tmp_path / "b" / "README.md").read_text()
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    found = json.loads(
        cases.run("prune", tmp_path / "run", tmp_path / "c", "--energy", 0.9, "--json")
    )
    assert found["setting"] == "energy=0.9"
    assert "lowers no rank" in cases.run(
        "prune", tmp_path / "b", tmp_path / "d", "--rank", 1, code=1
    )
