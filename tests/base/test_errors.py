"""What ``load_base`` refuses, and whether the message names the file, the tensor or the argument."""

import base_cases
import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from peftkit import ContractError, load_base, wrap

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def saved(tmp_path):
    return base_cases.save_llama(tmp_path)


def refused(*parts, path, base="nf4", **options):
    with pytest.raises(ContractError) as error:
        load_base(path, base, **options)
    for part in parts:
        assert str(part) in str(error.value)


@pytest.mark.parametrize("base", ["nf4", "auto"])
@pytest.mark.parametrize("cut", [1, 2**10, 0.5])
def test_a_truncated_file(saved, base, cut):
    file = base_cases.shard_of(saved, TENSOR)
    content = file.read_bytes()
    file.write_bytes(content[:-cut] if cut >= 1 else content[:20])

    refused(file, "truncated", path=saved, base=base)


def test_an_empty_file(saved):
    file = base_cases.shard_of(saved, TENSOR)
    file.write_bytes(b"")

    refused(file, "0 bytes", path=saved)


def test_a_file_of_another_format(saved):
    file = base_cases.shard_of(saved, TENSOR)
    file.write_bytes((4).to_bytes(8, "little") + b"abcd")
    refused(file, "not a safetensors file", path=saved)

    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(file, "git lfs pull", path=saved)


def test_a_file_that_becomes_shorter_while_it_is_read(saved, monkeypatch):
    from peftkit.base import checkpoint

    file = base_cases.shard_of(saved, TENSOR)
    opened = checkpoint.open_checkpoint

    def opened_then_cut(*args):
        tensors = opened(*args)
        file.write_bytes(file.read_bytes()[:-4000])
        return tensors

    monkeypatch.setattr(checkpoint, "open_checkpoint", opened_then_cut)
    refused(file, "became shorter", path=saved)


def test_a_missing_file(saved):
    file = base_cases.shard_of(saved, TENSOR)
    file.unlink()

    refused(file.name, "missing", path=saved)


def test_a_missing_index(saved):
    (saved / "model.safetensors.index.json").unlink()

    refused("copy the index too", path=saved)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(saved, text):
    (saved / "model.safetensors.index.json").write_text(text)

    refused("model.safetensors.index.json is no index", path=saved)


def test_an_index_that_leaves_the_folder(saved):
    index = saved / "model.safetensors.index.json"
    base_cases.edit_json(index, lambda d: d["weight_map"].update(x="../other.safetensors"))

    refused("../other.safetensors", path=saved)


def test_an_index_with_tensors_that_no_file_has(saved):
    base_cases.edit_shard(saved, TENSOR, lambda _: None)

    refused(TENSOR, "files do not have", path=saved)


def test_a_tensor_in_two_files(saved):
    index = saved / "model.safetensors.index.json"
    file = base_cases.shard_of(saved, TENSOR)
    (saved / "copy.safetensors").write_bytes(file.read_bytes())
    base_cases.edit_json(index, lambda d: d["weight_map"].update(x="copy.safetensors"))

    refused(file, "copy.safetensors", path=saved)


