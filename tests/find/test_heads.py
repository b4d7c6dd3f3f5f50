"""Task heads: found, trained and saved unless a config says otherwise, and named if they stay frozen."""

import subprocess
import sys

import models
import peft
import pytest
import task_models
import torch
import transformers as hf
import vision_models
from families import family
from methods import METHODS
from peft import IA3Config, LoHaConfig, LoraConfig
from task_models import BUILDERS, batch, outputs, task_model
from torch import nn

from peftkit import BottleneckConfig, ContractError, PrefixConfig, explain, wrap
from peftkit.find.heads import (
    AMBIGUOUS,
    BARE,
    QUANTISED,
    SHARED,
    find_heads,
    frozen_heads,
)


def _train_one_step(model, inputs):
    """Train one step in evaluation mode, because the statistics of batch norms in the backbone are not part of an adapter."""
    model.eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.01)
    loss = sum(found.square().mean() for found in outputs(model, inputs))
    loss.backward()
    optimizer.step()
    return model


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_heads_are_trained_and_saved_by_default(name, tmp_path):
    """The second base has another head, as in a new process, so the outputs are equal only if the head was saved."""
    heads = BUILDERS[name][1]
    inputs = batch(name)
    targets = ["convolution"] if name == "resnet image" else None
    model = wrap(task_model(name), LoraConfig(r=4, target_modules=targets))
    before = {head: _weights(model, head) for head in heads}
    assert list(explain(model).trained_in_full) == heads
    assert frozen_heads(model) == []
    _train_one_step(model, inputs)
    for head in heads:
        assert not _same(before[head], _weights(model, head))

    model.save_pretrained(tmp_path)
    with torch.no_grad():
        tuned = outputs(model, inputs)
        base = task_model(name, head_seed=1)
        assert not _same(outputs(base, inputs), tuned)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        for a, b in zip(outputs(loaded, inputs), tuned, strict=True):
            torch.testing.assert_close(a, b)


def _weights(model, head):
    copy = model.get_base_model().get_submodule(head).modules_to_save["default"]
    return [p.detach().clone() for p in copy.parameters()]


@pytest.mark.parametrize("name", ["bert sequence", "llama sequence", "wav2vec2 audio", "vit image"])
def test_no_config_at_all(name):
    model = wrap(task_model(name))
    assert list(explain(model).trained_in_full) == BUILDERS[name][1]
    outputs(model, batch(name))


_OTHER = {
    "LoHa": lambda: [LoHaConfig(r=2, target_modules="all-linear")],
    "IA3": lambda: [IA3Config(target_modules=["key", "value"], feedforward_modules=[])],
}


