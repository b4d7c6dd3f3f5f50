"""AdapterHub checkpoints, built from their documented layout, against forwards written out layer by layer in float64."""

import json
from collections.abc import Callable

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkit import ContractError, import_adapter, load_adapter, restore
from peftkit.compatibility.rounding import same_up_to_rounding

HIDDEN, SIZE, LAYERS = 32, 4, 2
HOULSBY = {"mh_adapter": True, "output_adapter": True, "original_ln_before": False}
HOULSBY |= {"non_linearity": "swish", "reduction_factor": 8}
PFEIFFER = {"mh_adapter": False, "output_adapter": True, "original_ln_before": True}
PFEIFFER |= {"non_linearity": "relu", "reduction_factor": 8}
PARALLEL = {"mh_adapter": False, "output_adapter": True, "is_parallel": True, "scaling": 4.0}
PARALLEL |= {"non_linearity": "gelu", "reduction_factor": 8}
KINDS = {"houlsby": HOULSBY, "pfeiffer": PFEIFFER, "parallel": PARALLEL}
COMMON = {"original_ln_after": True, "residual_before_ln": True, "ln_after": False, "scaling": 1.0}
COMMON |= {"ln_before": False, "phm_layer": False, "inv_adapter": None, "leave_out": []}
COMMON |= {"use_gating": False, "cross_adapter": False, "dropout": 0.0, "phm_dim": 4}
PLACES = {
    "bert": ("bert.encoder.layer", "attention.output", "output"),
    "roberta": ("roberta.encoder.layer", "attention.output", "output"),
    "electra": ("electra.encoder.layer", "attention.output", "output"),
    "gpt2": ("transformer.h", "attention_adapters", "output_adapters"),
    "distilbert": ("distilbert.transformer.layer", "attention_adapters", "output_adapters"),
}
ACTIVATIONS = {
    "swish": lambda x: x * torch.sigmoid(x),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}
IDS = torch.arange(3, 12)[None]


def tensors_of(family: str, config: dict, name: str = "sst") -> dict[str, Tensor]:
    """Random weights under the library's names."""
    generator = torch.Generator().manual_seed(5)
    layers, attention, output = PLACES[family]
    places = [attention] * config["mh_adapter"] + [output] * config["output_adapter"]
    found = {}

    def draw(key: str, *shape: int) -> None:
        found[key] = 0.3 * torch.randn(*shape, generator=generator)

    for index in range(LAYERS):
        if index in config.get("leave_out", []):
            continue
        for place in places:
            stem = f"{layers}.{index}.{place}.adapters.{name}"
            down = 1 if config.get("ln_before") else 0
            draw(f"{stem}.adapter_down.{down}.weight", SIZE, HIDDEN)
            draw(f"{stem}.adapter_down.{down}.bias", SIZE)
            draw(f"{stem}.adapter_up.weight", HIDDEN, SIZE)
            draw(f"{stem}.adapter_up.bias", HIDDEN)
            if config.get("scaling") == "learned":
                draw(f"{stem}.scaling", 1)
            if down:
                for leaf in ("weight", "bias"):
                    draw(f"{stem}.adapter_norm_before.{leaf}", HIDDEN)
                    found[f"{stem}.adapter_down.0.{leaf}"] = found[
                        f"{stem}.adapter_norm_before.{leaf}"
                    ].clone()
    return found


