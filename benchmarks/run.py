"""The benchmark suite.

    python benchmarks/run.py training                      # fine-tuning steps: time and memory, against PEFT and full fine-tuning
    python benchmarks/run.py training --case smollm2 --providers peftkit peft full floor --rounds 3
    python benchmarks/run.py parts                         # the gain of each part of peftkit
    python benchmarks/run.py methods                       # a step of each method, in peftkit, PEFT and other libraries
    python benchmarks/run.py scaling                       # how steps scale with length, batch, rank, adapters and model size
    python benchmarks/run.py quantised                     # a step on NF4 and 8-bit bases, against PEFT with bitsandbytes
    python benchmarks/run.py learning                      # the accuracy that each method reaches on two real models
    python benchmarks/run.py tuning                        # loss after tuning on quantised bases, and what merges keep of it
    python benchmarks/run.py strategies                    # quality, time and memory of strategies beside simpler rows, on real models
    python benchmarks/run.py sweep                         # one sweep of four adapters against four runs
    python benchmarks/run.py prefix                        # attention time with a prefix
    python benchmarks/run.py kernels                       # each operation against eager torch and torch.compile
    python benchmarks/run.py plan                          # planned memory against that of real steps
    python benchmarks/run.py overhead                      # import, wrapping and Python time per layer
    python benchmarks/run.py host                          # Python time and launches of each op on a GPU, without a GPU
    python benchmarks/run.py metamath FOLDER EXPERIMENT    # PEFT's own comparison of methods with peftkit's layers
    python benchmarks/run.py gpu                           # everything about one GPU, in at most six minutes
    python benchmarks/run.py page                          # one HTML page with every result
    python benchmarks/run.py docs                          # write the tables of the documents again, without measuring

A speed is printed only if the results agree with those of the rival. Results are saved in ``benchmarks/results/`` as JSON. With
``--update-docs`` the tables in ``docs/benchmarks.md`` and ``README.md``, and the figures of ``peftkit doctor``, are written again too.
"""

from __future__ import annotations

import argparse
import sys

import documents
import gpu
import host
import learning
import memory_plans
import metamath
import operations
import overhead
import prefix
import quantised
import results_page
import steps
import strategies
import suite
import sweeps
import tuning

BENCHMARKS = {
    "training": steps.Training,
    "parts": steps.Parts,
    "methods": suite.Methods,
    "scaling": suite.Scaling,
    "quantised": quantised,
    "learning": learning,
    "tuning": tuning,
    "strategies": strategies,
    "sweep": sweeps,
    "prefix": prefix,
    "kernels": operations,
    "overhead": overhead,
    "plan": memory_plans,
    "host": host,
    "metamath": metamath,
    "gpu": gpu,
    "page": results_page,
    "docs": documents,
}
"""Benchmarks by their name on the command line: modules or classes with ``HELP``, ``add_options(parser)`` and ``run(arguments)``."""


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.HELP)
        benchmark.add_options(command)
        if name in documents.TABLES:
            command.add_argument("--update-docs", action="store_true", help=documents.HELP)
    arguments = parser.parse_args(sys.argv[1:] or ["training"])
    BENCHMARKS[arguments.benchmark].run(arguments)
    if getattr(arguments, "update_docs", False):
        documents.run(arguments)


if __name__ == "__main__":
    main()
