"""``peftkit``: the command line application.

Each command imports what it needs when it runs, so that ``peftkit --help`` is fast.
"""

import logging
from typing import Annotated

import typer

from peftkit import __version__
from peftkit.cli.check import check
from peftkit.cli.compare import compare
from peftkit.cli.convert import convert
from peftkit.cli.doctor import doctor
from peftkit.cli.errors import OneLineErrors
from peftkit.cli.export import export
from peftkit.cli.finetune import evaluate, generate, train
from peftkit.cli.merging import merge
from peftkit.cli.plan import plan
from peftkit.cli.prune import prune
from peftkit.cli.sweep import sweep

app = typer.Typer(
    name="peftkit",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("check")(check)
app.command("compare")(compare)
app.command("convert")(convert)
app.command("doctor")(doctor)
app.command("eval")(evaluate)
app.command("export")(export)
app.command("generate")(generate)
app.command("merge")(merge)
app.command("plan")(plan)
app.command("prune")(prune)
app.command("sweep")(sweep)
app.command("train")(train)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peftkit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Fine-tune pretrained Hugging Face models on one machine."""
    # bitsandbytes asks for a kernel of its own when it is imported, which no layer here calls
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
