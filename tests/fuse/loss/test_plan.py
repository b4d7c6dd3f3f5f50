"""In every state of the output head a forward computes its logits exactly if the status says so."""

import functools
import types

import models
import pytest
import torch
import transformers as hf
import trl
from causal import DECODER, LORA, peft_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from peftkit.fuse.loss import LazyLogits, install_logit_free, logit_free_status, loss_plan
from peftkit.fuse.loss.head import Head
from peftkit.fuse.plan import Reason

ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}


class Rounded(nn.Linear):
    """A stand-in for a quantised head, with a forward of its own."""

    def forward(self, x):
        return super().forward(x).round(decimals=2)


class Renamed(nn.Linear):
    """A head whose class differs only in its name."""


def head_of(model):
    return model.get_base_model().lm_head


def nothing(model):
    """The state of a new model."""


def plain(**config):
    return lambda: peft_model(dtype=torch.float32, **config)


def adapted(**config):
    return plain(**ON_HEAD, **config)


def tied(**config):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True))
    return get_peft_model(model, LoraConfig(**LORA, **config))


def with_head(cls):
    model = models.tiny("llama")
    head = model.lm_head
    model.lm_head = cls(head.in_features, head.out_features, bias=False)
    return get_peft_model(model, LoraConfig(**LORA))


def merge(model):
    model.merge_adapter()


def disable(model):
    model.base_model.disable_adapter_layers()


def merged_and_disabled(model):
    """PEFT's own forward unmerges the adapters in this state."""
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def deactivate(model):
    model.base_model.set_adapter([])


def second_adapter(model):
    model.add_adapter("second", LoraConfig(**{**LORA, **ON_HEAD}))
    model.base_model.set_adapter(["default", "second"])


def own_loss(logits, labels, vocab_size, **kwargs):
    return logits.float().logsumexp(-1).mean()


def set_loss(model):
    model.get_base_model().loss_function = own_loss


def replaced_forward(wraps):
    def change(model):
        base = model.get_base_model()
        stock = base.forward

        def forward(self, *args, **kwargs):
            return stock(*args, **kwargs)

        forward = functools.wraps(stock)(forward) if wraps else forward
        base.forward = types.MethodType(forward, base)

    return change


def hook(kind, part=None):
    def change(model):
        module = head_of(model) if part is None else getattr(head_of(model), part)["default"]
        getattr(module, kind)(lambda *args: None)

    return change


def replace_head_forward(model):
    head = head_of(model)
    head.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x), head)


STATES = {
    "frozen head": (plain(), nothing, None),
    "tied head": (tied, nothing, None),
    "renamed class": (lambda: with_head(Renamed), nothing, None),
    "modules_to_save": (plain(modules_to_save=["lm_head"]), nothing, None),
    "modules_to_save, disabled": (plain(modules_to_save=["lm_head"]), disable, None),
    "adapter": (adapted(), nothing, None),
    "rslora": (adapted(use_rslora=True), nothing, None),
    "dropout, eval": (adapted(lora_dropout=0.1), nn.Module.eval, None),
    "merged": (adapted(), merge, None),
    "disabled": (adapted(), disable, None),
    "not active": (adapted(), deactivate, None),
    "wrapped forward": (plain(), replaced_forward(wraps=True), None),
    "dropout, training": (adapted(lora_dropout=0.1), nothing, "dropout 0.1"),
    "merged and disabled": (adapted(), merged_and_disabled, "still merged"),
    "two adapters": (adapted(), second_adapter, "2 active adapters"),
    "DoRA": (adapted(use_dora=True), nothing, "Dora"),
    "lora_bias": (adapted(lora_bias=True), nothing, "without bias"),
    "trainable tokens": (
        lambda: tied(trainable_token_indices=[1, 2]),
        nothing,
        "TrainableTokensWrapper",
    ),
    "quantised": (lambda: with_head(Rounded), nothing, "Rounded"),
    "forward hook": (plain(), hook("register_forward_hook"), "hooks"),
    "forward pre-hook": (plain(), hook("register_forward_pre_hook"), "hooks"),
    "backward hook": (plain(), hook("register_full_backward_hook"), "hooks"),
    "hook on A": (adapted(), hook("register_forward_hook", "lora_A"), "hooks"),
    "hook on B": (adapted(), hook("register_forward_hook", "lora_B"), "hooks"),
    "hook on dropout": (adapted(), hook("register_forward_hook", "lora_dropout"), "hooks"),
    "replaced forward of the head": (plain(), replace_head_forward, "replaced forward"),
    "replaced forward": (plain(), replaced_forward(wraps=False), "was replaced"),
    "own loss": (plain(), set_loss, "own_loss"),
    "meta device": (plain(), lambda model: model.to("meta"), "meta device"),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("installed", ["first", "last"])
@pytest.mark.parametrize("state", STATES)
def test_status_and_forward_agree(state, installed):
    make, change, expected = STATES[state]
    model = make()
    if installed == "first":
        install_logit_free(model)
        change(model)
    else:
        change(model)
        assert (install_logit_free(model) is None) == (expected is None)
    logit_free, sentence = logit_free_status(model)
    assert logit_free == (expected is None), sentence
    assert expected is None or expected in sentence
    assert isinstance(loss_plan(model.get_base_model()), Head if logit_free else Reason)
    labels = models.batch("llama")["labels"].to(model.device)
    logits = model(input_ids=labels.clamp(min=0), labels=labels).logits
    assert (type(logits) is LazyLogits) == logit_free
    assert logits.shape == (2, 12, models.VOCAB_SIZE)


@pytest.mark.parametrize("cls", [nn.Linear, LoraLinear], ids=["Linear", "LoRA"])
def test_a_patched_class_runs_its_patch(cls, monkeypatch):
    model = adapted()() if cls is LoraLinear else plain()()
    install_logit_free(model)
    batch = models.batch("llama")
    before = model(**batch).logits.detach()
    stock = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: 2 * stock(self, x))
    assert logit_free_status(model) == (False, "Linear.forward was replaced")
    logits = model(**batch).logits
    assert type(logits) is torch.Tensor
    assert not torch.allclose(logits, before)


def test_trl_computes_the_loss_itself():
    """TRL's trainers replace the model's forward and compute the loss with a head of their own; peftkit's loss is not used."""
    model = peft_model(dtype=torch.float32)
    base, batch = model.get_base_model(), models.batch("llama")
    assert install_logit_free(model) is None
    before, expected = logit_free_status(model), model(**batch).loss
    trl.trainer.utils.add_fused_lm_head(base)
    logit_free, sentence = logit_free_status(model)
    assert not logit_free
    assert "TRL" in sentence
    assert type(model(**batch).logits) is torch.Tensor
    torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, expected)
    del base.forward
    assert logit_free_status(model) == before
    assert type(model(**batch).logits) is LazyLogits


def test_an_adapter_on_the_head_and_trl():
    """The report mentions it, because SFTTrainer refuses such a model."""
    model = peft_model(**ON_HEAD)
    install_logit_free(model)
    assert "SFTTrainer" in logit_free_status(model)[1]


@pytest.mark.parametrize("outside", ["compiled", "parallel"])
def test_status_of_a_model_inside_another(outside):
    model = peft_model()
    install_logit_free(model)
    outer = torch.compile(model) if outside == "compiled" else nn.DataParallel(model)
    assert logit_free_status(outer) == logit_free_status(model)
    assert logit_free_status(outer)[0]
