"""Attention over chosen keys: its modules add a mask for the names ``eager`` and ``sdpa`` alone, so they keep these names."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig

from peftkit import PrefixConfig, explain, wrap
from peftkit.attention_dispatch import depends_on_name
from peftkit.compatibility.tiny import _class, shrink, tiny_model

KINDS = ("deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note_text")
TOKENS, CHOSEN = 24, 3


def sparse(kind):
    config = AutoConfig.for_model(kind)
    shrink(config)
    config.index_topk = CHOSEN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _class(config)(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_model_attends_to_the_chosen_keys(kind):
    ids = torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    model = sparse(kind)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.config.index_topk = TOKENS
        everything = _all_keys(model, ids)
        found = wrap(sparse(kind), LoraConfig(r=4)).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (everything - expected).abs().max() > 0.1


def _all_keys(model, ids):
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = TOKENS
    return model(input_ids=ids).logits


def test_the_report_says_why():
    model = wrap(sparse("deepseek_v32"), LoraConfig(r=4))
    reasons = [row.reason for row in explain(model).layers if row.name.endswith("self_attn")]
    assert reasons
    assert all("compares the name of the attention function" in reason for reason in reasons)


def test_a_prefix_is_refused():
    with pytest.raises(ValueError, match="DeepseekV32Attention computes something else for other"):
        wrap(sparse("deepseek_v32"), PrefixConfig(num_virtual_tokens=2))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "whisper"])
def test_modules_that_only_look_the_function_up_do_not_depend_on_its_name(kind):
    attentions = [m for m in tiny_model(kind).modules() if "Attention" in type(m).__name__]
    assert attentions
    assert not any(map(depends_on_name, attentions))
