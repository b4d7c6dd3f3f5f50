"""The developers' commands, which run from the repository and are not part of the package.

    python tools/run.py demo --no-compare                  # make demo ARGS=--no-compare
    python tools/run.py kernels check --op lora_linear     # make kernels ARGS="check --op lora_linear"

Run this file by its path: Python then finds the folders next to it, and not the folder ``kernels/`` of the repository, which would
hide Hugging Face's package of that name.
"""

import typer

from demo.cli import demo
from lab.cli import kernels
from peftkit.cli.errors import OneLineErrors


class _Errors(OneLineErrors):
    packages = (*OneLineErrors.packages, "demo", "lab")


app = typer.Typer(
    cls=_Errors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Commands for developers of peftkit.",
)
app.command("demo")(demo)
app.add_typer(kernels, name="kernels")

if __name__ == "__main__":
    app()
