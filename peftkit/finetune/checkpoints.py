"""The checkpoints of a run: each is complete or does not count, and an old one goes only after a newer one is complete."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, count, listing
from peftkit.finetune.files import sync, write_text

WHOLE = "whole.json"
"""In a checkpoint: the size and the CRC-32 of each of its files, written last."""

WEIGHTS = "weights.json"
"""In a checkpoint of an adapter: a digest of each trained tensor as it was in memory."""

_STATE = "trainer_state.json"
_CHUNK_BYTES = 2**22


def checkpoint_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints in a folder, complete or not, in the order of their steps."""
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else []:
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and path.is_dir():
            found.append((int(number[1]), path))
    return [path for _, path in sorted(found)]


def mark_whole(checkpoint: Path) -> None:
    """Bring the files of a checkpoint to the disk, and then write down that it is complete."""
    known = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != WHOLE:
            sync(file)
            known[str(file.relative_to(checkpoint))] = [file.stat().st_size, _crc(file)]
    write_text(checkpoint / WHOLE, json.dumps(known))
    sync(checkpoint)
    sync(checkpoint.parent)


def is_whole(checkpoint: Path, *, read: bool = False) -> bool:
    """Whether a checkpoint was completed and its files are all there.

    Args:
        checkpoint: The folder.
        read: Read every file, too, and compare its contents. Otherwise only sizes are compared.
    """
    try:
        known = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        return all(
            (checkpoint / name).stat().st_size == size
            and (not read or _crc(checkpoint / name) == crc)
            for name, (size, crc) in known.items()
        )
    except (OSError, ValueError):
        return False


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. First it stops being complete, so that one of which some files are left does not count."""
    if checkpoint.is_dir():
        (checkpoint / WHOLE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def remove_old(folder: Path, keep: int) -> None:
    """Remove checkpoints that are older than the newest complete one.

    Args:
        folder: The folder of all checkpoints.
        keep: Number of complete checkpoints to keep. The best one that each of these knows is kept besides.
    """
    found = checkpoints_in(folder)
    whole = [checkpoint for checkpoint in found if is_whole(checkpoint)]
    if not whole:
        return
    recent = whole[-keep:]
    kept = {*recent, *(best_of(checkpoint) for checkpoint in recent)}
    for checkpoint in found[: found.index(whole[-1])]:
        if checkpoint not in kept:
            remove(checkpoint)


def best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint so far as a checkpoint knows it; it may be the same one."""
    step = json.loads((checkpoint / _STATE).read_text(encoding="utf-8")).get("best_global_step")
    return checkpoint_of(checkpoint.parent, step) if step else None


def require_best(checkpoint: Path, stops_early: bool) -> None:
    """Raise ``ContractError`` if the best checkpoint is lost or damaged; the last weights would be another result.

    Args:
        checkpoint: The best checkpoint.
        stops_early: Whether the recipe has ``training.early_stopping``.
    """
    if not is_whole(checkpoint, read=True):
        state = "damaged" if checkpoint.is_dir() else "lost"
        raise ContractError(
            f"the best checkpoint is {state}: {checkpoint}; bring it back and continue with resume=true, or use the last weights instead: "
            f"resume=true training.best_metric=last{' training.early_stopping=null' if stops_early else ''}"
        )


def write_digests(checkpoint: Path, digests: dict[str, str]) -> None:
    """Write down what the trained tensors of an adapter were when a checkpoint was saved."""
    write_text(checkpoint / WEIGHTS, json.dumps(digests))


def require_digests(checkpoint: Path, now: dict[str, str]) -> None:
    """Raise ``ContractError`` unless the tensors in memory are those with which a checkpoint was saved.

    PEFT leaves a tensor that it does not find in a file as it is, with a warning at most.
    """
    file = checkpoint / WEIGHTS
    if not file.is_file():
        return
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, digest in saved.items() if now.get(name) != digest]
    if other:
        raise ContractError(
            f"{checkpoint} was loaded, but {count(len(other), 'tensor')} of {len(saved)} in memory are not those that were saved:\n"
            f"{listing(other)}\nUse the versions of peft and transformers with which the run was started, or start a new run."
        )


def _crc(file: Path) -> int:
    found = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            found = zlib.crc32(chunk, found)
    return found
