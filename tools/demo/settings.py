"""The settings of a run of the demo, and the folder with its state."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from demo.command import demo_command
from demo.files import DemoError, read_json, recover, write_json
from peftkit import __version__

DEFAULT_OUT = Path("out/demo")
DEFAULT_MINUTES = 25.0
"""Minutes that the demo may take; on a machine that would need more it is shorter."""
_RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that determine the results of a run.

    Attributes:
        seed: Seed of the generated requests, their order and the adapter's initial weights.
        train_pairs: Number of training requests.
        held_out_pairs: Number of held-out requests.
        steps: Number of optimiser steps.
        batch_size: Requests per step.
        decode_batch_size: Requests decoded at once in the evaluations.
        checkpoint_every: Steps between checkpoints.
        proof_prompts: Number of held-out requests on which plain PEFT and the merged model must agree.
        compare_steps: Number of timed steps of each method in the comparison, after two steps that are not timed.
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
    decode_batch_size: int = 50
    checkpoint_every: int = 25
    proof_prompts: int = 12
    compare_steps: int = 6


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of a run. A phase is finished if its file or folder exists."""

    path: Path

    @property
    def base(self) -> Path:
        """The folder of the base model."""
        return self.path / "base"

    @property
    def checkpoints(self) -> Path:
        """The folder of Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The finished adapter, in PEFT's format."""
        return self.path / "adapter"

    def phase(self, name: str) -> Path:
        """Return the result file of a phase: ``calibration``, ``base``, ``training``, ``tuned``, ``proof``, or a method."""
        return self.path / "phases" / f"{name}.json"

    def answers(self, name: str) -> Path:
        """Return the file with the answers of an evaluation that is under way."""
        return self.path / "phases" / f"{name}.answers.jsonl"


def stored_settings(folder: Folder) -> Settings:
    """The settings of the run in ``folder``, with what the calibration has made shorter."""
    settings = Settings(**read_json(folder.path / _RUN_FILE)["settings"])
    calibration = folder.phase("calibration")
    if calibration.is_file():
        settings = replace(settings, **read_json(calibration)["shorter"])
    return settings


def resume_options(path: Path) -> list[str]:
    """The options that continue the run in ``path``."""
    return ["--resume"] if path == DEFAULT_OUT else ["--resume", "--out", str(path)]


def open_folder(path: Path, settings: Settings, *, resume: bool) -> Folder:
    """Start a run in ``path``, or continue the run in ``path``.

    A new run replaces a finished run, and keeps its base model, which is the same for all runs.

    Raises:
        DemoError: There is no run to resume, or the run has another version or other settings. Or a new run would destroy an
            unfinished run, or the folder has other content.
    """
    folder = Folder(path)
    for replaced in (folder.base, folder.adapter):
        recover(replaced)
    run_file = path / _RUN_FILE
    identity = {"peftkit": __version__, "settings": asdict(settings)}
    if resume:
        if not run_file.is_file():
            raise DemoError(
                f"out={path} has no run to resume; start a run without --resume, or give the folder of a run with --out"
            )
        difference = _difference(read_json(run_file), identity)
        if difference:
            raise DemoError(
                f"the run in out={path} cannot be resumed, because it was started with {difference}; "
                "delete the folder, or start a new run in another folder with --out"
            )
        return folder
    if path.exists() and not path.is_dir():
        raise DemoError(f"out={path} is a file; give a folder with --out")
    if run_file.is_file():
        if not (path / "report.json").is_file():
            raise DemoError(
                f"out={path} has an unfinished run; continue it ({demo_command(resume_options(path))}), delete the folder, "
                "or give another folder with --out"
            )
        _clear(folder)
    elif path.is_dir() and any(path.iterdir()):
        raise DemoError(
            f"out={path} is not empty and is not a run of the demo; give another folder with --out"
        )
    write_json(run_file, identity)
    return folder


def _difference(theirs: Any, ours: dict[str, Any]) -> str:
    if theirs.get("peftkit") != ours["peftkit"]:
        return f"peftkit {theirs.get('peftkit')}, but {ours['peftkit']} is installed"
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