def write(folder, family: str, config: dict, tensors=None, *, binary=False, **top) -> dict:
    config = COMMON | config
    tensors = tensors_of(family, config) if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    whole = {"config": config, "hidden_size": HIDDEN, "model_type": family, "name": "sst"}
    whole |= {"model_name": "base", "version": "adapters.1.2.0", **top}
    whole = {key: value for key, value in whole.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    if binary:
        torch.save(tensors, folder / "pytorch_adapter.bin")
    else:
        save_file(tensors, folder / "adapter.safetensors")
    return tensors


def adapters(family: str, config: dict, tensors: dict[str, Tensor]) -> Callable:
    """``A(layer, place, x)`` as the paper writes it."""
    layers, attention, output = PLACES[family]
    act = ACTIVATIONS[config["non_linearity"]]

    def part(index: int, place: str, x: Tensor) -> Tensor:
        place = attention if place == "attention" else output
        stem = f"{layers}.{index}.{place}.adapters.sst."
        w = {k.removeprefix(stem): t.double() for k, t in tensors.items() if k.startswith(stem)}
        down = "adapter_down.1" if config.get("ln_before") else "adapter_down.0"
        if config.get("ln_before"):
            x = (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = x * w["adapter_norm_before.weight"] + w["adapter_norm_before.bias"]
        scaling = w["scaling"] if config["scaling"] == "learned" else config["scaling"]
        hidden = act(x @ w[f"{down}.weight"].T + w[f"{down}.bias"])
        return scaling * (hidden @ w["adapter_up.weight"].T + w["adapter_up.bias"])

    return part


def after_sublayer(kind: str, h: Tensor, r: Tensor, norm: Callable, part: Callable) -> Tensor:
    """What the library makes of a sub-layer's output and the residual stream that entered it."""
    if kind == "houlsby":
        return norm(h + part(h) + r)
    if kind == "pfeiffer":
        return norm(h + r + part(norm(h + r)))
    return norm(h + part(r) + r)


def post_norm(model: nn.Module, family: str, config: dict, kind: str, part: Callable) -> Tensor:
    """BERT's encoder from its own sub-modules, one after the other."""
    backbone = model.get_submodule(family)
    x = backbone.embeddings(input_ids=IDS)
    for index, layer in enumerate(backbone.encoder.layer):
        own, out = layer.attention.output, layer.output
        h = own.dense(layer.attention.self(x)[0])
        at = (lambda v, i=index: part(i, "attention", v)) if config["mh_adapter"] else None
        x = own.LayerNorm(h + x) if at is None else after_sublayer(kind, h, x, own.LayerNorm, at)
        h = out.dense(layer.intermediate(x))
        x = after_sublayer(kind, h, x, out.LayerNorm, lambda v, i=index: part(i, "output", v))
    return x


def distilbert(model: nn.Module, family: str, config: dict, kind: str, part: Callable) -> Tensor:
    x = model.distilbert.embeddings(IDS)
    for index, layer in enumerate(model.distilbert.transformer.layer):
        h = layer.attention(x)[0]
        at = (lambda v, i=index: part(i, "attention", v)) if config["mh_adapter"] else None
        norm = layer.sa_layer_norm
        x = norm(h + x) if at is None else after_sublayer(kind, h, x, norm, at)
        h = layer.ffn(x)
        norm = layer.output_layer_norm
        x = after_sublayer(kind, h, x, norm, lambda v, i=index: part(i, "output", v))
    return x


def gpt2(model: nn.Module, family: str, config: dict, kind: str, part: Callable) -> Tensor:
    backbone = model.transformer
    x = backbone.wte(IDS) + backbone.wpe(torch.arange(IDS.shape[1]))
    for index, block in enumerate(backbone.h):
        h = block.attn(block.ln_1(x))[0]
        if config["mh_adapter"]:
            h = h + part(index, "attention", h)
        x = x + h
        h = block.mlp(block.ln_2(x))
        x = after_sublayer(kind, h, x, lambda v: v, lambda v, i=index: part(i, "output", v))
    return backbone.ln_f(x)


FORWARDS = {"gpt2": gpt2, "distilbert": distilbert}


def last_hidden(model: nn.Module, family: str) -> Tensor:
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = backbone.get_submodule("transformer" if family == "gpt2" else family)
    with torch.no_grad():
        return backbone(input_ids=IDS).last_hidden_state


def base(family: str) -> nn.Module:
    return families.family(family).double()


@pytest.fixture(autouse=True)
def _quick(one_thread):
    """Tiny models gain nothing from more threads."""


def expected(family: str, config: dict, kind: str, tensors: dict[str, Tensor]) -> Tensor:
    config = COMMON | config
    forward = FORWARDS.get(family, post_norm)
    with torch.no_grad():
        return forward(base(family), family, config, kind, adapters(family, config, tensors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PLACES)
def test_outputs_are_those_of_the_formula(family, kind, tmp_path):
    tensors = write(tmp_path, family, KINDS[kind], binary=family == "roberta")
    imported = import_adapter(base(family), tmp_path, "hub")
    truth = expected(family, KINDS[kind], kind, tensors)
    assert same_up_to_rounding(last_hidden(restore(imported), family), truth)
    assert not same_up_to_rounding(last_hidden(base(family), family), truth)
    assert not any(p.requires_grad for p in imported.parameters())
    assert not imported.training
    imported.save_pretrained(tmp_path / "ours")
    again = load_adapter(base(family), tmp_path / "ours" / "hub", accelerate=False)
    assert torch.equal(last_hidden(again, family), last_hidden(imported, family))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("houlsby", {"scaling": "learned"}),
        ("houlsby", {"ln_before": True}),
        ("houlsby", {"leave_out": [0]}),
        ("houlsby", {"mh_adapter": True, "output_adapter": True, "non_linearity": "gelu"}),
    ],
)
def test_options_with_an_equivalent_are_read(kind, changes, tmp_path):
    config = KINDS[kind] | changes
    tensors = write(tmp_path, "bert", config)
    imported = import_adapter(base("bert"), tmp_path)
    full = COMMON | config
    part = adapters("bert", full, tensors)

    def where_there_is_one(index: int, place: str, x: Tensor) -> Tensor:
        return part(index, place, x) if index not in full["leave_out"] else torch.zeros_like(x)

    with torch.no_grad():
        truth = post_norm(base("bert"), "bert", full, kind, where_there_is_one)
    assert same_up_to_rounding(last_hidden(restore(imported), "bert"), truth)


def test_a_checkpoint_of_the_bare_backbone_and_old_names_are_read(tmp_path):
    """adapter-transformers 1 had other names for the containers, and meant another function by ``gelu``."""
    tensors = tensors_of("bert", COMMON | PFEIFFER)
    old = {
        k.removeprefix("bert.").replace(".adapters.", ".layer_text_task_adapters."): t
        for k, t in tensors.items()
    }
    write(tmp_path, "bert", PFEIFFER, old, version=None)
    imported = import_adapter(base("bert"), tmp_path)
    truth = expected("bert", PFEIFFER, "pfeiffer", tensors)
    assert same_up_to_rounding(last_hidden(restore(imported), "bert"), truth)
    write(tmp_path, "bert", PFEIFFER | {"non_linearity": "gelu"}, old, version=None)
    with pytest.raises(ContractError, match="non_linearity='gelu_new': only relu"):
        import_adapter(base("bert"), tmp_path)


def test_going_on_with_training_trains_the_adapter_and_the_head(tmp_path):
    write(tmp_path, "bert", HOULSBY)
    imported = import_adapter(families.family("bert"), tmp_path, is_trainable=True)
    trained = {n for n, p in imported.named_parameters() if p.requires_grad}
    places = (".adapters.default.", ".modules_to_save.default.")
    assert trained == {n for n, _ in imported.named_parameters() if any(p in n for p in places)}
    assert len(trained) == LAYERS * 2 * 4 + 2


def test_a_head_beside_it_is_not_read_and_that_is_said(tmp_path):
    write(tmp_path, "bert", HOULSBY)
    torch.save({}, tmp_path / "pytorch_model_head.bin")
    with pytest.warns(UserWarning, match=r"pytorch_model_head.bin .* is not loaded"):
        import_adapter(base("bert"), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HOULSBY | {"phm_layer": True}, "phm_layer=True: its projections are sums of Kronecker"),
        (HOULSBY | {"use_gating": True}, "use_gating=True: its gate averages"),
        (PFEIFFER | {"inv_adapter": "nice"}, "inv_adapter='nice': it has an invertible adapter"),
        (
            PFEIFFER | {"invertible_adapter": {"block_type": "nice", "reduction_factor": 2}},
            "inv_adapter='nested': it has an invertible adapter",
        ),
        (HOULSBY | {"ln_after": True}, "ln_after=True: it has an additional norm"),
        (HOULSBY | {"original_ln_after": False}, "original_ln_after=False: it omits"),
        (HOULSBY | {"cross_adapter": True}, "cross_adapter=True: it has adapters after cross"),
        (HOULSBY | {"scaling": "channel"}, "scaling='channel': only a number"),
        (HOULSBY | {"non_linearity": "leakyrelu"}, "non_linearity='leakyrelu': only relu, gelu"),
        (HOULSBY | {"temperature": 2}, "its config has the unknown field 'temperature'"),
        (PFEIFFER | {"mh_adapter": True}, "mh_adapter=True: adapters after the residual sum"),
        (PARALLEL | {"mh_adapter": True}, "mh_adapter=True: parallel adapters"),
        (PFEIFFER | {"residual_before_ln": False}, "residual_before_ln=False: only True"),
        (HOULSBY | {"architecture": "lora"}, "it is a lora adapter"),
        (HOULSBY | {"mh_adapter": False, "output_adapter": False}, "are both False"),
    ],
)
def test_what_has_no_equivalent_is_refused_with_the_reason(config, message, tmp_path):
    write(tmp_path, "bert", config, tensors_of("bert", HOULSBY))
    model = base("bert")
    modules = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ContractError, match=message):
        import_adapter(model, tmp_path)
    assert {n: type(m) for n, m in model.named_modules()} == modules


