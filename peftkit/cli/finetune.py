"""``peftkit train``, ``peftkit generate`` and ``peftkit eval``: a run from a recipe, and what can be done with it."""

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

_JSON = typer.Option("--json", help="Print one JSON document.")
_QUIET = typer.Option("--quiet", help="Print only errors and the result.")


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe, a YAML file.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE ...",
            help="Values that replace the recipe's, such as training.lr=1e-4 strategy.r=8 resume=true.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="TASK",
            help="Print a commented recipe for a task and exit; with a RECIPE, write it to this file.",
        ),
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
    quiet: Annotated[bool, _QUIET] = False,
) -> None:
    """Train a model as a recipe says.

    Exits with status 0 if the run is finished, 1 if the recipe, the data or the training has a fault, and 3 if it was stopped with a
    checkpoint.
    """
    if init is not None:
        _init(init, recipe)
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe, or --init TASK to write one")
    calm()
    from peftkit.finetune import train as run
    from peftkit.finetune.processes import is_main

    say = (lambda line: None) if quiet or as_json else typer.echo
    with ExitStack() as stack:
        stack.enter_context(without_known_warnings())
        watch = None
        if say is typer.echo and sys.stdout.isatty() and is_main():
            from peftkit.cli.progress import TrainingDisplay

            display = stack.enter_context(TrainingDisplay())
            say, watch = display.say, display.show
        result = run(recipe, *(overrides or []), say=say, watch=watch)
    if is_main():
        _print(result, as_json)
    raise typer.Exit(1 if result.problems else 3 if result.status == "stopped" else 0)


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
    else:
        for name, value in result.metrics.items():
            typer.echo(f"{name}: {value:.4g}")
        typer.echo(f"{result.status}: {result.weights or result.folder}")
    for problem in result.problems:
        typer.echo(f"error: {problem}", err=True)


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT ...", help="What to answer.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Largest number of tokens of an answer.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="0 takes the most probable token each time."),
    ] = 0.0,
    images: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="An image that the prompts are about."),
    ] = None,
    audio: Annotated[
        list[str] | None,
        typer.Option("--audio", metavar="FILE", help="A recording, instead of prompts."),
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Answer prompts with the model of a finished run, or write down recordings."""
    calm()
    from peftkit.finetune import generate as write

    with without_known_warnings():
        answers = write(
            run,
            prompts or (),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            images=images or (),
            audio=audio or (),
        )
    if as_json:
        kind = "audio" if audio else "prompt"
        asked = audio or prompts or ()
        rows = [{kind: one, "answer": a} for one, a in zip(asked, answers, strict=True)]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for answer in answers:
        typer.echo(answer)


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows to evaluate on. Default: data.eval of the recipe."),
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Evaluate the model of a finished run."""
    calm()
    from peftkit.finetune import evaluate as measure

    with without_known_warnings():
        found = measure(run, data)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        typer.echo(f"{name}: {value:.4g}")


def _init(task: str, file: Path | None) -> None:
    from peftkit.errors import ContractError
    from peftkit.finetune.template import template

    text = template(task)
    if file is None:
        typer.echo(text, nl=False)
        return
    if file.exists():
        raise ContractError(f"{file} exists; name another file")
    file.write_text(text, encoding="utf-8")
    typer.echo(f"written to {file}")


def calm() -> None:
    """Without the libraries' own progress bars and reports: what matters is in the lines of the run."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)


@contextlib.contextmanager
def without_known_warnings() -> Iterator[None]:
    """Without two warnings that say nothing to a user of the command: a name that PEFT uses, and a base model without a config file."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated"
        )
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield
