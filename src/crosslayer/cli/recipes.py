"""`crosslayer recipes`: the recipes that come with the package."""

from typing import Annotated, Any

import typer


def complete_recipe(incomplete: str) -> list[str]:
    """Names for the shell's completion."""
    from ..recipes import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def recipe_option(text: str) -> Any:
    """The option --recipe of a verb, completed by the shell."""
    return typer.Option(help=text, autocompletion=complete_recipe)


def recipes(
    show: Annotated[
        str | None, typer.Option(help="Print the recipe of this name.", autocompletion=complete_recipe)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes that come with crosslayer, or print one.

    A name goes after --recipe as it stands. To start a recipe of your own: crosslayer recipes --show NAME > mine.yaml
    """
    import yaml

    from ..recipes import find_recipe, shipped_recipes
    from .common import print_json

    if show is not None:
        text = find_recipe(show).path.read_text(encoding="utf-8")
        if as_json:
            print_json(yaml.safe_load(text))
        else:
            print(text, end="")
        return
    found = shipped_recipes().values()
    if as_json:
        print_json([{"name": recipe.name, "verb": recipe.verb, "summary": recipe.summary} for recipe in found])
        return
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:{width}}  {recipe.summary}")
