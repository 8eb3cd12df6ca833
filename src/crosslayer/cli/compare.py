"""`crosslayer compare`: several methods on the same data, tokens, shape and tuning effort."""

from collections.abc import Mapping
from typing import Annotated, Any

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
    sizes: Annotated[
        str | None,
        typer.Option(
            help="HIDDENxLAYERS, such as 64x6,96x9,128x13, smallest first: a comparison at each, in the recipe's "
            "proportions, and laws fitted to them."
        ),
    ] = None,
    tokens_per_parameter: Annotated[
        float | None,
        spelled(
            "tokens_per_parameter",
            "Steps so that every run reads so many tokens per parameter of the dense model, embeddings and head aside "
            "[default: max_steps].",
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            help="Runs of each method with its best learning rates; with --sizes also one for each: 2,1,2 "
            "[default: 3].",
            show_default=False,
        ),
    ] = "3",
    tuning_runs: Annotated[
        str,
        spelled(
            "tuning_runs",
            "Most runs of the search for a method's learning rates; with --sizes also one for each. 0: the recipe's "
            "rates, or those of the size before [default: 9].",
            show_default=False,
        ),
    ] = "9",
    tuning_steps: Annotated[
        float | None,
        spelled("tuning_steps", "Steps of such a run; below 1 a share of max_steps [default: a quarter]."),
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
        spelled("output_dir", "Folder of the results [default: runs/compare_NAME; with --sizes runs/ladder_NAME]."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; methods, seeds and sizes may be added.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away the comparison in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train several methods on the same data, tokens and shape, each with its own tuned learning rates.

    CR-Net has the recipe's rank; cola and low_rank take the rank that gives them as many parameters. galore and apollo
    train the dense model (packages galore-torch, apollo-torch). Fields of the recipe are overridden as in pretrain:
    --data texts.jsonl.gz, --max_steps 400. Writes compare.json, compare.md and compare.png; with --sizes a folder of
    them for each size, and ladder.json, ladder.md and ladder.png.
    """
    import sys

    from .common import parse_overrides, print_json, quiet_libraries

    overrides = parse_overrides(context.args)
    check_budget(overrides, sizes=sizes, tokens_per_parameter=tokens_per_parameter)
    quiet_libraries()
    from .. import compare as comparing
    from ..train import load_recipe

    ladder = comparing.parse_sizes(sizes) if sizes is not None else ()
    of_sizes = {
        name: comparing.for_each(name, [int(number) for number in text.split(",")], ladder)
        for name, text in (("seeds", seeds), ("tuning_runs", tuning_runs))
    }
    parsed = load_recipe(recipe, overrides)
    options = [
        comparing.Options(
            methods=tuple(dict.fromkeys(name for name in methods.split(",") if name)),
            seeds=of_seeds,
            tuning_runs=of_runs,
            tuning_steps=tuning_steps,
            validation_blocks=validation_blocks,
            workers=workers,
        )
        for of_seeds, of_runs in zip(*of_sizes.values(), strict=True)
    ]
    folder = output_dir or f"runs/{'ladder' if ladder else 'compare'}_{parsed.name}"
    interrupt.goes_on(folder, resume=resume)
    going: dict[str, Any] = {
        "resume": resume,
        "overwrite": overwrite,
        "tell": lambda line: print(f"crosslayer: {line}", file=sys.stderr, flush=True),
        "initialize_worker": quiet_libraries,
    }
    content: Mapping[str, Any]
    if ladder:
        assert tokens_per_parameter is not None  # check_budget
        of_ladder = comparing.LadderOptions(
            sizes=ladder, tokens_per_parameter=tokens_per_parameter, comparisons=tuple(options)
        )
        content = found = comparing.compare_sizes(parsed, of_ladder, folder, **going)
        table = comparing.markdown_ladder(found)
    else:
        if tokens_per_parameter is not None:
            parsed = comparing.with_budget(parsed, tokens_per_parameter)
        content = compared = comparing.compare(parsed, options[0], folder, **going)
        table = comparing.markdown_table(compared)
    if as_json:
        print_json(content)
        return
    print(table)
    name = "ladder" if ladder else "compare"
    print(f"\n{folder}/{name}.json, {name}.md, {name}.png")


def check_budget(overrides: dict[str, Any], *, sizes: str | None, tokens_per_parameter: float | None) -> None:
    """Raises ConfigError for steps that are said twice, or not at all."""
    from ..errors import ConfigError
    from ..train.values import plain

    if sizes is not None and tokens_per_parameter is None:
        raise ConfigError("--sizes has no budget; give --tokens_per_parameter, such as 20")
    if tokens_per_parameter is None:
        return
    given = {name.rpartition(".")[2]: plain(value) for name, value in overrides.items()}
    for name in ("max_steps", "num_train_epochs"):
        if name in given:
            raise ConfigError(f"--tokens_per_parameter and --{name} exclude each other; give one of them")
    for name in ("warmup_steps", "logging_steps"):
        value = given.get(name)
        if isinstance(value, int | float) and value >= 1:
            raise ConfigError(
                f"--{name} {value:g} is no number of steps for --tokens_per_parameter; give a share such as 0.1"
            )
