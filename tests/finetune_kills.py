"""Run ``peftkit train`` in processes that are killed at chosen moments.

``Runs`` starts this file as a script. The script imports everything once, and forks a child for each run.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PLACES = ("weights", "optimizer", "mark", "marked", "removal")
"""Moments of a checkpoint: its weights or its optimiser are half written, it is not marked yet, it is marked and no other one has been
removed, another one is partly removed."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_POLL_SECONDS = 0.005


class Runs:
    """Starts runs, one after the other.

    Attributes:
        seconds: How long the last run took.
        events: How often the last run, if it was not killed, changed something in its folder.
    """

    def __init__(self, folder: Path):
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    def train(
        self,
        *arguments: Any,
        out: Path,
        place: str | None = None,
        event: int | None = None,
        seconds: float | None = None,
    ) -> int:
        """Run ``peftkit train``, with ``resume=true`` if there is a run; returns the exit status, or minus the signal.

        Args:
            arguments: Of the command, without ``out``.
            out: The folder of the run.
            place: Kill the run at the first such moment.
            event: Kill the run before it changes something in its folder for the so-many-th time.
            seconds: Kill the run after this time.
        """
        resume = ["resume=true"] if (out / "recipe.yaml").exists() else []
        asked = {
            "arguments": ["train", *map(str, arguments), f"out={out}", *resume],
            "out": str(out),
            "log": str(self.log),
            "place": place,
            "event": event,
            "seconds": seconds,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        self.seconds, self.events = found["seconds"], found["events"]
        return found["status"]

    def close(self) -> None:
        self.process.communicate()  # closes its input, so it ends


def _serve() -> None:
    import torch

    for name in ("cli.main", "finetune.setup", "finetune.trainer", "finetune.training"):
        importlib.import_module(f"peftkit.{name}")
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.monotonic()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _run(asked, write)
        os.close(write)
        status = _wait(child, began, asked["seconds"])
        with os.fdopen(read) as stream:
            events = int(stream.read() or 0)
        done = {"status": status, "seconds": time.monotonic() - began, "events": events}
        print(json.dumps(done), flush=True)


def _wait(child: int, began: float, seconds: float | None) -> int:
    while True:
        ended, status = os.waitpid(child, 0 if seconds is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if seconds is not None and time.monotonic() - began > seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(_POLL_SECONDS)


def _run(asked: dict[str, Any], write: int) -> None:
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    counts = _count_events(asked["out"], asked["event"])
    if asked["place"] is not None:
        _plant(asked["place"])
    code = 70
    try:
        from peftkit.cli.main import app

        app(asked["arguments"], prog_name="peftkit")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(write, str(counts["events"]).encode())
        os._exit(code)


def _die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count_events(out: str, last: int | None) -> dict[str, int]:
    """Count what Python changes in the folder, and die before the change number ``last``."""
    counts = {"events": 0}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & _WRITES
        else:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        # shutil.rmtree names files relative to an open folder.
        relative = event in ("os.remove", "os.rmdir") and args[1] != -1
        if not changes or not (relative or str(args[0]).startswith(out)):
            return
        counts["events"] += 1
        if counts["events"] == last:
            _die()

    sys.addaudithook(hook)
    return counts


def _plant(place: str) -> None:
    import torch

    import peftkit.finetune.checkpoints as checkpoints
    import peftkit.finetune.saving as saving
    from peftkit.finetune.trainer import RecipeTrainer

    def halve(file: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)
        _die()

    save, save_weights, remove_one = torch.save, RecipeTrainer._save, checkpoints.remove

    def half_optimizer(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(value, file, *args, **kwargs)
        halve(Path(file))

    def half_weights(self: Any, output_dir: Any = None, state_dict: Any = None) -> None:
        save_weights(self, output_dir, state_dict)
        halve(next(Path(output_dir).glob("*.safetensors")))

    def part_of_removal(checkpoint: Path) -> None:
        if (checkpoint / checkpoints.WHOLE).exists():
            (checkpoint / checkpoints.WHOLE).unlink()
            (checkpoint / "optimizer.pt").unlink()
            _die()
        remove_one(checkpoint)

    match place:
        case "weights":
            RecipeTrainer._save = half_weights  # type: ignore[method-assign]
        case "optimizer":
            torch.save = half_optimizer
        case "mark":
            saving.mark_whole = _die
        case "marked":
            saving.remove_old = _die
        case "removal":
            checkpoints.remove = part_of_removal


if __name__ == "__main__":
    _serve()
