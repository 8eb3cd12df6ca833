"""What several verbs need: overrides, a quiet start, loading a checkpoint."""

import difflib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# PEFT imports it wherever it is installed, and it asks for kernels that nobody needs here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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


def load_checkpoint(folder: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """Model and tokenizer of a checkpoint folder, of a PEFT adapter's, or of a run folder that holds one.

    An adapter comes on its base model, with its own tokenizer where it has one. Raises CheckpointError for a folder
    that is missing, is no causal language model or is truncated.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import crosslayer.crnet.registration  # noqa: F401  registers the Auto classes

    from ..analysis.loading import is_adapter, model_folder
    from ..data.fit import check_ids, check_special_tokens

    path = model_folder(folder)
    if not path.is_dir():
        near = difflib.get_close_matches(path.name, _siblings(path), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give the folder that a run wrote"
        raise CheckpointError(f"checkpoint {folder!r} does not exist{hint}")
    if is_adapter(path) and not (path / "config.json").is_file():
        model, tokenizer = _load_adapter(path)
        model_type = model.config.model_type
    elif not (path / "config.json").is_file():
        raise CheckpointError(
            f"{folder!r} is not a checkpoint: it has no config.json and no adapter_config.json; give a run's folder"
        )
    else:
        try:
            model_type = AutoConfig.from_pretrained(path).model_type
            model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:
            raise CheckpointError(f"{folder!r} cannot be loaded: {_first_line(error)}") from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{folder!r} ({model_type}) lacks {len(missing)} weights, the first of them {missing[0]}; it is "
                "truncated or of another model"
            )
    try:
        check_ids(tokenizer, model, repr(folder))
        if model_type.startswith("crnet"):
            check_special_tokens(tokenizer, model.config, repr(folder))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return model.eval(), tokenizer


def _load_adapter(path: Path) -> tuple[Any, Any]:
    """A causal language model with an adapter on it, and its tokenizer. Raises CheckpointError."""
    from transformers import AutoTokenizer

    from ..analysis.loading import load_adapter

    model = load_adapter(path, is_causal=True)
    has_its_own = (path / "tokenizer_config.json").is_file()
    source = str(path) if has_its_own else model.get_base_model().name_or_path
    try:
        return model, AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise CheckpointError(
            f"no tokenizer in {source!r} ({_first_line(error)}); save it beside the adapter"
        ) from error


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
    print(json.dumps(content, indent=2))


def print_grid(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, columns aligned."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("| " + " | ".join([first.strip().ljust(widths[0]), *rest]) + " |")


def _siblings(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
