"""What several verbs need: overrides, a quiet start, a checkpoint, tables."""

import json
import logging
import os
import sys
import warnings
from typing import Any

import typer

from ..errors import ConfigError
from ..loading import load_checkpoint

# transformers and PEFT import them wherever they are installed; they name kernels that nobody needs here, and torch's
# registry of structures what torchao will have to change.
for _chatty in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_chatty).setLevel(logging.ERROR)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """["--learning_rate", "1e-3", "--bf16=true", "--use_cpu"] -> {field: value}. Raises ConfigError."""
    from ..train.values import parse_value

    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"{option!r} is not an option; write --field value")
        name, equals, value = option[2:].partition("=")
        if not equals:
            has_value = bool(rest) and not rest[0].startswith("--")
            value = rest.pop(0) if has_value else "true"
        overrides[name.replace("-", "_")] = parse_value(value)
    return overrides


def quiet_libraries() -> None:
    """Keep libraries' own chatter out of the output; warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import transformers

    datasets.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # PEFT still asks by the name that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    logging.getLogger("crosslayer").setLevel(logging.INFO)
    logging.basicConfig(level=logging.WARNING, format="crosslayer: %(message)s", stream=sys.stderr)


def help_without_arguments(context: typer.Context) -> None:
    """A group of verbs without a verb: its help, and exit code 0."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def print_summary(title: str, rows: list[tuple[str, str]], frame: bool = True) -> None:
    """A table of (what, value) under a title."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    if not frame:
        table.box, table.padding = None, (0, 2)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_json(content: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(content, indent=2))


def print_grid(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, columns aligned."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("| " + " | ".join([first.strip().ljust(widths[0]), *rest]) + " |")


__all__ = [
    "help_without_arguments",
    "load_checkpoint",
    "parse_overrides",
    "print_grid",
    "print_json",
    "print_summary",
    "quiet_libraries",
]
