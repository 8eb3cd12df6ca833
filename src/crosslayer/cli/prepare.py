"""`crosslayer prepare`: tokenise the data of a recipe once, into a folder that travels."""

from typing import Annotated

import typer

from .recipes import recipe_option


def prepare(
    context: typer.Context,
    recipe: Annotated[str, recipe_option("A name that `crosslayer recipes` lists, or a YAML file.")],
    output: Annotated[str, typer.Option(help="New folder for the prepared data.")],
    workers: Annotated[int, typer.Option(help="Processes that tokenise.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sizes as JSON.")] = False,
) -> None:
    """Tokenise the data of RECIPE once, for --data of pretrain and compare on any machine.

    Fields of the recipe are overridden as in pretrain: --data ./texts, --block_size 1024. Interrupted, it goes on when
    the same command runs again.
    """
    from dataclasses import asdict
    from pathlib import Path

    from .common import parse_overrides, print_json, print_summary, quiet_libraries

    overrides = parse_overrides(context.args)
    quiet_libraries()
    from ..data import prepare_folder
    from ..data.files import printable
    from ..train import load_recipe

    statistics = prepare_folder(load_recipe(recipe, overrides).data, Path(output).expanduser(), workers)
    if as_json:
        print_json(asdict(statistics))
        return
    train, validation = statistics.train, statistics.validation
    rows = [
        ("to train", f"{train.documents:,} documents, {train.tokens:,} tokens in {train.blocks:,} blocks"),
        ("to validate", f"{validation.documents:,} documents, {validation.tokens:,} tokens"),
        ("vocabulary", f"{statistics.vocab_size:,}"),
    ]
    if statistics.skipped:
        rows.append(("skipped", f"{statistics.skipped:,} files or lines that could not be read"))
    print_summary(printable(output), rows, frame=False)