@pytest.mark.parametrize("method", [*METHODS, *_OTHER])
def test_every_method_trains_the_head(method, tmp_path):
    configs = (METHODS | _OTHER)[method]()
    model = wrap(task_model("bert tokens"), *configs)
    assert list(explain(model).trained_in_full) == ["classifier"]
    assert all(config.modules_to_save is None for config in configs)
    inputs = batch("bert tokens")
    _train_one_step(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(task_model("bert tokens", head_seed=1), tmp_path)
    for a, b in zip(outputs(loaded.eval(), inputs), outputs(model, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", _OTHER)
@pytest.mark.parametrize("name", ["roberta sequence", "resnet image", "bert next sentence"])
def test_heads_without_a_weight_of_their_own_are_merged(method, name):
    """PEFT's own merge gives every head the ``weight`` of its wrapper, which a container does not have."""
    targets = {"resnet image": ["convolution"]}.get(name, ["key", "value"])
    config = _OTHER[method]()[0]
    config.target_modules = targets
    model = wrap(task_model(name), config)
    inputs = batch(name)
    _train_one_step(model, inputs)
    with torch.no_grad():
        tuned = outputs(model, inputs)
        merged = model.merge_and_unload()
        assert type(merged.get_submodule(BUILDERS[name][1][0])).__module__.split(".")[0] != "peft"
        for a, b in zip(outputs(merged, inputs), tuned, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


_CHILD = """
import sys, peft, task_models, torch
folder, name = sys.argv[1:]
model = peft.PeftModel.from_pretrained(task_models.task_model(name, head_seed=2), folder).eval()
assert "peftkit" not in sys.modules
with torch.no_grad():
    torch.save(task_models.outputs(model, task_models.batch(name)), folder + "/outputs")
"""


def test_a_fresh_process_of_plain_peft_computes_the_same(tmp_path):
    name = "wav2vec2 audio"
    model = _train_one_step(wrap(task_model(name)), batch(name))
    model.save_pretrained(tmp_path)
    tests = task_models.__file__.rpartition("/")[0]
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {tests!r})\n{_CHILD}",
            tmp_path,
            name,
        ],
        check=True,
    )
    with torch.no_grad():
        for a, b in zip(torch.load(tmp_path / "outputs"), outputs(model, batch(name)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "roberta", "bart", "clip", "whisper"])
def test_pretrained_heads_of_language_and_contrastive_models_stay_frozen(name):
    model = family(name)
    assert find_heads(model).names == []
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    assert find_heads(model).names == []


def test_a_module_outside_the_backbone_that_was_not_in_the_checkpoint_is_a_head(tmp_path):
    class BertWithScorer(hf.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = hf.BertModel(config, add_pooling_layer=False)
            self.norm = nn.LayerNorm(config.hidden_size)
            self.scorers = nn.ModuleList([nn.Linear(config.hidden_size, 1) for _ in range(2)])
            self.post_init()

    config = models.tiny("bert").config
    hf.BertModel(config).save_pretrained(tmp_path)
    fresh = BertWithScorer.from_pretrained(tmp_path)
    assert find_heads(fresh).names == ["scorers.0", "scorers.1"]
    assert list(explain(wrap(fresh)).trained_in_full) == ["scorers.0", "scorers.1"]
    assert find_heads(BertWithScorer(config)).names == []
    BertWithScorer(config).save_pretrained(tmp_path)
    assert find_heads(BertWithScorer.from_pretrained(tmp_path)).names == []


def test_a_pooler_that_was_not_in_the_checkpoint_is_trained_too(tmp_path):
    config = models.tiny("bert").config
    hf.BertForMaskedLM(config).save_pretrained(tmp_path)
    fresh = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    model = wrap(fresh, LoraConfig(r=4))
    assert list(explain(model).trained_in_full) == ["bert.pooler", "classifier"]
    assert not any("pooler" in name for name in model.targeted_module_names)
    hf.BertModel(config).save_pretrained(tmp_path)
    whole = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert find_heads(whole).names == ["classifier"]


def test_a_new_layer_inside_a_head_is_part_of_it(tmp_path):
    vision_models.tiny("resnet").resnet.save_pretrained(tmp_path)
    fresh = hf.ResNetForImageClassification.from_pretrained(tmp_path)
    assert find_heads(fresh).names == ["classifier"]  # not classifier.1, too


def test_modules_of_the_user_around_a_loaded_model_are_heads(tmp_path):
    hf.BertModel(models.tiny("bert").config).save_pretrained(tmp_path)

    class Regressor(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = hf.BertModel.from_pretrained(tmp_path)
            self.drop, self.regressor = nn.Dropout(0.1), nn.Linear(32, 1)

    model = Regressor()
    assert find_heads(model).names == ["regressor"]
    model.out = model.regressor
    del model.regressor
    # "dropout" ends with these letters
    assert find_heads(model).out_of_reach == {"out": AMBIGUOUS}


def test_what_a_config_says_is_respected():
    for saved in ([], ["bert.embeddings.LayerNorm"]):
        model = wrap(task_model("bert tokens"), LoraConfig(r=4, modules_to_save=saved))
        assert list(explain(model).trained_in_full) == saved
        assert frozen_heads(model) == (["classifier"] if saved else [])
    adapted = wrap(task_model("bert tokens"), LoraConfig(target_modules=["query", "classifier"]))
    assert list(explain(adapted).trained_in_full) == []
    assert frozen_heads(adapted) == []


def test_one_config_of_a_mix_decides_for_all():
    mix = LoraConfig(r=4), PrefixConfig(modules_to_save=[]), BottleneckConfig()
    assert list(explain(wrap(task_model("bert tokens"), *mix)).trained_in_full) == []


def test_a_head_is_never_adapted_and_trained_in_full():
    model = wrap(task_model("roberta sequence"), LoraConfig(target_modules=["dense"]))
    assert list(explain(model).trained_in_full) == ["classifier"]
    assert not any("classifier" in name for name in model.targeted_module_names)


def test_frozen_heads_of_adapters_that_peft_made_alone():
    config = LoraConfig(target_modules=["q_proj"])
    assert frozen_heads(peft.get_peft_model(task_model("wav2vec2 audio"), config)) == [
        "projector",
        "classifier",
    ]
    assert frozen_heads(peft.get_peft_model(models.tiny("llama"), config)) == []
    assert frozen_heads(task_model("vit image")) == []


def test_a_head_is_in_parts_if_its_name_is_the_end_of_another_name():
    model = task_model("bert tokens")
    model.bert.main_classifier = nn.Identity()
    assert find_heads(model).out_of_reach == {"classifier": AMBIGUOUS}
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))
    assert find_heads(model).names == ["classifier.0", "classifier.2"]
    model = task_model("bert tokens")
    model.pre_classifier = nn.Linear(32, 32)
    assert find_heads(model).names == ["classifier", "pre_classifier"]


def test_a_head_that_peft_cannot_train_is_an_error_with_a_way_out():
    model = task_model("bert tokens")
    model.classifier = nn.Linear(32, 32)
    model.classifier.weight = model.bert.encoder.layer[0].attention.self.query.weight
    model.temperature = nn.Parameter(torch.ones(1))
    assert find_heads(model).out_of_reach == {"temperature": BARE, "classifier": SHARED}
    with pytest.raises(ContractError, match=r"(?s)classifier: it shares.*modules_to_save=\[\]"):
        wrap(model, LoraConfig(target_modules=["value"]))
    config = LoraConfig(target_modules=["value"], modules_to_save=[])
    assert frozen_heads(wrap(model, config)) == []


def test_a_quantised_head_is_an_error_that_says_how_to_load_the_model(tmp_path):
    models.tiny("bert").bert.save_pretrained(tmp_path)
    settings = hf.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["pooler"])
    load = hf.AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path, quantization_config=settings)
    assert find_heads(model).out_of_reach == {"classifier": QUANTISED}
    with pytest.raises(ContractError, match="llm_int8_skip_modules"):
        wrap(model)
    settings = hf.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"])
    model = wrap(load(tmp_path, quantization_config=settings))
    assert list(explain(model).trained_in_full) == ["classifier"]
