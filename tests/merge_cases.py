"""Adapters of PEFT's methods that can be merged, with values as if they were trained, and PEFT's own merge as the reference."""

import copy
from pathlib import Path

import models
import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from peftkit.find.repacking import without_repacking

_ATTENTION = ["q_proj", "v_proj"]
_LINEAR = [*_ATTENTION, "down_proj"]

CONFIGS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "rsLoRA": lambda: LoraConfig(r=4, use_rslora=True, target_modules=_LINEAR),
    "DoRA": lambda: LoraConfig(r=4, use_dora=True, target_modules=_LINEAR),
    "LoRA with ranks": lambda: LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, target_modules=_LINEAR
    ),
    "LoRA of embeddings": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "LoRA with a head": lambda: LoraConfig(
        r=4, target_modules=_ATTENTION, modules_to_save=["lm_head", "norm"]
    ),
    "LoRA with tokens": lambda: LoraConfig(
        r=4, target_modules=_ATTENTION, trainable_token_indices=[3, 5]
    ),
    "LoRA of a parameter": lambda: LoraConfig(
        r=4, target_modules=["v_proj"], target_parameters=["q_proj.weight"]
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=_ATTENTION[:1]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=_ATTENTION),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=_LINEAR),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=_LINEAR),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=_LINEAR),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=_LINEAR),
    "RandLora": lambda: peft.RandLoraConfig(r=4, target_modules=_ATTENTION[:1]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


def trained(model: nn.Module, size: float = 0.1, seed: int = 7) -> nn.Module:
    """Add random numbers to every trainable value, as if the adapter were trained, and set evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data += size * noise
    return model.eval()


def adapted(method: str, name: str = "llama", **changes) -> PeftModel:
    """Tiny model ``name`` with a seemingly trained adapter of a method."""
    torch.manual_seed(0)
    model = get_peft_model(models.tiny(name, **changes), CONFIGS[method]())
    return trained(model)


def inputs(name: str = "llama", rows: int = 4) -> dict[str, torch.Tensor]:
    """Inputs for the tiny model ``name`` without labels."""
    parts = [models.batch(name, seed=seed) for seed in range(rows // 2)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "labels"}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a model in evaluation mode, by the weights as they are stored."""
    with torch.no_grad(), without_repacking(model):
        return model.eval()(**batch).logits.float()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    return found


def by_peft(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that PEFT's own merge and transformers' ``save_pretrained`` write."""
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
    return tensors(folder)
