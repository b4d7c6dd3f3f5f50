"""Export a whole model, with its adapters merged, to a GGUF file whose logits are compared with the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ContractError
from peftkit.export.families import family_of, require_gguf
from peftkit.export.metadata import add_model_metadata
from peftkit.export.proof import difference, logits_of, probe_ids, read_model
from peftkit.export.tensors import (
    DTYPES,
    DType,
    Namer,
    rope_factors,
    storage_of,
    stored,
    tensor_table,
)
from peftkit.export.vocabulary import add_tokenizer
from peftkit.export.weights import Weight, merged_weights
from peftkit.export.writing import Entry, partial_file, write_tensors

BOUNDS: dict[DType, float] = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 2e-1}
"""The largest difference of the logits that ``export_gguf`` accepts, by storage: about five times (q8_0: three times) what
SmolLM2-135M-Instruct has, which is 0 (f32), 0.0017 (f16), 0.010 (bf16) and 0.062 (q8_0).
"""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the model.

    Attributes:
        path: The file.
        architecture: Its architecture in GGUF.
        dtype: How its matrices are stored.
        tensors: Number of tensors.
        size_bytes: Size of the file.
        difference: Root mean square error of the logits on the probe, relative to the logits' own deviation from each
            position's mean; the file was read by transformers.
        bound: The largest difference that was accepted.
        same_choice: Share of the probe's positions with the same most probable token.
        notes: What the user has to know.
    """

    path: Path
    architecture: str
    dtype: DType
    tensors: int
    size_bytes: int
    difference: float
    bound: float
    same_choice: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data for JSON."""
        return {**vars(self), "path": str(self.path), "notes": list(self.notes)}


def export_gguf(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    tokenizer: Any = None,
    dtype: DType = "f16",
    base: str | None = None,
    bound: float | None = None,
    probe: Tensor | None = None,
    pre_tokenizer: str | None = None,
    name: str | None = None,
) -> ExportReport:
    """Export a model to a GGUF file for llama.cpp, read the file back, and compare the logits.

    Active adapters are merged in float32, layer by layer; the model stays as it is. Vectors (norms, biases) are stored in
    float32. The file is written under a temporary name and renamed when the comparison is good. In addition to the model,
    memory for the model that is read back is needed.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 for causal language modelling, or a ``PeftModel`` around it; or a folder of a
            model or of an adapter.
        path: The file to write; replaced if it exists.
        tokenizer: The tokenizer. Default: the one in the folder, or where ``model`` was loaded from. ``False`` writes none, so
            that llama.cpp takes and returns token ids only.
        dtype: ``f32``, ``f16``, ``bf16`` or ``q8_0`` (rows that 32 does not divide are stored in float16 instead).
        base: For a folder of an adapter: folder or hub id of the base model. Default: the one in its config.
        bound: The largest accepted difference of the logits (see ``ExportReport.difference``). Default: by ``dtype``, in
            ``peftkit.export.model_file.BOUNDS``.
        probe: Token ids to compare logits on, ``Int64[batch, tokens]``. Default: a fixed text.
        pre_tokenizer: llama.cpp's name for the way the tokenizer splits text. Default: recognised.
        name: Name of the model in the file. Default: from its path.

    Raises:
        ContractError: The architecture, an adapter or the tokenizer cannot be exported, ``gguf`` is not installed, or the
            difference is above the bound. No file is left.
        ValueError: ``dtype`` is unknown.
    """
    gguf = require_gguf()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    path = Path(path)
    loaded = load_model(model, base) if isinstance(model, (str, Path)) else model
    config: Any = loaded.config
    family = family_of(config)
    if tokenizer is None:
        tokenizer = _tokenizer(model, config)
    namer = Namer(family, config)
    weights = merged_weights(loaded)
    limit = BOUNDS[dtype] if bound is None else bound
    with partial_file(path) as partial:
        writer = gguf.GGUFWriter(partial, family.arch)
        notes = add_model_metadata(writer, family, config, name or _name(config), dtype)
        if tokenizer:
            stops = getattr(getattr(loaded, "generation_config", None), "eos_token_id", None)
            add_tokenizer(writer, tokenizer, config.vocab_size, pre_tokenizer, stops)
        else:
            writer.add_tokenizer_model("no_vocab")
            notes.append("the file has no tokenizer; llama.cpp takes and returns token ids only")
        count = write_tensors(writer, _entries(weights, namer, config, dtype))
        ids = probe_ids(config, tokenizer) if probe is None else probe
        expected = logits_of(loaded, ids)
        found = logits_of(read_model(partial, _compute_dtype(loaded)), ids)
        error = difference(expected, found)
        same = (expected.cpu().argmax(-1) == found.cpu().argmax(-1)).float().mean().item()
        if not error <= limit:
            raise ContractError(
                f"bound={limit:g}: the logits of the file differ by {error:.3g} of their deviation from those of the model "
                f"({same:.0%} of the most probable tokens are the same), so no file was written; use a wider dtype than "
                f"{dtype}, or pass a larger bound"
            )
        size = partial.stat().st_size
    return ExportReport(path, family.arch, dtype, count, size, error, limit, same, tuple(notes))


def load_model(folder: str | Path, base: str | None) -> nn.Module:
    """Load a model, or an adapter on its base model, from a folder.

    Raises:
        ContractError: The folder is of neither kind, or the adapter does not fit.
    """
    import transformers

    from peftkit.adapter_files import CONFIG_FILE, read_config
    from peftkit.loading import load_adapter

    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        try:
            return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        except (OSError, ValueError) as error:
            raise ContractError(
                f"model={str(folder)!r} is neither a folder of a model nor of an adapter ({' '.join(str(error).split())[:200]})"
            ) from error
    base = base or read_config(folder).get("base_model_name_or_path")
    if base is None:
        raise ContractError(
            "base=None: the adapter does not record its base model; pass base (--base)"
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return load_adapter(model, folder, accelerate=False)


def _entries(weights: list[Weight], namer: Namer, config: Any, dtype: DType) -> list[Entry]:
    by_name = {weight.name: weight for weight in weights}
    head, embedding = by_name.get("lm_head.weight"), by_name["model.embed_tokens.weight"]
    tied = head is not None and head.source is embedding.source
    # An adapter on one of two tied embeddings unties them.
    tied = tied and not (head.is_merged or embedding.is_merged)
    entries: list[Entry] = []
    factors = rope_factors(config)
    if factors is not None:
        kind = storage_of((1,), dtype)
        entries.append(
            ("rope_freqs.weight", tuple(factors.shape), kind, lambda: stored(factors, kind))
        )
    for name, weight in tensor_table(weights, namer, tied):
        entries.append(_entry(name, weight, namer, dtype))
    return entries


def _entry(name: str, weight: Weight, namer: Namer, dtype: DType) -> Entry:
    kind = storage_of(weight.shape, dtype)
    return (
        name,
        weight.shape,
        kind,
        lambda: stored(namer.reorder(weight.name, weight.load()), kind),
    )


def _compute_dtype(model: Any) -> torch.dtype:
    """The dtype of the model's own activations, so that rounding them is not counted as a difference."""
    return next((p.dtype for n, p in model.named_parameters() if "norm" in n), torch.float32)


def _tokenizer(model: Any, config: Any) -> Any:
    import transformers

    places = [model] if isinstance(model, (str, Path)) else []
    for place in [*places, config.name_or_path]:
        if not place:
            continue
        try:
            return transformers.AutoTokenizer.from_pretrained(str(place))
        except (OSError, ValueError):
            continue
    raise ContractError(
        "tokenizer=None: no tokenizer was found where the model was loaded from; pass tokenizer, or tokenizer=False "
        "(--no-tokenizer) to write a file without one"
    )


def _name(config: Any) -> str:
    name = Path(config.name_or_path or config.model_type).name
    # transformers reads the name "mistral" as an architecture
    return "Mistral" if name == "mistral" else name
