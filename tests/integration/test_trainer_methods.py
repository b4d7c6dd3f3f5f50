"""The Hugging Face Trainer over prefixes, bottlenecks and mixes: checkpointing, checkpoints and resuming, as for LoRA."""

import methods
import models
import pytest
from integration.support import (
    LOSS_TOLERANCE,
    adapter_tensors,
    largest_difference,
    trainer,
)
from safetensors.torch import load_file

from peftkit import explain

# The name that every supported version of transformers knows.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

every = pytest.mark.parametrize(
    "method", ["pfeiffer", "parallel", "prefix", "gated prefix", "all three"]
)


@every
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_does_not_change_losses(method, use_reentrant, tmp_path):
    settings = {"max_steps": 6, "optim": "sgd", "learning_rate": 0.1}
    plain = trainer(methods.wrapped(method, "llama"), tmp_path, **settings)
    plain.train()
    checkpointed = trainer(
        methods.wrapped(method, "llama"),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        **settings,
    )
    checkpointed.train()
    assert checkpointed.losses == pytest.approx(plain.losses, rel=0, abs=LOSS_TOLERANCE)
    untrained = adapter_tensors(methods.wrapped(method, "llama"))
    assert largest_difference(adapter_tensors(checkpointed.model), untrained) > 1e-3


@every
def test_checkpoint_holds_the_adapter_alone_and_resumes_bit_for_bit(method, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(methods.wrapped(method, "llama"), tmp_path, **settings)
    whole.train()
    held = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert not list((tmp_path / "checkpoint-3").glob("model*"))
    assert sum(t.numel() for t in held.values()) == sum(
        p.numel() for p in whole.model.parameters() if p.requires_grad
    )
    rest = trainer(methods.wrapped(method, "llama"), tmp_path / "rest", **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rest.losses == whole.losses[3:]
    assert largest_difference(adapter_tensors(rest.model), adapter_tensors(whole.model)) == 0.0


def test_prefixes_in_front_of_the_keys_give_the_losses_of_merged_passes(tmp_path):
    """Eager attention computes the same sum another way: over joined keys, with the scores in memory."""
    losses = {}
    for implementation in ("sdpa", "eager"):
        base = models.tiny("llama")
        base.set_attn_implementation(implementation)
        model = methods.on(base, "prefix")
        run = trainer(model, tmp_path, max_steps=10, optim="sgd", learning_rate=0.1)
        run.train()
        losses[implementation] = run.losses
        paths = {layer.path for layer in explain(model).layers if layer.method == "prefix"}
        assert paths == {"fused:torch" if implementation == "sdpa" else "torch"}
    assert losses["sdpa"] == pytest.approx(losses["eager"], rel=0, abs=LOSS_TOLERANCE)
