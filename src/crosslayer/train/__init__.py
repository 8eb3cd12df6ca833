"""Pre-training: recipes, the Trainer that runs them, and the reports they leave."""

from .parameter_groups import ParameterGroups, optimizer_groups
from .recipe import Recipe, build_recipe, load_recipe

__all__ = ["ParameterGroups", "Recipe", "build_recipe", "load_recipe", "optimizer_groups"]
