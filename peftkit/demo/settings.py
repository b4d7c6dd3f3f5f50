"""What a run of the demo is defined by, and the folder that holds its state."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit import __version__
from peftkit.demo.files import DemoError, read_json, recover, write_json

_RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the numbers of a run.

    Attributes:
        seed: Of the generated requests, their order and the adapter's initial weights.
        steps: Optimiser steps.
        batch_size: Requests a step.
        decode_batch_size: Requests decoded at once in the evaluations.
        checkpoint_every: Steps between checkpoints.
        proof_prompts: Held-out requests on which plain PEFT and the merged model must agree.
        compare_steps: Timed steps of each method in the comparison, after two that are not timed.
    """

    seed: int = 0
    train_pairs: int = 3000
    held_out_pairs: int = 300
    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 16
    scheduler: str = "linear"
    lora_r: int = 16
    lora_alpha: int = 32
    decode_batch_size: int = 100
    checkpoint_every: int = 25
    proof_prompts: int = 12
    compare_steps: int = 6


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a run keeps what it has done so far; a phase is done when its file or folder exists."""

    path: Path

    @property
    def base(self) -> Path:
        """The base model as an ordinary model folder."""
        return self.path / "base"

    @property
    def checkpoints(self) -> Path:
        """Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The finished adapter, in PEFT's format."""
        return self.path / "adapter"

    def phase(self, name: str) -> Path:
        """The result of a finished phase: ``base``, ``training``, ``tuned``, ``proof``, or a method of the comparison."""
        return self.path / "phases" / f"{name}.json"


def open_folder(path: Path, settings: Settings, *, resume: bool) -> Folder:
    """Start a run in ``path``, or go on with the one that is there.

    A finished run is replaced by a new one; its base model is kept, being the same for all.

    Raises:
        DemoError: Nothing to resume; or a run of another version or with other settings; or an unfinished run that a new
            one would destroy; or a folder that holds something else.
    """
    folder = Folder(path)
    for replaced in (folder.base, folder.adapter):
        recover(replaced)
    run_file = path / _RUN_FILE
    identity = {"peftkit": __version__, "settings": asdict(settings)}
    if resume:
        if not run_file.is_file():
            raise DemoError(
                f"out={path} holds no run to resume; start one without --resume, or name the folder with --out"
            )
        difference = _difference(read_json(run_file), identity)
        if difference:
            raise DemoError(
                f"the run in out={path} cannot be resumed, it was started with {difference}; "
                "delete the folder, or start a new run in another one with --out"
            )
        return folder
    if path.exists() and not path.is_dir():
        raise DemoError(f"out={path} is a file; name a folder with --out")
    if run_file.is_file():
        if not (path / "report.json").is_file():
            raise DemoError(
                f"out={path} holds an unfinished run; go on with --resume, delete the folder, "
                "or name another one with --out"
            )
        _clear(folder)
    elif path.is_dir() and any(path.iterdir()):
        raise DemoError(
            f"out={path} is not empty and holds no run of the demo; name another folder with --out"
        )
    write_json(run_file, identity)
    return folder


def _difference(theirs: Any, ours: dict[str, Any]) -> str:
    if theirs.get("peftkit") != ours["peftkit"]:
        return f"peftkit {theirs.get('peftkit')}, and this is {ours['peftkit']}"
    old, new = theirs["settings"], ours["settings"]
    changed = [
        f"{k}={old.get(k)} instead of {new.get(k)}"
        for k in {**new, **old}
        if old.get(k) != new.get(k)
    ]
    return ", ".join(changed)


def _clear(folder: Folder) -> None:
    (folder.path / _RUN_FILE).unlink()
    for child in folder.path.iterdir():
        if child == folder.base:
            continue
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()
