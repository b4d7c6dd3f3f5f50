"""Whether and from where a run can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, count
from peftkit.finetune.processes import on_main, process_count, process_index
from peftkit.finetune.run_folder import DATA, RESULT, RunFolder


def find_checkpoint(
    folder: RunFolder, facts: dict[str, Any], say: Callable[[str], None]
) -> tuple[Path | None, list[str]]:
    """The checkpoint from which a run goes on, ``None`` if it starts again, and notes on others.

    Args:
        folder: The folder of the run.
        facts: What the run's ``data.json`` would have if it started now.
        say: Is called with each line of progress.

    Raises:
        ContractError: The run is finished, its rows, teacher or number of processes are other ones, or this process does not see the checkpoint.
    """
    found, notes = on_main(lambda: _find(folder, facts, say))
    if found is not None and not found.is_dir():
        raise ContractError(
            f"process {process_index()} (from 0) does not find {found}, which the first process resumes from; use a folder for out that "
            "all machines share"
        )
    return found, notes


def _find(
    folder: RunFolder, facts: dict[str, Any], say: Callable[[str], None]
) -> tuple[Path | None, list[str]]:
    known = folder.read_json(DATA) or {}
    if known.get("fingerprint") not in (None, facts["fingerprint"]):
        raise ContractError(
            f"resume=true, but the training rows are not those with which the run in {folder.path} was started; bring the data "
            "back, or start a new run in another folder"
        )
    if known.get("teacher", facts.get("teacher")) != facts.get("teacher"):
        raise ContractError(
            f"resume=true, but the weights of distill.teacher are not those with which the run in {folder.path} was started; bring the "
            "teacher back, or start a new run in another folder"
        )
    before = known.get("processes", 1)
    if before != process_count():
        raise ContractError(
            f"resume=true with {count(process_count(), 'process', 'processes')}, but the run in {folder.path} was started with "
            f"{before}, so its batches had another size; use the same number"
        )
    found, broken = folder.last_whole_checkpoint()
    notes = []
    if broken:
        notes.append(f"ignored incomplete or damaged checkpoints: {', '.join(broken)}")
        say(f"ignoring incomplete or damaged checkpoints: {', '.join(broken)}")
    result = folder.read_json(RESULT) or {}
    if result.get("status") == "finished":
        raise ContractError(
            f"resume=true, but the run in {folder.path} is finished; start a new run in another folder"
        )
    say(f"resuming from {found.name}" if found else "no whole checkpoint; starting again")
    return found, notes
