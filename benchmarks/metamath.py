"""PEFT's own comparison of methods, MetaMathQA, with peftkit's layers: its code, data and experiments, and its JSON.

    git clone https://github.com/huggingface/peft
    python benchmarks/run.py metamath peft/method_comparison/MetaMathQA experiments/lora/llama-3.2-3B-rank32
    python benchmarks/run.py metamath peft/method_comparison/MetaMathQA experiments/lora/llama-3.2-3B-rank32 --library PEFT

Nothing in the folder is changed. The comparison makes its model as always; then ``peftkit.accelerate`` fuses it, so both libraries start from the
same weights. Its script needs a GPU, the hub, and the packages of its ``requirements.txt``.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import HERE, RESULTS

HELP = "PEFT's own comparison of methods (MetaMathQA) with peftkit's layers"
LIBRARIES = ("peftkit", "PEFT")
_FILES = ("run.py", "utils.py", "data.py", "default_training_params.json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("folder", type=Path, help="method_comparison/MetaMathQA of a clone of PEFT")
    parser.add_argument("experiment", help="a folder in it, such as experiments/lora/NAME")
    parser.add_argument("--library", choices=LIBRARIES, default="peftkit")
    parser.add_argument(
        "--out", type=Path, help="the folder of the JSON file; default: results/metamath/LIBRARY"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the experiment in a process of its own, whose modules are those of the folder.

    Raises:
        SystemExit: The folder is not that of the comparison, the experiment does not exist, or the comparison fails.
    """
    folder = arguments.folder.resolve()
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"{arguments.folder} has no {missing[0]}; name the folder method_comparison/MetaMathQA of a clone of "
            "https://github.com/huggingface/peft"
        )
    if not (folder / arguments.experiment).is_dir():
        raise SystemExit(f"{arguments.experiment} is no folder in {arguments.folder}")
    out = (arguments.out or RESULTS / "metamath" / arguments.library).resolve()
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "metamath.py"), arguments.experiment.rstrip("/")]
    done = subprocess.run([*command, arguments.library, str(out)], cwd=folder, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the comparison has failed with status {done.returncode}")


def main(experiment: str, library: str, out: str) -> None:
    """Run the comparison in the working folder."""
    # its modules may have names that ours have, too
    sys.path[0] = str(Path.cwd())
    sys.modules.pop("report")
    import utils  # pyright: ignore[reportMissingImports]

    if library == "peftkit":
        fuse(utils, is_adapter=(Path(experiment) / "adapter_config.json").is_file())
    for name in ("RESULT_PATH", "RESULT_PATH_TEST", "RESULT_PATH_CANCELLED"):
        setattr(utils, name, out)
    sys.argv = ["run.py", "--verbose", "--clean", experiment]
    runpy.run_path("run.py", run_name="__main__")


def fuse(utils: Any, is_adapter: bool) -> None:
    """Let the comparison's ``utils`` fuse each model that it makes, before it compiles it.

    Args:
        utils: The module.
        is_adapter: Whether its models get an adapter. Otherwise all of their weights are trained.
    """
    import peftkit

    name = "get_peft_model" if is_adapter else "get_base_model"
    make = getattr(utils, name)
    setattr(utils, name, lambda *args, **kwargs: peftkit.accelerate(make(*args, **kwargs)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(*sys.argv[1:])
