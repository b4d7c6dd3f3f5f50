"""AdapterHub checkpoints on architectures built otherwise than BERT: the formulas as hooks at places that are written down by hand."""

from typing import NamedTuple

import families
import models
import pytest
import torch
import torch.nn.functional as F
from interop.test_adapterhub import ACTIVATIONS, COMMON, HIDDEN, KINDS, SIZE, write
from torch import Tensor, nn

from peftkit import ContractError, import_adapter, restore
from peftkit.compatibility.rounding import same_up_to_rounding


class Layer(NamedTuple):
    """Where the adapters of one layer act, and under which names AdapterHub writes them.

    Attributes:
        name: The layer's name in the model.
        written: The layer's name in a checkpoint.
        keys: What a checkpoint calls the adapter after the attention, and the one at the MLP.
        attention: Module that gives the attention's output.
        mlp: Module that gives the MLP's output.
        stream: Module whose argument is the residual stream entering the MLP.
        norm: The norm that closes a post-norm layer.
    """

    name: str
    written: str
    keys: tuple[str, str]
    attention: str
    mlp: str
    stream: str
    norm: str = ""


BESIDE = ("attention_adapters", "output_adapters")
IN_VIT = ("attention_adapters", "output.output_adapters")


def layers(stack, *rest, written=None):
    """Both layers of a list of them."""
    return [Layer(f"{stack}.{i}", f"{written or stack}.{i}", *rest) for i in range(2)]


DECODER = ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm")
POST_NORM = ("self_attn.out_proj", "fc2", "fc1", "final_layer_norm")
PRE_NORM = ("self_attn.out_proj", "fc2", "final_layer_norm")
VIT = ("attention.o_proj", "mlp.fc2", "layernorm_after")
PLACES = {
    "llama": layers("model.layers", BESIDE, *DECODER),
    "mistral": layers("model.layers", BESIDE, *DECODER),
    "bart": layers("model.encoder.layers", BESIDE, *POST_NORM)
    + layers("model.decoder.layers", BESIDE, *POST_NORM),
    "whisper": layers("model.encoder.layers", BESIDE, *PRE_NORM)
    + layers("model.decoder.layers", BESIDE, *PRE_NORM),
    "t5": [
        layer
        for stack, mlp in (("encoder", "layer.1"), ("decoder", "layer.2"))
        for layer in layers(
            f"{stack}.block",
            ("layer.0", mlp),
            *("layer.0.SelfAttention.o", f"{mlp}.DenseReluDense.wo", f"{mlp}.layer_norm"),
        )
    ],
    # transformers has renamed the list since
    "vit": layers("vit.layers", IN_VIT, *VIT, written="vit.encoder.layer"),
}


def base(family: str) -> nn.Module:
    """The same model each time, in float64."""
    return families.family(family).eval().double()


def batch(family: str) -> dict[str, Tensor]:
    """One input."""
    if family == "vit":
        return {"pixel_values": models.batch("vit")["pixel_values"].double()}
    if family == "whisper":
        frames = torch.linspace(-1, 1, 8 * 32, dtype=torch.float64).view(1, 8, 32)
        return {"input_features": frames, "decoder_input_ids": torch.arange(3, 12)[None]}
    ids = {"input_ids": torch.arange(3, 12)[None]}
    return ids | (
        {"decoder_input_ids": ids["input_ids"].flip(1)} if family in ("bart", "t5") else {}
    )


