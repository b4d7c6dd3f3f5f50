"""The architectures of the matrix: the tiny models of the tests, without dropout or other randomness in training mode."""

import copy
from collections.abc import Callable

import families
import torch
import transformers as hf
from torch import nn

from peftkit.compatibility import Case
from peftkit.compatibility.tiny import without_randomness

_NAMES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "phi": "Phi",
    "phi3": "Phi3",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "opt": "OPT",
    "bloom": "BLOOM",
    "falcon": "Falcon",
    "granite": "Granite",
    "cohere": "Cohere",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
    "gpt_oss": "GPT-OSS",
    "t5": "T5",
    "bart": "BART",
    "bert": "BERT",
    "roberta": "RoBERTa",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "deberta_v2": "DeBERTa-v2",
    "modernbert": "ModernBERT",
    "vit": "ViT",
    "clip": "CLIP",
    "whisper": "Whisper",
    "wav2vec2": "Wav2Vec2",
}


def _quiet(name: str) -> nn.Module:
    model = families.family(name)
    config = copy.deepcopy(model.config)
    without_randomness(config)
    quiet = type(model)(config)
    quiet.load_state_dict(model.state_dict())
    return quiet.eval()


def _resnet() -> nn.Module:
    config = hf.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, num_labels=3)
    return hf.ResNetForImageClassification(config)


def _efficientnet() -> nn.Module:
    # hidden_dim is a quarter of the widest block; the config does not compute it.
    config = hf.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, num_labels=3
    )
    without_randomness(config)
    return hf.EfficientNetForImageClassification(config)


def _convolutional(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        _measure_statistics(model)
    return model.eval()


def _measure_statistics(model: nn.Module) -> None:
    """Set the statistics of batch norms from a random batch; otherwise gradients underflow in so many random layers."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(pixel_values=torch.randn(8, 3, 64, 64))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


CASES = {
    **{key: Case(name, lambda key=key: _quiet(key)) for key, name in _NAMES.items()},
    "resnet": Case("ResNet", lambda: _convolutional(_resnet)),
    "efficientnet": Case("EfficientNet", lambda: _convolutional(_efficientnet)),
}
