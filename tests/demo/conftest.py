"""A tiny base model with a byte tokenizer, so that whole runs of the demo take seconds."""

import shutil

import pytest
import torch

from demo.settings import Settings


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A model folder such as ``prepare_base`` writes, of a random two-layer Llama that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "base"
    symbols = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_demo(tiny_base, monkeypatch):
    """Makes ``demo.run`` work on the tiny model; returns settings that take seconds."""
    import demo.phases as phases

    def copied(folder, on_progress):
        shutil.copytree(tiny_base, folder)
        on_progress(1, 1)

    monkeypatch.setattr(phases, "prepare_base", copied)
    return Settings(
        train_pairs=40,
        held_out_pairs=11,
        steps=6,
        batch_size=4,
        warmup_steps=1,
        lora_r=4,
        lora_alpha=8,
        checkpoint_every=2,
        proof_prompts=3,
        compare_steps=2,
    )
