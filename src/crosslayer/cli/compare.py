"""`crosslayer compare`: several methods on the same data, tokens, shape and tuning effort."""

from typing import Annotated

import typer

from . import interrupt
from .options import spelled
from .recipes import recipe_option


def compare(
    context: typer.Context,
    recipe: Annotated[str, recipe_option("Of a CR-Net: a name that `crosslayer recipes` lists, or a YAML file.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: dense, crnet, crnet_silu, cola, low_rank, galore, apollo; with an optimizer as in "
            "crnet+muon: adamw, muon, spectron."
        ),
    ] = "dense,crnet,cola,low_rank",
    seeds: Annotated[int, typer.Option(help="Runs of each method with its best learning rates.")] = 3,
    tuning_runs: Annotated[
        int,
        spelled(
            "tuning_runs",
            "Most runs of the search for a method's learning rates; 0: the recipe's.",
        ),
    ] = 9,
    tuning_steps: Annotated[
        int | None,
        spelled("tuning_steps", "Steps of such a run [default: a quarter of max_steps]."),
    ] = None,
    validation_blocks: Annotated[
        int,
        spelled("validation_blocks", "Blocks behind the curves and the search."),
    ] = 128,
    workers: Annotated[
        int | None, typer.Option(help="Runs beside one another [default: torch's threads; on CUDA one].")
    ] = None,
    output_dir: Annotated[
        str | None,
        spelled("output_dir", "Folder of the comparison [default: runs/compare_NAME]."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; methods and seeds may be added.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away the comparison in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train several methods on the same data, tokens and shape, each with its own tuned learning rates.

    CR-Net has the recipe's rank; cola and low_rank take the rank that gives them as many parameters. galore and apollo
    train the dense model (packages galore-torch, apollo-torch). Fields of the recipe are overridden as in pretrain:
    --data texts.jsonl.gz, --max_steps 400. Writes compare.json, compare.md and compare.png.
    """
    import sys

    from .common import parse_overrides, print_json, quiet_libraries

    overrides = parse_overrides(context.args)
    quiet_libraries()
    from .. import compare as comparing
    from ..train import load_recipe

    parsed = load_recipe(recipe, overrides)
    options = comparing.Options(
        methods=tuple(dict.fromkeys(name for name in methods.split(",") if name)),
        seeds=seeds,
        tuning_runs=tuning_runs,
        tuning_steps=tuning_steps,
        validation_blocks=validation_blocks,
        workers=workers,
    )
    folder = output_dir or f"runs/compare_{parsed.name}"
    interrupt.goes_on(folder, resume=resume)
    content = comparing.compare(
        parsed,
        options,
        folder,
        resume=resume,
        overwrite=overwrite,
        tell=lambda line: print(f"crosslayer: {line}", file=sys.stderr, flush=True),
        initialize_worker=quiet_libraries,
    )
    if as_json:
        print_json(content)
        return
    print(comparing.markdown_table(content))
    print(f"\n{folder}/compare.json, compare.md, compare.png")
