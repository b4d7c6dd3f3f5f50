"""The suite: each method in each library, and how steps scale. Points run in turn, each in its own process, and bad ones are refused.

    python benchmarks/run.py methods                       # every method and library on smollm2
    python benchmarks/run.py methods --case experts --method lora --length 512 --rank 8 --checkpointing
    python benchmarks/run.py scaling --axis length --axis rank
    python benchmarks/run.py methods --resume              # go on with an interrupted suite
    python benchmarks/run.py methods --isa avx2            # the same machine without AVX-512

Rows are appended to ``benchmarks/results/<device>.jsonl``. A refused row keeps its reason instead of a speed (``verdict.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import libraries
import quiet
import records
import suite_tables
import verdict
from cases import CASES
from points import (
    AXES,
    BASE,
    LIBRARIES,
    SMOKE_AXES,
    SMOKE_BASE,
    Point,
    of_axes,
    of_methods,
    reference_of,
)
from report import HERE


class Methods:
    """Every method in every library."""

    HELP = "a step of each method, in peftkit, PEFT and other libraries"
    SUITE = "methods"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""
        parser.add_argument("--case", choices=CASES, default="smollm2", help="the model")
        parser.add_argument("--method", choices=LIBRARIES, action="append", help="default: all")
        parser.add_argument("--batch", type=int, help="sequences per step; default: the case's")
        parser.add_argument("--length", type=int, help="tokens per sequence; default: the case's")
        parser.add_argument("--rank", type=int, default=16)
        parser.add_argument("--checkpointing", action="store_true")
        _add_run_options(parser)

    @classmethod
    def run(cls, arguments: argparse.Namespace) -> None:
        """Measure, store the rows and print them."""
        case = CASES[arguments.case]
        base = Point(
            *(case.name, "lora", "PEFT"),
            batch=arguments.batch or case.batch_size,
            length=arguments.length or case.sequence_length,
            rank=arguments.rank,
            checkpointing=arguments.checkpointing,
        )
        base = SMOKE_BASE if arguments.smoke else base
        points = of_methods(base, arguments.method or list(LIBRARIES), arguments.library)
        if arguments.smoke:  # compiling takes most of the time
            points = [p for p in points if p.library != "PEFT compiled" or p.method == "lora"]
        _report(Suite(cls.SUITE, arguments).measure(points), arguments)


class Scaling:
    """LoRA in PEFT and peftkit along one axis at a time."""

    HELP = "how a step scales with length, batch, rank, number of adapters and model size"
    SUITE = "scaling"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""
        parser.add_argument("--axis", choices=AXES, action="append", help="default: all")
        parser.add_argument("--plot", type=Path, help="folder for one plot of each axis (SVG)")
        _add_run_options(parser)

    @classmethod
    def run(cls, arguments: argparse.Namespace) -> None:
        """Measure, store the rows, print and plot them."""
        axes = SMOKE_AXES if arguments.smoke else AXES
        chosen = {axis: axes[axis] for axis in arguments.axis or axes if axis in axes}
        base = SMOKE_BASE if arguments.smoke else BASE
        # the point where the axes meet is measured once
        points = list(dict.fromkeys(point for _, point in of_axes(base, chosen)))
        rows = Suite(cls.SUITE, arguments).measure(points)
        _report(rows, arguments)
        if arguments.plot:
            import scaling_plots

            scaling_plots.write(rows, chosen, base, arguments.plot)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--library", action="append", help="default: all that the method has; references always run"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each point, in turn")
    parser.add_argument("--warm", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per run")
    parser.add_argument("--isa", choices=records.ISA, default="native", help="instruction sets")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, not as tables")
    parser.add_argument("--resume", action="store_true", help="keep finished rows of this commit")
    parser.add_argument(
        "--retries",
        type=int,
        default=2,
        help="how often a run on a busy machine is repeated",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="LIBRARY=PATH",
        help="the interpreter of a library that has its own environment",
    )
    parser.add_argument("--out", type=Path, help="the file of the rows; default: by the device")


def _report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    print("\n".join(map(json.dumps, rows)) if arguments.json else suite_tables.tables(rows))


class Suite:
    """One run of a command.

    Args:
        name: The suite's name in the rows.
        arguments: The options of ``_add_run_options``.
    """

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.name, self.arguments = name, arguments
        if arguments.smoke:
            arguments.rounds, arguments.warm, arguments.steps = 1, 2, 2
        self.interpreters = dict(_interpreter(text) for text in arguments.python)
        self.variables = os.environ | records.ISA[arguments.isa]
        self.environment = self._child([sys.executable, str(HERE / "suite.py")])
        self.path = arguments.out or records.path_of(self.environment["device"])
        self.best_spin = min(quiet.spin() for _ in range(3))

    def measure(self, points: Iterable[Point]) -> list[dict[str, Any]]:
        """Measure the points, the libraries of a method in turn; the rows of a method are stored as soon as its runs are done."""
        kept = {}
        if self.arguments.resume:
            found = records.finished(records.read(self.path), self.environment)
            kept = {records.key(row): row for row in found}
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for _, group in groupby(points, lambda point: (point.method, point.sizes)):
                rows += self._group(list(group), kept, Path(folder))
        return rows

    def _group(
        self, points: list[Point], kept: dict[Any, dict[str, Any]], folder: Path
    ) -> list[dict[str, Any]]:
        rows = {point: kept.get(records.key(self._row(point))) for point in points}
        missing = [point for point, row in rows.items() if row is None]
        reasons = {point: absence(point.library, self._python(point)) for point in missing}
        present = [point for point in missing if reasons[point] is None]
        runs: dict[Point, list[dict[str, Any]]] = {point: [] for point in present}
        for number in range(self.arguments.rounds):
            for point in present:
                print(
                    f"round {number + 1} of {self.arguments.rounds}: {point.provider}",
                    *(f"{name} {getattr(point, name)}" for name in ("case", *list(AXES)[:4])),
                    sep=", ",
                    file=sys.stderr,
                    flush=True,
                )
                runs[point].append(self._run(point, base_folder(point.case, folder)))
        for point in points:  # a method's reference is before the others
            if rows[point] is None:
                reason = reasons[point]
                row = self._row(point) | {"status": "absent", "reason": reason}
                if reason is None:
                    row |= self._judged(point, runs[point], rows)
                records.append(self.path, row)
                rows[point] = row
        return [row for row in rows.values() if row is not None]

    def _row(self, point: Point) -> dict[str, Any]:
        options = {"isa": self.arguments.isa, "smoke": self.arguments.smoke}
        return {
            "suite": self.name,
            **point.to_dict(),
            **options,
            **dict.fromkeys(_MEASURED),
            "environment": self.environment,
        }

    def _judged(
        self, point: Point, runs: list[dict[str, Any]], rows: dict[Point, dict[str, Any] | None]
    ) -> dict[str, Any]:
        """The figures of a row, or the reason for which they are refused."""
        failed = next((run["failed"] for run in runs if "failed" in run), None)
        if failed is not None:
            return {"status": "refused", "reason": f"it failed: {failed}"}
        reference = replace(point, library=reference_of(point.method, point.library))
        expected = runs[0] if reference == point else rows.get(reference)
        found = {"trainable": runs[0]["trainable"], "losses": runs[0]["losses"]}
        if expected is None or not expected.get("losses"):
            reason = f"its reference, {reference.provider}, was not measured"
            return {**found, "status": "refused", "reason": reason}
        reason = verdict.refusal(
            runs,
            expected["losses"],
            expected["trainable"],
            self.best_spin,
            verdict.ROUNDED_TOLERANCE if runs[0]["is_rounded"] else verdict.LOSS_TOLERANCE,
        )
        if reason is not None:
            return {**found, "status": "refused", "reason": reason}
        return {**found, "status": "ok", "reason": None, **figures(point, runs)}

    def _run(self, point: Point, base: Path) -> dict[str, Any]:
        """One run of a point; it is repeated if the machine was busy."""
        run: dict[str, Any] = {}
        for _ in range(1 + self.arguments.retries):
            before, watch = quiet.spin(), quiet.Watch()
            try:
                run = self._child([self._python(point), *self._command(point, base)])
            except RuntimeError as error:
                return {"failed": str(error)}
            others = watch.others()
            run |= {"spins": [before, quiet.spin()], "others": others}
            self.best_spin = min(self.best_spin, *run["spins"])
            if verdict.not_quiet(run["spins"], others, self.best_spin) is None:
                break
            time.sleep(1)
        return run

    def _command(self, point: Point, base: Path) -> list[str]:
        names = "method library batch length rank adapters checkpointing".split()
        options = {name: getattr(point, name) for name in names}
        options |= {"warm": self.arguments.warm, "steps": self.arguments.steps}
        return [str(HERE / "suite_row.py"), json.dumps({"folder": str(base), **options})]

    def _python(self, point: Point) -> str:
        return self.interpreters.get(point.library, sys.executable)

    def _child(self, command: list[str]) -> dict[str, Any]:
        """The JSON document that a process prints as its last line; raises ``RuntimeError`` with its last words if it fails."""
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.variables, check=False
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(said[-1][:300])
        return json.loads(done.stdout.splitlines()[-1])


_MEASURED = (
    *("step_seconds", "step_spread", "tokens_per_second", "peak_bytes", "allocator_bytes"),
    *("trainable", "losses"),
)


def figures(point: Point, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of all timed steps, tokens per second, and the highest peaks."""
    seconds = [second for run in runs for second in run["seconds"]]
    median = statistics.median(seconds)
    allocated = [run["allocator_bytes"] for run in runs if run["allocator_bytes"] is not None]
    return {
        "step_seconds": median,
        "step_spread": [min(seconds), max(seconds)],
        "tokens_per_second": point.batch * point.length / median,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "allocator_bytes": max(allocated, default=None),
    }


def absence(library: str, python: str) -> str | None:
    """Why a library cannot be measured, as a sentence, or ``None`` if it can."""
    import torch

    module = libraries.MODULES.get(library)
    if module is None:
        return None
    if not _installed(module, python):
        return f"{module} is not installed"
    if library == "Liger" and not torch.cuda.is_available():
        return "Liger's kernels run on GPUs only"
    return None


def _installed(module: str, python: str) -> bool:
    if python == sys.executable:
        return find_spec(module) is not None
    test = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", test], check=False).returncode == 0


def _interpreter(text: str) -> tuple[str, str]:
    library, _, path = text.partition("=")
    if library not in libraries.MODULES or not path:
        raise SystemExit(
            f"--python {text}: write LIBRARY=PATH with one of {', '.join(libraries.MODULES)}"
        )
    return library, path


def base_folder(case: str, folder: Path) -> Path:
    """The folder with a case's base model, written when it is first needed, so that every library loads the same weights."""
    found = folder / case
    if not found.exists():
        CASES[case].build().save_pretrained(found)
    return found


def main() -> None:
    """Print the environment as JSON; a process of its own sees the limits of ``--isa``."""
    print(json.dumps(records.environment()))


if __name__ == "__main__":
    main()
