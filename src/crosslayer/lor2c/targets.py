"""Finding the blocks of a model and the linears within them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from .layer import LoR2CLayer

QUERY_NAMES = ("q_proj", "query", "query_proj", "q", "q_lin", "q_a_proj", "to_q")
VALUE_NAMES = ("v_proj", "value", "value_proj", "v", "v_lin", "kv_a_proj_with_mqa", "to_v")
FUSED_NAMES = ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv")  # one linear for all three
LISTED = 12  # names that a message lists at most


def lists_of_blocks(model: nn.Module) -> dict[str, int]:
    """{name of a list of blocks: its length}: outermost lists of modules that each hold a linear, without being one."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or "lor2c" in name.split("."):
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if all(why_no_block(child) is None and _has_linear(child) for child in module):
            found[name] = len(module)
    return found


def default_lists(model: nn.Module) -> list[str]:
    """The longest list of blocks; in an encoder-decoder, the longest of each half.

    Where that is a list of stages whose widths differ, such as Swin's: the list of blocks within each of them.
    """
    lists = lists_of_blocks(model)
    if not lists:
        return []
    halves = [lists]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = {name: n for name, n in lists.items() if "decoder" in name.split(".")}
        halves = [{name: n for name, n in lists.items() if name not in decoder}, decoder]
    longest = [max(half, key=half.__getitem__) for half in halves if half]
    return [name for outer in longest for name in _within_stages(model, outer)]


def _within_stages(model: nn.Module, name: str) -> list[str]:
    stages: Any = model.get_submodule(name)
    lists = [lists_of_blocks(stage) for stage in stages]
    if len({width_read(stage) for stage in stages}) == 1 or not all(lists):
        return [name]
    return [f"{name}.{number}.{max(own, key=own.__getitem__)}" for number, own in enumerate(lists)]


def width_read(block: nn.Module) -> int | None:
    """d of what the first linear of a block, or else its first norm, reads; None where it has neither."""
    for module in block.modules():
        features = linear_features(module)
        if features is not None:
            return features[0]
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 1:
            return len(weight)
    return None


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear of any make, quantised or already adapted; None for anything else."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return in_features, out_features
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        in_features, out_features = (getattr(module, name, None) for name in names)
        if isinstance(in_features, int) and isinstance(out_features, int) and not isinstance(module, LoR2CLayer):
            return in_features, out_features
    return None


def inject_targets(block: nn.Module, name: str, wanted: list[str] | None) -> dict[str, tuple[int, int]]:
    """{path within the block: (in, out) features} of the linears that an injection puts pairs on.

    By default the first query and the first value of the block (self-attention comes before cross-attention), or the
    one projection that computes them together: at rank r / 2 either costs as many parameters as the block's module.
    Raises ConfigError where the block has none of the wanted ones.
    """
    linears = {
        path.replace(".base_layer", ""): features
        for path, module in block.named_modules()
        if "lor2c" not in path.split(".") and (features := linear_features(module)) is not None
    }
    if wanted is not None:
        paths = [path for path in linears if any(path == w or path.endswith(f".{w}") for w in wanted)]
        missing = [w for w in wanted if not any(path == w or path.endswith(f".{w}") for path in linears)]
    else:
        paths, missing = [], ["query and value"]
        for names in ((QUERY_NAMES, VALUE_NAMES), (FUSED_NAMES,)):
            firsts = [next((path for path in linears if path.rpartition(".")[2] in own), None) for own in names]
            if all(path is not None for path in firsts):
                paths, missing = [path for path in firsts if path is not None], []
                break
    if missing:
        raise ConfigError(
            f"{name} has no linear {', '.join(missing)} to inject into. Its linears: "
            f"{', '.join(islice(linears, LISTED)) or 'none'}; choose some with inject_target_modules."
        )
    return {path: linears[path] for path in paths}


def _has_linear(module: nn.Module) -> bool:
    return any(linear_features(child) is not None for child in module.modules())


def why_no_block(module: nn.Module) -> str | None:
    """Why a module is none that a residual goes around, in words; None for one that may be."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return f"is a container of {len(module)} modules, not one of them"
    if isinstance(module, BaseTunerLayer) or linear_features(module) is not None:
        return f"is a {type(module).__name__}, a linear"
    if isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or not any(
        True for _ in module.parameters()
    ):
        return f"is a {type(module).__name__}, no block"
    return None


def out_widths(blocks: dict[str, nn.Module]) -> Iterator[tuple[str, int]]:
    """(name, out features of its last linear) of every block that has a linear."""
    for name, block in blocks.items():
        features = [linear for module in block.modules() if (linear := linear_features(module)) is not None]
        if features:
            yield name, features[-1][1]
