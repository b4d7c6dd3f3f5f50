"""The suite: each method in each library, and how steps scale. Points run in turn, each in its own process, and bad ones are refused.

    python benchmarks/run.py methods                       # every method and library on smollm2
    python benchmarks/run.py methods --model ID --methods lora,full --html out/lora-or-full.html
    python benchmarks/run.py methods --case experts --methods lora --length 512 --rank 8 --checkpointing
    python benchmarks/run.py methods --methods lora,full --target 3.0    # and how long each trains to a held-out loss of 3
    python benchmarks/run.py scaling --axis length --axis rank
    python benchmarks/run.py methods --resume              # go on with an interrupted suite
    python benchmarks/run.py methods --isa avx2            # the same machine without AVX-512

Rows are appended to ``benchmarks/results/<device>.jsonl``. A refused row keeps its reason instead of a speed (``verdict.py``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import suite_tables
from cases import CASES
from instructions import ISA
from points import (
    AXES,
    BASE,
    LIBRARIES,
    SMOKE_AXES,
    SMOKE_BASE,
    SMOKE_LIBRARIES,
    SMOKE_METHODS,
    Point,
    of_axes,
    of_methods,
)
from suite_bases import BATCH, LENGTH, check_model
from suite_runner import SMOKE, Suite


class Methods:
    """Every method in every library."""

    HELP = "a step of each method, in peftkit, PEFT and other libraries"
    SUITE = "methods"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""
        model = parser.add_mutually_exclusive_group()
        model.add_argument("--case", choices=CASES, default="smollm2", help="the model")
        model.add_argument("--model", help="another model: a folder or an id of the hub")
        parser.add_argument(
            *("--methods", "--method"),
            type=_methods,
            action="extend",
            metavar="METHOD,...",
            help=f"some of {', '.join(LIBRARIES)}; default: all",
        )
        parser.add_argument("--batch", type=int, help="sequences per step; default: the case's")
        parser.add_argument("--length", type=int, help="tokens per sequence; default: the case's")
        parser.add_argument("--rank", type=int, default=16)
        parser.add_argument("--checkpointing", action="store_true")
        add_run_options(parser)

    @classmethod
    def run(cls, arguments: argparse.Namespace) -> None:
        """Measure, store the rows and print them."""
        libraries = arguments.library
        if arguments.smoke:
            chosen = arguments.methods or list(SMOKE_METHODS)
            libraries = libraries or list(SMOKE_LIBRARIES)
            points = of_methods(SMOKE_BASE, chosen, libraries)
        else:
            points = of_methods(_base(arguments), arguments.methods or list(LIBRARIES), libraries)
        rows = Suite(cls.SUITE, arguments).measure(points)
        _report(rows, arguments, suite_tables.tables(rows))


class Scaling:
    """LoRA in PEFT and peftkit along one axis at a time."""

    HELP = "how a step scales with length, batch, rank, number of adapters and model size"
    SUITE = "scaling"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""
        parser.add_argument("--axis", choices=AXES, action="append", help="default: all")
        parser.add_argument("--plot", type=Path, help="folder for one plot of each axis (SVG)")
        add_run_options(parser)

    @classmethod
    def run(cls, arguments: argparse.Namespace) -> None:
        """Measure, store the rows, print and plot them."""
        axes = SMOKE_AXES if arguments.smoke else AXES
        missing = [axis for axis in arguments.axis or () if axis not in axes]
        if missing:
            raise SystemExit(f"--axis {missing[0]}: --smoke has the axes {', '.join(axes)} alone")
        chosen = {axis: axes[axis] for axis in arguments.axis or axes}
        base = SMOKE_BASE if arguments.smoke else BASE
        # the point where the axes meet is measured once
        points = list(dict.fromkeys(point for _, point in of_axes(base, chosen)))
        if arguments.library:
            points = [p for p in points if p.library in ("PEFT", *arguments.library)]
        rows = Suite(cls.SUITE, arguments).measure(points)
        _report(rows, arguments, suite_tables.along_axes(rows, chosen, base))
        if arguments.plot:
            import scaling_plots

            scaling_plots.write(rows, chosen, base, arguments.plot)


def _base(arguments: argparse.Namespace) -> Point:
    """The sizes that the options name, with the defaults of the case."""
    if arguments.model is not None:
        check_model(arguments.model)
        name, batch, length = arguments.model, BATCH, LENGTH
    else:
        case = CASES[arguments.case]
        name, batch, length = case.name, case.batch_size, case.sequence_length
    return Point(
        *(name, "lora", "PEFT"),
        batch=batch if arguments.batch is None else arguments.batch,
        length=length if arguments.length is None else arguments.length,
        rank=arguments.rank,
        checkpointing=arguments.checkpointing,
    )


def _methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in LIBRARIES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(LIBRARIES)}")
    return names


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``Suite`` reads."""
    add = parser.add_argument
    add("--library", action="append", help="default: all; references always run")
    add("--gpu", action="store_true", help="measure the GPU, in 16 bits; default: the CPU")
    add("--rounds", type=int, default=2, help="runs of each point, in turn")
    add("--warm", type=int, default=3, help="steps before the timed ones")
    add("--steps", type=int, default=6, help="timed steps per run")
    add("--isa", choices=ISA, default="native", help="instruction sets")
    smoke = ", ".join(f"--{option} {value}" for option, value in SMOKE.items())
    add("--smoke", action="store_true", help=f"few points of tiny sizes, with {smoke}")
    add("--json", action="store_true", help="print rows as JSON, not as tables")
    add("--html", type=Path, metavar="FILE", help="also write the rows as one page")
    add("--resume", action="store_true", help="keep finished rows of this commit")
    add("--retries", type=int, default=2, help="how often a run on a busy machine is repeated")
    add("--wait", type=float, default=60, help="seconds to wait for a quiet machine before a run")
    add("--limit", type=float, default=3600, help="seconds that one process may take")
    add("--target", type=float, metavar="LOSS", help="also train each point to this held-out loss")
    add("--target-steps", type=int, default=300, help="give up after so many steps")
    add(
        "--python",
        action="append",
        default=[],
        metavar="LIBRARY=PATH",
        help="the interpreter of a library that has its own environment",
    )
    add("--out", type=Path, help="the file of the rows; default: by the device")


def _report(rows: list[dict[str, Any]], arguments: argparse.Namespace, tables: str) -> None:
    print("\n".join(map(json.dumps, rows)) if arguments.json else tables)
    if arguments.html is not None:
        import results_page

        results_page.write(rows, arguments.html)