def test_models_it_was_not_compared_on_are_refused(tmp_path):
    write(tmp_path, "bert", HOULSBY)
    with pytest.raises(
        ContractError, match="trained on 'base', a bert model, but this model is a rob"
    ):
        import_adapter(base("roberta"), tmp_path)
    write(tmp_path, "bert", HOULSBY, model_type="opt")
    with pytest.raises(ContractError, match="opt models are not supported"):
        import_adapter(base("opt"), tmp_path)


def without(tensors: dict, end: str) -> dict:
    return {k: t for k, t in tensors.items() if not k.endswith(end)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "layer.1.output.adapters.sst.adapter_up.bias"), "missing or left"),
        (
            lambda t: {k: v for k, v in t.items() if "layer.1.attention" not in k},
            r"layer\.1, attention: missing",
        ),
        (lambda t: t | {"bert.invertible_adapters.sst.F.0.weight": torch.ones(1)}, "1 key outside"),
        (
            lambda t: {k.replace("layer.1", "layer.7"): v for k, v in t.items()},
            r"has adapters for the layer 'bert.encoder.layer.7'",
        ),
        (
            lambda t: {k: v[:2] if k.endswith("adapter_down.0.bias") else v for k, v in t.items()},
            r"down.bias has the shape \[2\] in the checkpoint and \[4\] in the model",
        ),
        (
            lambda t: {
                k: v[:, :2].contiguous() if "layer.1" in k and "up.weight" in k else v
                for k, v in t.items()
            },
            r"have different sizes \(2, 4\)",
        ),
        (lambda t: t | {next(iter(t)): torch.full((4, 32), float("nan"))}, "NaN or infinite"),
        (lambda t: {"x": torch.ones(1)}, "1 key outside the known adapters"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, message, tmp_path):
    write(tmp_path, "bert", HOULSBY, change(tensors_of("bert", COMMON | HOULSBY)))
    model = base("bert")
    before = {n: (type(m), len(m._forward_hooks)) for n, m in model.named_modules()}
    with pytest.raises(ContractError, match=message):
        import_adapter(model, tmp_path)
    assert {n: (type(m), len(m._forward_hooks)) for n, m in model.named_modules()} == before


def test_files_that_are_missing_or_of_another_kind_are_named(tmp_path):
    model = base("bert")
    with pytest.raises(ContractError, match="is not a folder; download"):
        import_adapter(model, tmp_path / "nowhere")
    with pytest.raises(ContractError, match=r"adapter_config.json does not exist.*holds nothing"):
        import_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ContractError, match="is not JSON"):
        import_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ContractError, match=r"holds none of adapter_model.safetensors"):
        import_adapter(model, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ContractError, match="is a LORA adapter, which needs no import"):
        import_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"scaling": 1}')
    with pytest.raises(
        ContractError, match="the library that saved it is unknown; its fields are: scaling"
    ):
        import_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ContractError, match="cannot be read"):
        import_adapter(model, tmp_path)
    write(tmp_path / "good", "bert", HOULSBY)
    imported = import_adapter(model, tmp_path / "good")
    with pytest.raises(ContractError, match="already has adapters"):
        import_adapter(imported, tmp_path / "good")
    assert load_file(tmp_path / "good" / "adapter.safetensors")
