"""The `crosslayer` command: its verbs, and what it does with errors.

Exit code 0 on success, 2 for wrong input, 1 for a failure while running, 75 for a run that was asked to stop and saved
a checkpoint; errors are one line on standard error.
CROSSLAYER_DEBUG=1 shows the traceback of an error.
"""

import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from ..errors import CrossLayerError, RunInterruptedError, RunStoppedError, TrainingError
from . import (
    analyze,
    bench,
    compare,
    evaluate,
    export,
    finetune,
    generate,
    interrupt,
    plan,
    prepare,
    pretrain,
    recipes,
    serve,
)
from .common import help_without_arguments
from .ranges import checked

NAME = "crosslayer"
app = typer.Typer(name=NAME, rich_markup_mode=None, pretty_exceptions_enable=False)
# What the parser raises for wrong options and verbs; typer exports it only as the base of this one.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
ANY_FIELD = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=ANY_FIELD)(checked(pretrain.pretrain))
app.command(context_settings=ANY_FIELD)(checked(prepare.prepare))
app.command(context_settings=ANY_FIELD)(checked(finetune.finetune))
app.command(context_settings=ANY_FIELD)(checked(compare.compare))
app.command()(checked(evaluate.evaluate))
app.command()(checked(generate.generate))
app.command(context_settings=ANY_FIELD)(checked(serve.serve))
app.command()(checked(export.export))
app.command()(checked(plan.plan))
app.command()(checked(analyze.analyze))
app.add_typer(bench.bench, name="bench")
app.command()(checked(recipes.recipes))


def show_version(asked: bool) -> None:
    """Of `--version`: prints it and ends."""
    if asked:
        from .. import __version__

        print(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def crosslayer(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Train Transformers through low-rank structure across layers."""
    help_without_arguments(context)


def run() -> None:
    """The verb that the arguments name. Ends the process."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False, prog_name=NAME)
        if interrupt.was_interrupted():  # typer makes an exit code of it
            interrupt.end()
        interrupt.leave(code if isinstance(code, int) else 0)
    except USAGE_ERROR as error:
        fail(error.format_message(), 2, error)  # type: ignore[attr-defined]
    except RunStoppedError as error:
        interrupt.end(str(error), interrupt.STOPPED)
    except RunInterruptedError as error:
        interrupt.end(str(error))
    except CrossLayerError as error:
        fail(str(error), 1 if isinstance(error, TrainingError) else 2, error)
    except (KeyboardInterrupt, typer.Abort):
        interrupt.end()
    except Exception as error:
        fail(f"{type(error).__name__}: {error} (CROSSLAYER_DEBUG=1 shows where)", 1, error)


def fail(message: str, code: int, error: BaseException | None = None) -> NoReturn:
    """One line on standard error, then exit."""
    if interrupt.was_interrupted():  # what a library made of it
        interrupt.end()
    if error is not None and os.environ.get("CROSSLAYER_DEBUG"):
        raise error
    print(f"{NAME}: error: {' '.join(message.split())}", file=sys.stderr)
    interrupt.leave(code)
