"""The `crosslayer` command: its verbs, and what it does with errors.

Exit code 0 on success, 2 for wrong input, 1 for a failure while running; errors are one line on standard error.
CROSSLAYER_DEBUG=1 shows the traceback of an error.
"""

import io
import os
import sys

import typer

from ..errors import CrossLayerError, TrainingError
from . import analyze, bench, compare, evaluate, finetune, generate, plan, pretrain
from .ranges import checked

app = typer.Typer(
    name="crosslayer",
    help="Train Transformers through low-rank structure across layers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# What the parser raises for wrong options and verbs; typer exports it only as the base of this one.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
ANY_FIELD = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=ANY_FIELD)(checked(pretrain.pretrain))
app.command(context_settings=ANY_FIELD)(checked(finetune.finetune))
app.command(context_settings=ANY_FIELD)(checked(compare.compare))
app.command()(checked(evaluate.evaluate))
app.command()(checked(generate.generate))
app.command()(checked(plan.plan))
app.command()(checked(analyze.analyze))
app.add_typer(bench.bench, name="bench")


def main() -> None:
    """Entry point. Ends the process."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except USAGE_ERROR as error:
        fail(error.format_message(), 2, error)  # type: ignore[attr-defined]
    except CrossLayerError as error:
        fail(str(error), 1 if isinstance(error, TrainingError) else 2, error)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 1)
    except Exception as error:
        fail(f"{type(error).__name__}: {error} (CROSSLAYER_DEBUG=1 shows where)", 1, error)


def fail(message: str, code: int, error: BaseException | None = None) -> None:
    """One line on standard error, then exit."""
    if error is not None and os.environ.get("CROSSLAYER_DEBUG"):
        raise error
    print(f"crosslayer: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
