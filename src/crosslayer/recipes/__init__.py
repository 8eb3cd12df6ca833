"""The recipes that come with the package, by name: `crnet_5m_text`, `families/crnet_gpt2_1m_text`.

A name is the path below this folder without `.yaml`. Whatever is no name is the path of a file of one's own.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from ..errors import ConfigError, nearest

FOLDER = Path(__file__).parent
SUFFIX = ".yaml"


@dataclass(frozen=True)
class ShippedRecipe:
    """One recipe of the package."""

    name: str
    path: Path

    @property
    def verb(self) -> str:
        """The verb that runs it."""
        return "finetune" if self.name.startswith("finetune/") else "pretrain"

    @property
    def summary(self) -> str:
        """The first sentence of its description."""
        import yaml

        description = yaml.safe_load(self.path.read_text(encoding="utf-8")).get("description", "")
        return description.split(". ")[0].strip().removesuffix(".")


@cache
def shipped_recipes() -> dict[str, ShippedRecipe]:
    """Every recipe of the package by its name, those of no group first."""
    paths = sorted(FOLDER.rglob(f"*{SUFFIX}"), key=lambda path: (len(path.relative_to(FOLDER).parts), str(path)))
    names = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in paths if path.suffix == SUFFIX}
    return {name: ShippedRecipe(name, path) for name, path in names.items()}


def recipe_path(recipe: str | Path) -> Path:
    """The file of a recipe given by its name or by its path; a Path is one already.

    A name means the recipe of the package, whatever lies in the current folder (./NAME is a file there). Raises
    ConfigError, with the nearest name, for what is neither a name nor there.
    """
    if isinstance(recipe, Path):
        return recipe
    found = shipped_recipes().get(recipe)
    if found is not None:
        return found.path
    if os.path.lexists(recipe):
        return Path(recipe)
    near = nearest_recipe(recipe)
    hint = f"; the nearest that comes with crosslayer is {near}" if near else ""
    raise ConfigError(
        f"recipe {recipe!r} does not exist{hint}; give a name that `crosslayer recipes` lists, or a YAML file"
    )


def find_recipe(name: str) -> ShippedRecipe:
    """The recipe of the package with this name. Raises ConfigError with the nearest name."""
    found = shipped_recipes().get(name)
    if found is None:
        near = nearest_recipe(name)
        hint = f"; the nearest is {near}" if near else ""
        raise ConfigError(f"{name!r} is no recipe of crosslayer{hint}; `crosslayer recipes` lists them")
    return found


def nearest_recipe(text: str) -> str | None:
    """The name most like a text, which may be a path with folders and suffix; None where none is like it."""
    asked = PurePosixPath(text.replace("\\", "/"))
    last = asked.name.removesuffix(asked.suffix if asked.suffix in (SUFFIX, ".yml") else "")
    by_last = {name.rpartition("/")[2]: name for name in shipped_recipes()}
    near = nearest(last, by_last)
    return None if near is None else by_last[near]


__all__ = ["ShippedRecipe", "find_recipe", "nearest_recipe", "recipe_path", "shipped_recipes"]
