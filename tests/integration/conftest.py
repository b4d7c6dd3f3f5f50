"""One thread for the tests of this folder: tiny models gain nothing from more, and results stay the same bit for bit."""

from collections.abc import Iterator

import models
import pytest
import tokenizers
import transformers as hf
from integration.support import TEXTS


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    """A word tokenizer for ``TEXTS``, with the special tokens of the tiny Llama."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    backend.train_from_iterator(TEXTS, tokenizers.trainers.WordLevelTrainer(special_tokens=special))
    assert backend.get_vocab_size() <= models.VOCAB_SIZE
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