@pytest.mark.parametrize("name", [TENSOR, "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("base", ["nf4", "int8", "auto"])
def test_values_that_are_not_finite(saved, name, value, base):
    def spoil(tensor):
        tensor.view(-1)[17] = value
        return tensor

    file = base_cases.edit_shard(saved, name, spoil)

    refused(file, repr(name), "1 value that is NaN or infinite", path=saved, base=base)
    if name == TENSOR and base != "auto":
        refused(name, "cannot be quantised", path=saved, base=base, strict=False)
    else:
        assert not load_base(saved, base, strict=False).get_parameter(name).isfinite().all()


def test_block_maxima_that_are_nan(tmp_path):
    source = base_cases.save_llama(tmp_path / "source")
    load_base(source, "nf4").save_pretrained(tmp_path / "nf4", max_shard_size="60KB")
    name = f"{TENSOR}.nested_absmax"
    base_cases.edit_shard(tmp_path / "nf4", name, lambda tensor: tensor * float("nan"))

    refused(repr(name), "NaN", path=tmp_path / "nf4", base="auto")


def test_int8_of_values_beyond_float16(tmp_path):
    base_cases.save_llama(tmp_path)
    base_cases.edit_shard(tmp_path, TENSOR, lambda tensor: tensor * 1e7)

    refused(TENSOR, "torch.float16", path=tmp_path, base="int8")
    model = load_base(tmp_path, "int8", keep=[TENSOR.removesuffix(".weight")])
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("base", ["nf4", "auto"])
@pytest.mark.parametrize("name", [TENSOR, "model.norm.weight"])
def test_a_tensor_of_another_shape(saved, base, name):
    base_cases.edit_shard(saved, name, lambda tensor: tensor[:-1].contiguous())

    refused(name, "shape", path=saved, base=base)


@pytest.mark.parametrize("base", ["nf4", "auto"])
@pytest.mark.parametrize("name", [TENSOR, "model.norm.weight"])
def test_a_weight_that_the_checkpoint_does_not_have(saved, base, name):
    base_cases.edit_shard(saved, name, lambda _: None)
    index = saved / "model.safetensors.index.json"
    base_cases.edit_json(index, lambda d: d["weight_map"].pop(name))

    refused(name, "no tensors for these weights", path=saved, base=base)
    if name == TENSOR and base == "nf4":
        refused(name, path=saved, base=base, strict=False)
    else:
        assert load_base(saved, base, strict=False).get_parameter(name).isfinite().all()


def test_a_tensor_that_the_model_does_not_have(saved):
    base_cases.edit_json(saved / "config.json", lambda d: d.update(num_hidden_layers=1))

    refused(TENSOR, base_cases.shard_of(saved, TENSOR).name, "strict=False", path=saved)
    assert len(load_base(saved, "nf4", strict=False).model.layers) == 1


def test_pickled_weights(tmp_path):
    base_cases.llama_config().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    base_cases.edit_json(tmp_path / "config.json", lambda d: d.update(architectures=["LlamaModel"]))

    refused("pickle", "save_pretrained", path=tmp_path)


def test_folders_without_a_checkpoint(tmp_path):
    refused("no config.json", path=tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("load_adapter", path=tmp_path)
    refused("is a file", path=tmp_path / "adapter_config.json")
    refused("no/where", path="no/where")
    base_cases.llama_config(architectures=["LlamaModel"]).save_pretrained(tmp_path)
    refused("neither model.safetensors", "adapter_config.json", path=tmp_path)


def test_an_unknown_architecture(saved):
    base_cases.edit_json(saved / "config.json", lambda d: d.update(architectures=["Nothing"]))

    refused("Nothing", "auto_class", path=saved)
    refused("auto_class='Nobody'", path=saved, auto_class="Nobody")
    refused("has no class for LlamaConfig", path=saved, auto_class="AutoModelForSeq2SeqLM")
    refused("auto_class=3", path=saved, auto_class=3)
    assert load_base(saved, auto_class="AutoModelForCausalLM").config.vocab_size


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"base": "int4"}, "'nf4'"),
        ({"base": "fp8", "keep": ["dwn_proj"]}, "dwn_proj"),
        ({"base": "bf16", "dtype": "float32"}, "contradict"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"keep": "lm_head"}, "keep=['lm_head']"),
        ({"keep": [3]}, "keep has 3"),
        ({"keep": ["dwn_proj"]}, "did you mean 'down_proj'"),
        ({"keep": ["norm"]}, "no layer would be quantised"),
        ({"keep": ["*"]}, "no linear layer to quantise"),
        ({"base": "bf16", "keep": ["down_proj"]}, "keep has no effect"),
        ({"quantization_config": {}}, "base= and keep="),
        ({"torch_dtype": "auto"}, "dtype="),
        ({"device_map": "auto"}, "one device"),
        ({"device": "cpu", "device_map": "cpu"}, "both given"),
    ],
)
def test_arguments(saved, options, part):
    refused(part, path=saved, **options)


def test_a_type_that_is_no_model():
    refused("model_or_path=3", path=3)


@pytest.mark.parametrize(("stored", "asked"), [("int8", "nf4"), ("nf4", "int8"), ("nf4", "bf16")])
def test_another_storage_than_that_of_the_checkpoint(tmp_path, stored, asked):
    load_base(base_cases.save_llama(tmp_path / "a"), stored).save_pretrained(tmp_path / "b")

    refused(f"already quantised ({stored})", "base='auto'", path=tmp_path / "b", base=asked)
    refused("remove it", path=tmp_path / "b", base="auto", keep=["down_proj"])
    if stored == "int8":
        refused("no 4-bit layers", path=tmp_path / "b", base="auto", compute_dtype="float32")


def test_methods_of_other_packages_are_loaded_by_transformers(saved):
    method = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    base_cases.edit_json(saved / "config.json", lambda d: d.update(quantization_config=method))

    refused("already quantised (gptq)", path=saved)
    with pytest.raises(ImportError, match="GPTQ"):
        load_base(saved)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_models_that_cannot_be_converted(base):
    adapted = get_peft_model(models.tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    refused("has adapters", path=adapted, base=base)
    refused("has adapters", path=wrap(models.tiny("llama")), base=base)
    with torch.device("meta"):
        empty = hf.LlamaForCausalLM(base_cases.llama_config())
    refused("meta", path=empty, base=base)
    refused("device", path=models.tiny("llama"), base=base, device="cpu")
    hooked = models.tiny("llama")
    hooked.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    refused("up_proj has hooks", path=hooked, base=base)
    assert type(hooked.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_a_model_with_values_that_are_not_finite_is_left_as_it_is():
    model = models.tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    before = {name: id(module) for name, module in model.named_modules()}

    refused("layers.1.mlp.down_proj.weight has 1 value", path=model)

    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not hasattr(model.config, "quantization_config")


def test_an_error_between_two_layers_says_what_was_done(monkeypatch):
    from peftkit.base import streaming

    model, done = models.tiny("llama"), []
    quantize = streaming.quantize_nf4

    def failing(*args):
        done.append(args[1])
        if len(done) == 3:
            raise MemoryError("no memory")
        return quantize(*args)

    monkeypatch.setattr(streaming, "quantize_nf4", failing)
    refused("v_proj could not be quantised", "2 layers of 14", "no memory", path=model)

    ids = torch.arange(8)[None]
    assert model(input_ids=ids).logits.isfinite().all()
