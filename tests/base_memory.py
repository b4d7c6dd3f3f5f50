"""Write a large random checkpoint in little memory, and measure in a process of its own what loading and training it needs.

    python tests/base_memory.py FOLDER nf4 [--tokens 512]

prints one line of JSON, in bytes. ``write_checkpoint`` writes the checkpoint.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

SIZES_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""The sizes of a Llama with 3.2 billion parameters: 6.4 GB in bfloat16."""


def write_checkpoint(folder: Path, sizes: dict[str, int]) -> int:
    """Write a Llama with random bfloat16 weights and tied embeddings, one file a layer.

    Returns:
        Bytes of the largest tensor.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        **sizes, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(folder)
    H, F = config.hidden_size, config.intermediate_size
    Q, KV = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    linears = {
        "self_attn.q_proj": (Q, H),
        "self_attn.k_proj": (KV, H),
        "self_attn.v_proj": (KV, H),
        "self_attn.o_proj": (H, Q),
        "mlp.gate_proj": (F, H),
        "mlp.up_proj": (F, H),
        "mlp.down_proj": (H, F),
    }
    generator = torch.Generator().manual_seed(0)
    places, largest = {}, 0

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal largest
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))
        largest = max(largest, *(t.nbytes for t in tensors.values()))

    ones = torch.ones(H, dtype=torch.bfloat16)
    embedding = {"model.embed_tokens.weight": draw(config.vocab_size, H), "model.norm.weight": ones}
    write("model-embedding.safetensors", embedding)
    del embedding
    for number in range(config.num_hidden_layers):
        before = f"model.layers.{number}"
        tensors = {f"{before}.{name}.weight": draw(*shape) for name, shape in linears.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{before}.{name}.weight"] = ones.clone()
        write(f"model-{number}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return largest


def measured(folder: Path, base: str, tokens: int = 0) -> dict[str, int]:
    """Run ``main`` in a process of its own and return what it prints."""
    command = [sys.executable, __file__, str(folder), base, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Anonymous:
    """The largest anonymous memory of the process while the context is open, which mapped files and caches do not change."""

    def __enter__(self):
        self.start = self.peak = _status("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, _status("RssAnon"))

    def _watch(self):
        while not self._done.is_set():
            self.peak = max(self.peak, _status("RssAnon"))
            time.sleep(0.002)


def _status(field: str) -> int:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def _train(model: Any, tokens: int) -> None:
    """Put LoRA on a model and train one step."""
    from peftkit import LoraConfig, wrap

    model = wrap(model, LoraConfig(r=16)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    optimiser = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimiser.step()
    assert loss.isfinite()


def _reset_peak() -> int:
    """Reset VmHWM and return the memory that is used now."""
    Path("/proc/self/clear_refs").write_text("5")  # documented in proc(5)
    return _status("VmRSS")


def main() -> None:
    """Load a checkpoint, train one step if asked to, and print the bytes that were needed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("base", choices=["nf4", "int8", "fp8", "bf16"])
    parser.add_argument("--tokens", type=int, default=0)
    arguments = parser.parse_args()

    import peft  # noqa: F401 - base_report or wrap may import it later

    from peftkit import base_report, load_base

    with tempfile.TemporaryDirectory() as small:
        # what the imports and the first calls need is not part of the measurement
        sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "head_dim"), 64)
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
        write_checkpoint(Path(small), sizes | heads)
        model = load_base(small, arguments.base)
        if arguments.tokens:
            _train(model, 16)

    start = _reset_peak()
    with Anonymous() as anonymous:
        model = load_base(arguments.folder, arguments.base)
    found = {
        "stored": base_report(model).nbytes,
        "resident": _status("RssAnon") - anonymous.start,
        "peak": _status("VmHWM") - start,
        "peak_anonymous": anonymous.peak - anonymous.start,
    }
    if arguments.tokens:
        before = _reset_peak()
        _train(model, arguments.tokens)
        found["step"] = _status("VmHWM") - before
        found["peak_of_process"] = max(_status("VmHWM"), start + found["peak"])
        found["swap"] = _status("VmSwap")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