def tensors_of(family: str, config: dict) -> dict[str, Tensor]:
    """Random weights under the library's names."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"adapter_down.0.weight": (SIZE, HIDDEN), "adapter_down.0.bias": (SIZE,)}
    shapes |= {"adapter_up.weight": (HIDDEN, SIZE), "adapter_up.bias": (HIDDEN,)}
    found = {}
    for number, layer in enumerate(PLACES[family]):
        if number in config.get("leave_out", ()):
            continue
        for key, field in zip(layer.keys, ("mh_adapter", "output_adapter"), strict=True):
            stem = f"{layer.written}.{key}.adapters.sst"
            for name, shape in shapes.items() if config[field] else ():
                found[f"{stem}.{name}"] = 0.3 * torch.randn(shape, generator=generator)
    return found


def put_by_hand(model: nn.Module, family: str, kind: str, tensors: dict[str, Tensor]) -> None:
    """The library's formulas by hooks on the plain model."""
    config = COMMON | KINDS[kind]

    def adapter(layer: Layer, key: str):
        stem = f"{layer.written}.{key}.adapters.sst."
        w = {k.removeprefix(stem): t.double() for k, t in tensors.items() if k.startswith(stem)}

        def apply(x: Tensor) -> Tensor:
            hidden = x @ w["adapter_down.0.weight"].T + w["adapter_down.0.bias"]
            hidden = ACTIVATIONS[config["non_linearity"]](hidden)
            up = hidden @ w["adapter_up.weight"].T + w["adapter_up.bias"]
            return config["scaling"] * up

        return apply if w else None

    def add(name: str, part) -> None:
        model.get_submodule(name).register_forward_hook(lambda m, args, h: h + part(h))

    for layer in PLACES[family]:
        attention, output = (adapter(layer, key) for key in layer.keys)
        if output is None:
            continue
        if kind == "houlsby":
            add(f"{layer.name}.{layer.attention}", attention)
            add(f"{layer.name}.{layer.mlp}", output)
        elif kind == "parallel":
            stream = []
            model.get_submodule(f"{layer.name}.{layer.stream}").register_forward_pre_hook(
                lambda m, args, kept=stream: kept.append(args[0])
            )
            model.get_submodule(f"{layer.name}.{layer.mlp}").register_forward_hook(
                lambda m, args, h, kept=stream, part=output: h + part(kept.pop())
            )
        elif layer.norm:

            def closed(norm, args, y, part=output):
                (s,) = args
                return F.layer_norm(s + part(y), y.shape[-1:], norm.weight, norm.bias, norm.eps)

            model.get_submodule(f"{layer.name}.{layer.norm}").register_forward_hook(closed)
        else:

            def ended(module, args, out, part=output):
                return (
                    out + part(out)
                    if isinstance(out, Tensor)
                    else (out[0] + part(out[0]), *out[1:])
                )

            model.get_submodule(layer.name).register_forward_hook(ended)


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        return model(**batch(family)).logits


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PLACES)
def test_outputs_are_those_of_the_formula(family, kind, tmp_path):
    tensors = tensors_of(family, KINDS[kind])
    write(tmp_path, family, KINDS[kind], tensors, version="adapters.1.3.0")
    expected = base(family)
    put_by_hand(expected, family, kind, tensors)
    truth = logits(expected, family)
    imported = import_adapter(base(family), tmp_path)
    assert same_up_to_rounding(logits(restore(imported), family), truth)
    assert not same_up_to_rounding(logits(base(family), family), truth)


def test_layers_left_out_are_counted_on_from_the_encoder_to_the_decoder(tmp_path):
    config = KINDS["houlsby"] | {"leave_out": [0, 3]}
    tensors = tensors_of("bart", config)
    write(tmp_path, "bart", config, tensors)
    expected = base("bart")
    put_by_hand(expected, "bart", "houlsby", tensors)
    imported = import_adapter(base("bart"), tmp_path)
    assert same_up_to_rounding(logits(restore(imported), "bart"), logits(expected, "bart"))


@pytest.mark.parametrize("version", ["adapters.1.2.0", None])
def test_decoders_of_releases_that_computed_them_otherwise_are_refused(version, tmp_path):
    config = KINDS["pfeiffer"]
    write(tmp_path, "llama", config, tensors_of("llama", config), version=version)
    with pytest.raises(ContractError, match=r"before release 1\.3\.0"):
        import_adapter(base("llama"), tmp_path)
