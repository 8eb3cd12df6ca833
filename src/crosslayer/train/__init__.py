"""Pre-training and fine-tuning: recipes, the Trainers that run them, and the reports they leave."""

from .methods import AdapterConfig, attach
from .parameter_groups import ParameterGroups, optimizer_groups
from .recipe import (
    FinetuneRecipe,
    Recipe,
    build_finetune_recipe,
    build_recipe,
    load_finetune_recipe,
    load_recipe,
)

__all__ = [
    "AdapterConfig",
    "FinetuneRecipe",
    "ParameterGroups",
    "Recipe",
    "attach",
    "build_finetune_recipe",
    "build_recipe",
    "load_finetune_recipe",
    "load_recipe",
    "optimizer_groups",
]
