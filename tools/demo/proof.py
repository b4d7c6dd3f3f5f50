"""Check in a new process that plain PEFT loads the adapter, and that plain PEFT and the merged model agree with peftkit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from demo.child import run_child
from demo.dataset import encode, prompt_of
from demo.evaluate import decode_tokens
from demo.files import read_json
from demo.generator import Example
from demo.settings import Folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PARTS = 8
"""Units of the progress of ``prove``: the evidence, and each part that ``plain_proof.py`` names."""
_SCORED_PROMPTS = 8


def prove(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    folder: Folder,
    *,
    max_new_tokens: int,
    on_part: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Compare ``model`` with plain PEFT and with the merged model, in a new process that does not import peftkit.

    Args:
        model: The trained model. Its adapter is saved in ``folder.adapter``.
        tokenizer: The model's tokenizer.
        examples: Held-out requests for the comparison.
        folder: The run, for the base model and the adapter.
        max_new_tokens: Maximum number of tokens of an answer, as in the evaluation.
        on_part: Called with the number of finished parts, of ``PARTS``.

    Returns:
        The result of ``plain_proof.py``, with ``plain_peft_agrees`` and ``merged_agrees``.
    """
    from safetensors.torch import save_file

    tensors = _evidence(model, tokenizer, examples, max_new_tokens)
    on_part(1)
    paths = {"base": str(folder.base.resolve()), "adapter": str(folder.adapter.resolve())}
    with tempfile.TemporaryDirectory() as temporary:
        data, result = Path(temporary) / "data.safetensors", Path(temporary) / "result.json"
        save_file(tensors, data, metadata=paths)
        script = Path(__file__).with_name("plain_proof.py")
        lines = ["the evidence"]

        def read(line: str) -> None:
            if line.startswith("part:"):
                lines.append(line)
                on_part(len(lines))

        run_python(script, [str(data), str(result)], read)
        outcome = read_json(result)

    def agrees(which: str) -> bool:
        result = outcome[which]
        return result["logits_agree"] and result["same_texts"] == outcome["prompts"]

    return outcome | {
        "plain_peft_agrees": agrees("plain") and not outcome["peftkit_imported"],
        "merged_agrees": agrees("merged"),
    }


def _evidence(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
) -> dict[str, torch.Tensor]:
    """Return the tensors for the other process: prompts, the decoded tokens, and the logits of whole answers."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    requests = [example.request for example in examples]
    prompts = [tokenizer(prompt_of(r), add_special_tokens=False)["input_ids"] for r in requests]
    generated = decode_tokens(model, tokenizer, requests, max_new_tokens=max_new_tokens)
    longest = max(map(len, prompts))
    length = min(max(map(len, generated)) + 1, max_new_tokens)
    ended = [[*tokens, eos] if len(tokens) < max_new_tokens else tokens for tokens in generated]

    rows = [encode(example, tokenizer) for example in examples[:_SCORED_PROMPTS]]
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows])
    answered = torch.tensor(
        [
            [label != -100 for label in row["labels"]] + [False] * (width - len(row["labels"]))
            for row in rows
        ]
    )
    scored = answered.roll(-1, dims=1)  # the position before a token predicts it
    with torch.inference_mode():
        model.eval()
        logits = torch.cat(
            [
                model(input_ids=row[None].to(model.device)).logits[0].cpu()[keep]
                for row, keep in zip(ids, scored, strict=True)
            ]
        )
    return {
        "rows": ids,
        "scored": scored.to(torch.uint8),
        "logits": logits.float().contiguous(),
        "prompts": torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        "generated": torch.tensor([(t + [pad] * length)[:length] for t in ended]),
        "pad": torch.tensor(pad),
        "eos": torch.tensor(eos),
    }


def run_python(
    script: Path, arguments: Sequence[str], on_line: Callable[[str], None] = lambda line: None
) -> None:
    """Run a script of this folder in a new interpreter, without this folder on ``sys.path``.

    If the script were run by its path, the other files of this folder would hide packages with the same names.

    Raises:
        RuntimeError: The script failed. The message has its error output.
    """
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run_child(["-c", code, str(script), *arguments], script.name, on_line)
