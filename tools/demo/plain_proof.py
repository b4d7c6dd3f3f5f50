"""Load an adapter with plain PEFT, merge it, and compare both models with the results of peftkit.

This is a script for a separate process that does not import peftkit: ``python plain_proof.py DATA RESULT``. DATA is a
safetensors file with the results of peftkit (see ``proof.py``). RESULT is the JSON file to write. A line is printed after each part of the work.

The truth for the logits is the plain PEFT model in float64. Logits agree if their error is at most twice the error of plain
PEFT in float32, plus one rounding. Texts agree if they are equal.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def main(data: Path, result: Path) -> None:
    """Compare, and write the result.

    The keys of the result are ``plain`` and ``merged`` (agreement of texts and logits of each model), ``prompts``,
    ``scored_tokens`` and ``peftkit_imported``.
    """
    with safe_open(data, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        paths = file.metadata()
    rows, scored, fused = tensors["rows"], tensors["scored"].bool(), tensors["logits"]
    expected = tensors["generated"]

    base = AutoModelForCausalLM.from_pretrained(
        paths["base"], dtype=torch.float32, local_files_only=True
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the device that peftkit used
    plain = PeftModel.from_pretrained(base, paths["adapter"]).to(device).eval()
    _finished("loaded")
    truth = logits_of(copy.deepcopy(plain).double(), rows, scored)
    _finished("logits in float64")
    plain_logits = logits_of(plain, rows, scored)
    _finished("logits of plain PEFT")
    plain_texts = generate(plain, tensors, expected)
    _finished("texts of plain PEFT")
    merged = plain.merge_and_unload()
    merged_logits = logits_of(merged, rows, scored)
    _finished("logits of the merged model")
    merged_texts = generate(merged, tensors, expected)
    _finished("texts of the merged model")

    outcome = {
        "plain": compare(fused, plain_logits, truth) | plain_texts,
        "merged": compare(merged_logits, plain_logits, truth) | merged_texts,
        "prompts": len(expected),
        "scored_tokens": int(scored.sum()),
        "peftkit_imported": any(name.split(".")[0] == "peftkit" for name in sys.modules),
    }
    partial = result.with_name(result.name + ".partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(result)
    _finished("written")


def _finished(part: str) -> None:
    print(f"part: {part}", flush=True)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, rows: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[scored tokens, V]`` of ``rows``, which are padded on the right."""
    return torch.cat(
        [
            model(input_ids=row[None].to(model.device)).logits[0].cpu()[keep]
            for row, keep in zip(rows, scored, strict=True)
        ]
    )


def generate(
    model: PeftModel, tensors: dict[str, torch.Tensor], expected: torch.Tensor
) -> dict[str, int]:
    """Decode the prompts with transformers' own ``generate``, and count the rows that equal ``expected``."""
    prompts, mask, pad = tensors["prompts"], tensors["prompt_mask"], int(tensors["pad"])
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompts.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=expected.shape[1],
            do_sample=False,
            eos_token_id=int(tensors["eos"]),
            pad_token_id=pad,
        )[:, prompts.shape[1] :].cpu()
    out = torch.nn.functional.pad(out, (0, expected.shape[1] - out.shape[1]), value=pad)
    return {"same_texts": int((out == expected).all(dim=1).sum())}


def compare(
    actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor
) -> dict[str, float | bool]:
    """Return the largest errors of ``actual`` and ``plain``, and whether the error of ``actual`` is within its bound.

    The bound is twice the error of ``plain``, plus one float32 rounding of the largest value.
    """
    error = float((actual.double() - truth).abs().max())
    plain_error = float((plain.double() - truth).abs().max())
    allowed = 2 * plain_error + torch.finfo(torch.float32).eps * float(truth.abs().max())
    return {
        "logit_error": error,
        "plain_logit_error": plain_error,
        "logits_agree": error <= allowed,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
