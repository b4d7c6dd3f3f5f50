"""Export an adapter alone to a GGUF file, which llama.cpp applies to a model file (``--lora``)."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import ContractError
from peftkit.export.families import family_of, require_gguf
from peftkit.export.tensors import DTYPES, DType, Namer, storage_of, stored
from peftkit.export.writing import Entry, partial_file, write_tensors
from peftkit.interop.files import read_checkpoint
from peftkit.serving.rows import Adapter, Key, is_saved_embedding, module_scale

Factors = dict[str, tuple[Tensor, Tensor]]


def export_adapter_gguf(
    adapter: str | Path,
    path: str | Path,
    *,
    base: str | None = None,
    dtype: DType = "f32",
) -> Path:
    """Export a LoRA adapter to a GGUF file, and compare its factors with the adapter's.

    llama.cpp multiplies every product by ``lora_alpha / rank`` with one ``lora_alpha``. Other scales (rsLoRA,
    ``alpha_pattern``) are multiplied into ``lora_B``.

    Args:
        adapter: Folder of a LoRA adapter saved by PEFT or peftkit, for a Llama, Mistral, Qwen2 or Qwen3.
        path: The file to write; replaced if it exists.
        base: Folder or hub id of the base model; only its config is read. Default: the one in the adapter's config.
        dtype: ``f32``, ``f16``, ``bf16`` or ``q8_0``.

    Returns:
        ``path``.

    Raises:
        ContractError: The adapter has parts that llama.cpp does not apply, or ``gguf`` is not installed. No file is left.
        ValueError: ``dtype`` is unknown, or transformers does not know the config of ``base``.
    """
    gguf = require_gguf()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    checkpoint = read_checkpoint(adapter)
    config = _base_config(base or checkpoint.config.get("base_model_name_or_path"))
    family = family_of(config)
    _require_plain(checkpoint.config, checkpoint.tensors, config)
    factors, alpha = _factors(checkpoint.config, checkpoint.tensors, Namer(family, config))
    path = Path(path)
    with partial_file(path) as partial:
        writer = gguf.GGUFWriter(partial, family.arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(checkpoint.folder.resolve().name)
        write_tensors(
            writer, [e for name, pair in factors.items() for e in _entries(name, pair, dtype)]
        )
        _compare(partial, factors, dtype)
    return path


def _base_config(base: str | None) -> Any:
    import transformers

    if base is None:
        raise ContractError(
            "base=None: the adapter does not record its base model; pass base (--base)"
        )
    try:
        return transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base={base!r} is neither a folder with a config.json nor a model on the hub ({' '.join(str(error).split())[:200]})"
        ) from error


def _require_plain(config: dict[str, Any], tensors: dict[str, Tensor], base: Any) -> None:
    """Raise unless all of the adapter is plain LoRA."""
    from peftkit.serving import llama_cpp

    if config.get("peft_type") != "LORA":
        raise ContractError(
            f"peft_type={config.get('peft_type')}: llama.cpp applies LoRA only; export the merged model"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    held = Adapter(config, shapes, frozenset())
    rules = [
        rule for rule in llama_cpp.SERVER.fields if config.get(rule.field) not in rule.harmless
    ]
    if rules:
        raise ContractError(
            f"{rules[0].field}={config[rules[0].field]!r}: llama.cpp {rules[0].why}; {rules[0].way_out}"
        )
    for key in held.keys:
        if is_saved_embedding(key) and shapes[key.name][0] == base.vocab_size:
            continue
        if not key.as_peft_writes or key.is_stack or key.is_one_expert:
            raise ContractError(
                f"{key.name} is not a factor that llama.cpp applies; export the merged model instead"
            )
        if key.leaf == "lm_head" and base.tie_word_embeddings:
            raise ContractError(
                f"{key.name}: lm_head is the input embedding in this model's file; export the merged model instead"
            )


def _factors(
    config: dict[str, Any], tensors: dict[str, Tensor], namer: Namer
) -> tuple[Factors, float]:
    """The factors by the names of their weights in the file, in float32, and the alpha that scales them."""
    pairs = {
        key.module: (key, tensors[key.name], _partner(key, tensors))
        for key in map(Key.parse, tensors)
        if key.role.endswith("_A")
    }
    if not pairs:
        raise ContractError("the adapter has no factors of LoRA (lora_A, lora_B)")
    alphas = {
        module: module_scale(config, module) * A.shape[0] for module, (_, A, _) in pairs.items()
    }
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    factors = {}
    for module, (key, A, B) in pairs.items():
        A, B = A.float(), B.float()
        if not math.isclose(alphas[module], alpha):
            B = B * (alphas[module] / alpha)
        if "embedding" in key.role:
            A = A.T  # llama.cpp looks up rows of it
        factors[namer(f"{module}.weight")] = (A.contiguous(), namer.reorder(module, B).contiguous())
    return factors, alpha


def _partner(key: Key, tensors: dict[str, Tensor]) -> Tensor:
    name = key.name.replace("lora_A.", "lora_B.").replace("lora_embedding_A", "lora_embedding_B")
    if name not in tensors:
        raise ContractError(f"{key.name} has no counterpart {name}; save the adapter again")
    return tensors[name]


def _entries(name: str, pair: tuple[Tensor, Tensor], dtype: DType) -> list[Entry]:
    return [
        _entry(f"{name}.{role}", factor, dtype)
        for role, factor in zip(("lora_a", "lora_b"), pair, strict=True)
    ]


def _entry(name: str, factor: Tensor, dtype: DType) -> Entry:
    shape = tuple(factor.shape)
    kind = storage_of(shape, dtype)
    return name, shape, kind, lambda: stored(factor, kind)


def _compare(file: Path, factors: Factors, dtype: DType) -> None:
    """Raise unless the file has the factors, up to the rounding of their storage."""
    gguf = require_gguf()
    limit = {"f32": 0.0, "f16": 2**-10, "bf16": 2**-8, "q8_0": 2**-6}[dtype]
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, pair in factors.items():
        for role, wanted in zip(("lora_a", "lora_b"), pair, strict=True):
            tensor = read[f"{name}.{role}"]
            found = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(
                wanted.shape
            )
            error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
            if not error <= limit:
                raise ContractError(
                    f"{name}.{role} differs by {error:.3g} in the file, more than {dtype} can round; use a wider dtype"
                )
