"""Norms and gated MLPs of transformers' model families are fused exactly, or not fused with a reason."""

from collections import Counter

import pytest
import survey
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peftkit.fuse.plan import Reason

FUSED = {
    "llama": ("LlamaRMSNorm", "LlamaMLP"),
    "mistral": ("MistralRMSNorm", "MistralMLP"),
    "qwen2": ("Qwen2RMSNorm", "Qwen2MLP"),
    "qwen3": ("Qwen3RMSNorm", "Qwen3MLP"),
    "gemma": ("GemmaRMSNorm", "GemmaMLP"),
    "gemma2": ("Gemma2RMSNorm", "Gemma2MLP"),
    "gemma3_text": ("Gemma3RMSNorm", "Gemma3MLP"),
    "phi3": ("Phi3RMSNorm", "Phi3MLP"),
    "granite": ("GraniteRMSNorm", "GraniteMLP"),
    "cohere": ("CohereLayerNorm", "CohereMLP"),
    "olmo2": ("Olmo2RMSNorm", "Olmo2MLP"),
    "glm": ("GlmRMSNorm", "GlmMLP"),
    "seed_oss": ("SeedOssRMSNorm", "SeedOssMLP"),
    "t5gemma": ("T5GemmaRMSNorm", "T5GemmaMLP"),
    "t5": ("T5LayerNorm",),
    "bert": ("LayerNorm",),
    "vit": ("LayerNorm",),
    "whisper": ("LayerNorm",),
}
"""Classes that are fused, by family."""

LEFT_ALONE = {
    "deepseek_v4": {"DeepseekV4MLP": "clamp"},
    "glm5_next": {"Glm5NextTextMLP": "clamp", "Glm5NextTextRMSNormGated": "ACT2FN"},
    "kimi_linear": {"KimiLinearRMSNormGated": "ACT2FN"},
    "bailing_hybrid": {"BailingHybridRMSNormGated": "ACT2FN"},
}
"""By family, classes that are not fused, with a word of the reason."""


def examine(model_type):
    """For one family: fused class names, reasons by class name, and errors; ``None`` if the model cannot be built."""
    model = survey.build(model_type)
    if model is None:
        return None
    fused, reasons, wrong = [], [], []
    for name, module, names in survey.kinds(model):
        answer, cls = survey.verdict(module, names), type(module).__name__
        if isinstance(answer, Reason):
            reasons.append((cls, str(answer)))
        else:
            fused.append(cls)
        wrong += [f"{model_type}.{name} ({cls}): {w}" for w in survey.wrong(module, names, answer)]
    return fused, reasons, wrong


@pytest.mark.parametrize("family", FUSED)
def test_known_families_are_fused_and_agree_with_their_own_forward(family):
    fused, _, wrong = examine(family)
    assert not wrong
    assert set(FUSED[family]) <= set(fused)


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_families_with_other_formulas_are_not_fused(family):
    _, reasons, wrong = examine(family)
    assert not wrong
    for cls, word in LEFT_ALONE[family].items():
        assert word in dict(reasons)[cls]


@pytest.mark.slow
def test_no_family_of_transformers_is_fused_wrongly():
    """``pytest -m slow -s tests/fuse/test_recognise_survey.py`` prints the counts. It takes about a quarter of an hour."""
    counts, reasons, wrong, families = Counter(), Counter(), [], 0
    for model_type in CONFIG_MAPPING:
        found = examine(model_type)
        if found is None:
            continue
        families += 1
        counts.update("norm" if "norm" in cls.lower() else "gated MLP" for cls in found[0])
        reasons.update(reason for _, reason in found[1])
        wrong += found[2]
    print(f"\n{families} architectures; fused: {dict(counts)}; wrong: {len(wrong)}; not fused:")
    for reason, count in reasons.most_common():
        print(f"{count:5}  {reason}")
    assert not wrong
    assert families > 500
    assert counts["norm"] > 600
    assert counts["gated MLP"] > 150
