"""The points at which sub-layers begin and end, compared with a table written by hand from the families' modeling files."""

import families
import models
import peft
import pytest
import torch
from torch import nn

from peftkit import wrap
from peftkit.find.points import find_points

# family: attention outputs of the last layer, MLP output, MLP input, end of a post-norm layer
_LLAMA = (("self_attn.o_proj",), "mlp", "mlp", None)
_BERT = (("attention.output.dense",), "output.dense", "intermediate.dense", "output.LayerNorm")
_BART = (("self_attn.out_proj", "encoder_attn.out_proj"), "fc2", "fc1")
EXPECTED = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"), _LLAMA),
    **dict.fromkeys(("phi3", "granite", "cohere", "mixtral", "qwen3_moe", "gpt_oss"), _LLAMA),
    **dict.fromkeys(("bert", "roberta", "electra", "deberta_v2"), _BERT),
    "phi": (("self_attn.dense",), "mlp", "mlp", None),
    "gpt2": (("attn.c_proj",), "mlp.c_proj", "mlp", None),
    "gptj": (("attn.out_proj",), "mlp.fc_out", "mlp", None),
    "gpt_neox": (("attention.dense",), "mlp", "mlp", None),
    "bloom": (("self_attention.dense",), "mlp.dense_4h_to_h", "mlp", None),
    "falcon": (("self_attention.dense",), "mlp", "mlp", None),
    "opt": (("self_attn.out_proj",), "fc2", "fc1", None),
    "bart": (*_BART, "final_layer_norm"),
    "whisper": (*_BART, None),
    "t5": (
        ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
        "layer.2.DenseReluDense.wo",
        "layer.2.DenseReluDense",
        None,
    ),
    "distilbert": (("attention.out_lin",), "ffn.lin2", "ffn", "output_layer_norm"),
    "modernbert": (("attn.Wo",), "mlp.Wo", "mlp", None),
    "vit": (("attention.o_proj",), "mlp", "mlp", None),
    "clip": (("self_attn.out_proj",), "mlp", "mlp", None),
    "wav2vec2": (
        ("attention.out_proj",),
        "feed_forward.output_dense",
        "feed_forward",
        "final_layer_norm",
    ),
}


@pytest.mark.parametrize("name", families.NAMES)
def test_points_of_every_family(name):
    model = families.family(name)
    before = {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
    points = find_points(model)
    assert {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()} == before
    layers = list(dict.fromkeys(point.layer for point in points))
    assert len(layers) == (4 if name in ("t5", "bart", "whisper", "clip") else 2)
    last = [point for point in points if point.layer == layers[-1]]
    assert {(point.index, point.width) for point in last} == {(1, 32)}
    short = {point: point.output.removeprefix(f"{layers[-1]}.") for point in last}
    attentions, mlp, source, norm = EXPECTED[name]
    assert tuple(short[p] for p in last if p.kind == "attention") == attentions
    (found,) = [p for p in last if p.kind == "mlp"]
    assert (short[found], found.source.removeprefix(f"{layers[-1]}.")) == (mlp, source)
    (end,) = [p for p in last if p.kind == "end"]
    assert (end.normed, short[end]) == (norm is not None, norm or layers[-1])


def test_existing_adapters_change_no_point():
    expected = find_points(models.tiny("llama"))
    assert find_points(wrap(models.tiny("llama"))) == expected
    stock = peft.get_peft_model(models.tiny("llama"), peft.LoraConfig(target_modules="all-linear"))
    assert find_points(stock) == expected


def test_an_example_replaces_inputs_that_cannot_be_generated():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"Sequential is not a transformers model.*pass them as example"
    ):
        find_points(model)
    with pytest.raises(ValueError, match="no layer of Sequential calls an attention"):
        find_points(model, example={"input": torch.zeros(1, 4)})


def test_an_mlp_that_does_not_write_to_the_residual_stream_is_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 4)

        def forward(self, x):
            return self.out(x)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.odd = Attention(), nn.Linear(4, 6)

        def forward(self, x):
            y = self.attention(x)
            return y + self.odd(y)[..., :4]

    model = nn.Sequential(Layer())
    with pytest.raises(
        ValueError,
        match=r"the MLP of 0 does not end with a linear of 4 features \(its last one is 0.odd",
    ):
        find_points(model, example={"input": torch.zeros(1, 4)})


def test_a_4_bit_base_keeps_every_bit(tmp_path):
    """In evaluation, bitsandbytes repacks weights in place on processors with bfloat16 instructions."""
    import transformers as hf

    models.tiny("llama").save_pretrained(tmp_path)
    settings = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    layer = model.model.layers[0].self_attn.q_proj
    packed, scales = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(find_points(model)) == 6
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.weight.quant_state.absmax, scales)
    assert {name: module.training for name, module in model.named_modules()} == modes
