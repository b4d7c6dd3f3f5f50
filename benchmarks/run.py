"""The benchmark suite.

    python benchmarks/run.py training                      # fine-tuning steps: time and memory, against PEFT and full
    python benchmarks/run.py training --case smollm2 --providers peftkit peft full floor --rounds 3
    python benchmarks/run.py parts                         # which part of peftkit gains what
    python benchmarks/run.py methods                       # a step of DoRA, bottlenecks and prefixes beside LoRA
    python benchmarks/run.py learning                      # what each method learns on two real models
    python benchmarks/run.py prefix                        # what a prefix costs its attention
    python benchmarks/run.py kernels                       # each operation against eager torch and torch.compile
    python benchmarks/run.py overhead                      # import, wrapping and Python time a layer

A speed is printed only where the results agree with those of the rival. Results go to ``benchmarks/results/`` as JSON and, with
``--update-readme``, as a table into the README between its marks.
"""

from __future__ import annotations

import argparse
import sys

import learning
import operations
import overhead
import prefix
import steps

BENCHMARKS = {
    "training": steps.Training,
    "parts": steps.Parts,
    "methods": steps.Methods,
    "learning": learning,
    "prefix": prefix,
    "kernels": operations,
    "overhead": overhead,
}
"""By name on the command line: modules or classes with ``HELP``, ``add_options(parser)`` and ``run(arguments)``."""


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        benchmark.add_options(commands.add_parser(name, help=benchmark.HELP))
    arguments = parser.parse_args(sys.argv[1:] or ["training"])
    BENCHMARKS[arguments.benchmark].run(arguments)


if __name__ == "__main__":
    main()
