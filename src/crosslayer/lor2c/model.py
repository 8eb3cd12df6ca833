"""LoR2C as a PEFT tuner: which blocks it goes around, how adapters come and go, how they are saved.

Joining two modules is called fuse here; "merge" is PEFT's word for folding an adapter into weights, which is impossible
for a residual around a whole block, and raises.
"""

import re
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..private import excluded_module
from .blocks import AdaptedBlocks
from .config import LoR2CConfig
from .layer import MERGE_REASON, LoR2CLayer, Stack
from .structure import Criterion, Structure, Survivor
from .targets import LISTED, default_lists, inject_targets, lists_of_blocks, out_widths, why_no_block, width_read


class LoR2CModel(BaseTuner):
    """Puts a LoR2C adapter on a model; made by `peft.get_peft_model(model, LoR2CConfig(...))`.

    Structure operations (`fuse`, `inject`) and questions (`structure`, `num_adapter_parameters`) are reachable from
    the `PeftModel` too. They and more exist for models without a tuner object as `AdaptedBlocks(model, adapter_name)`.
    """

    prefix = "lor2c_"
    tuner_layer_cls = LoR2CLayer
    target_module_mapping: dict = {}

    # Which blocks

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            lists = default_lists(self.model)
            if not lists:
                raise ConfigError(
                    f"{type(self.model).__name__} has no list of blocks to go around by default: name the blocks in "
                    "target_modules."
                )
            peft_config.target_modules = "|".join(rf"{re.escape(name)}\.\d+" for name in lists)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config, key: str):
        if not _matches(key, peft_config.target_modules):
            return False
        if peft_config.exclude_modules and _matches(key, peft_config.exclude_modules):
            return excluded_module()()
        if peft_config.layers_to_transform is None:
            return True
        stack, _, number = key.rpartition(".")
        wanted = peft_config.layers_to_transform
        if not number.isdigit() or int(number) not in ([wanted] if isinstance(wanted, int) else wanted):
            return False
        pattern = peft_config.layers_pattern
        patterns = [pattern] if isinstance(pattern, str) else pattern
        return not patterns or any(stack == name or stack.endswith(f".{name}") for name in patterns)

    def _check_new_adapter_config(self, config: LoR2CConfig) -> None:
        """All that can be wrong with the blocks, before the first one is touched."""
        super()._check_new_adapter_config(config)
        self._prepare_adapter_config(config, {})
        keys = {name: module for name, module in self.model.named_modules() if name and ".lor2c" not in f".{name}"}
        matches = {name: self._check_target_module_exists(config, name) for name in keys}
        found = {name: keys[name] for name, match in matches.items() if match and match is not False}
        found = {name: module for name, module in found.items() if not isinstance(matches[name], excluded_module())}
        if not found:
            candidates = [f"{name}.0 ... {name}.{n - 1}" for name, n in lists_of_blocks(self.model).items()]
            raise ConfigError(
                f"target_modules={_shown(config.target_modules)} with layers_to_transform="
                f"{config.layers_to_transform!r} matches no block. Lists of blocks in {type(self.model).__name__}: "
                f"{', '.join(candidates) or 'none'}."
            )
        unsuitable = {name: why for name, module in found.items() if (why := why_no_block(module))}
        if unsuitable:
            shown = "; ".join(f"{name} {why}" for name, why in islice(unsuitable.items(), LISTED))
            raise ConfigError(f"target_modules must name whole blocks. {shown}.")
        self._check_widths(found, config)
        if config.injectable:
            for name, block in found.items():
                inject_targets(block, name, config.inject_target_modules)

    def _check_widths(self, blocks: dict[str, nn.Module], config: LoR2CConfig) -> None:
        widths = {name: self._width(block, name, config) for name, block in blocks.items()}
        if not hasattr(self.model, "config"):  # no library behind it that keeps its residual stream one width
            uneven = {name: (widths[name], out) for name, out in out_widths(blocks) if out != widths[name]}
            if uneven:
                shown = ", ".join(f"{name} ({a} -> {b})" for name, (a, b) in islice(uneven.items(), LISTED))
                raise ConfigError(
                    f"A residual needs input and output of one width, which these blocks do not have: {shown}. Leave "
                    "them out with exclude_modules."
                )
        if config.group_starts is not None:
            _check_groups(config.group_starts, list(widths.values()), [_rank(config, name) for name in blocks])

    def _width(self, block: nn.Module, name: str, config: LoR2CConfig) -> int:
        """d of the residual stream at a block."""
        width = config.hidden_size or width_read(block)
        if width is None:
            raise ConfigError(f"The width of {name} cannot be read off its modules: give hidden_size=...")
        return width

    # Adapters come and go

    def inject_adapter(
        self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ):
        """As in PEFT; then the layers of each list of blocks get a `Stack`, which reads their structure."""
        if state_dict is not None:  # PEFT takes what comes before ".lor2c_" for the block's name
            state_dict = {key.replace(".lor2c.lor2c_", ".lor2c_"): value for key, value in state_dict.items()}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        stacks: dict[str, dict[int, LoR2CLayer]] = {}
        for layer in model.modules():
            if isinstance(layer, LoR2CLayer):
                parent, _, number = layer.name.rpartition(".")
                layer.number = int(number) if number.isdigit() else 0
                stacks.setdefault(parent if number.isdigit() else layer.name, {})[layer.number] = layer
        for layers in stacks.values():
            stack = Stack(layers)
            for layer in layers.values():
                layer.stack = stack
            stack.read()

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        layer = target if isinstance(target, LoR2CLayer) else getattr(target, "lor2c", None)
        if layer is None:
            layer = LoR2CLayer(target, current_key, self._width(target, current_key, peft_config))
            target.lor2c = layer
        r = _rank(peft_config, current_key)
        alpha_key = get_pattern_key(peft_config.alpha_pattern.keys(), current_key)
        alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lor2c_alpha)
        layer.update_layer(
            adapter_name,
            r,
            peft_config.scaling(alpha, r),
            peft_config.lor2c_dropout,
            peft_config.init_weights,
            self._shared_A(adapter_name, peft_config.group_starts),
            peft_config.reads,
        )
        if peft_config.injectable:
            targets = inject_targets(target, current_key, peft_config.inject_target_modules)
            inject_r = peft_config.inject_r or max(1, r // 2)
            inject_alpha = alpha if peft_config.inject_alpha is None else peft_config.inject_alpha
            scaling = peft_config.scaling(inject_alpha, inject_r)
            layer.create_pairs(adapter_name, targets, inject_r, scaling, peft_config.init_weights)
        if adapter_name not in self.active_adapters:
            for container in layer.adapter_layer_names:
                adapters = getattr(layer, container)
                if adapter_name in adapters:
                    adapters[adapter_name].requires_grad_(False)

    def _shared_A(self, adapter_name: str, begins_at: list[int] | None) -> nn.Module | None:
        """The A of the block before, for the next block to get an adapter; None where its own is new."""
        if begins_at is None:
            return None
        layers = [module for module in self.model.modules() if isinstance(module, LoR2CLayer)]
        before = [layer.lor2c_A[adapter_name] for layer in layers if adapter_name in layer.lor2c_A]
        return None if len(before) in begins_at else before[-1]

    def _check_merge_allowed(self):
        raise NotImplementedError(MERGE_REASON)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._check_merge_allowed()
        for layer in [module for module in self.model.modules() if isinstance(module, LoR2CLayer)]:
            layer.detach()
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    # Mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """`adapter_names=[...]`, one per row of the batch, "__base__" for none: evaluation only, as with LoRA."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, LoR2CLayer)]
        unknown = set(adapter_names) - {"__base__"} - {name for layer in layers for name in layer.lor2c_state}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        encoder = self.model.get_encoder() if getattr(self.get_config(), "is_encoder_decoder", False) else None
        in_encoder = {id(module) for module in encoder.modules()} if encoder is not None else set()
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        handles = []
        for module in self.modules():
            names = list(adapter_names) if id(module) in in_encoder else repeated
            if isinstance(module, LoR2CLayer):
                module.rows = {
                    name: torch.tensor([row for row, other in enumerate(names) if other == name])
                    for name in sorted(set(names) - {"__base__"})
                }
            elif isinstance(module, AuxiliaryTrainingWrapper):
                handles.append(module.register_forward_pre_hook(_PassNames(names), with_kwargs=True))
        try:
            yield
        finally:
            for layer in layers:
                layer.rows = None
            for handle in handles:
                handle.remove()

    def get_config(self) -> Any:
        """The configuration of the model below; None where it has none."""
        return getattr(self.model, "config", None)

    # Saved state

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in ("lor2c_inject_A", "lor2c_inject_B"):
            key = key.replace(f".{container}.{adapter_name}.", f".{container}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        config.structure = AdaptedBlocks(model, adapter_name).describe()
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {key: value for key, value in selected.items() if ".lor2c." in f".{key}"}  # not another method's

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_fit(model, remapped)
        return remapped

    # Structure

    def adapted_blocks(self, adapter_name: str | None = None) -> AdaptedBlocks:
        """The blocks of one adapter, by default the active one."""
        return AdaptedBlocks(self.model, adapter_name or self.active_adapters[0])

    def structure(self, adapter_name: str | None = None) -> Structure:
        """Modules and injected blocks of one adapter."""
        return self.adapted_blocks(adapter_name).structure

    def fuse(
        self,
        lower: int,
        upper: int,
        survivor: Survivor = "first",
        criterion: Criterion = "sfs",
        adapter_name: str | None = None,
    ) -> Structure:
        """Joins the modules over two neighbouring blocks; see `AdaptedBlocks.fuse`."""
        return self.adapted_blocks(adapter_name).fuse(lower, upper, survivor, criterion)

    def inject(self, block: int, adapter_name: str | None = None) -> Structure:
        """Replaces a block's module by low-rank pairs on its query and value; see `AdaptedBlocks.inject`."""
        return self.adapted_blocks(adapter_name).inject(block)

    def num_adapter_parameters(self, adapter_name: str | None = None) -> int:
        """Parameters in use under the present structure. `print_trainable_parameters` also counts idle ones."""
        return self.adapted_blocks(adapter_name).num_parameters()


class _PassNames:
    """Pre-hook that hands `adapter_names` to a module trained whole."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "adapter_names": self.names}


def _matches(key: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, key) is not None
    return any(key == target or key.endswith(f".{target}") for target in targets or ())


def _rank(config: LoR2CConfig, key: str) -> int:
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)


def _check_groups(begins_at: list[int], widths: list[int], ranks: list[int]) -> None:
    """Raises where groups of blocks that share an A are not there, or their blocks differ in what A is made of."""
    if begins_at[-1] >= len(widths):
        raise ConfigError(
            f"share_A={begins_at}: there is no block {begins_at[-1]}, the adapter goes around blocks 0 to "
            f"{len(widths) - 1}."
        )
    for first, end in pairwise([*begins_at, len(widths)]):
        of_group = [sorted(set(values[first:end])) for values in (widths, ranks)]
        if any(len(values) > 1 for values in of_group):
            blocks = "all blocks" if begins_at == [0] else f"the blocks of a group, here {first} to {end - 1}"
            raise ConfigError(
                f"share_A needs one width and one rank for {blocks}, not widths {of_group[0]} and ranks "
                f"{of_group[1]}. Choose the blocks with target_modules."
            )


def _shown(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets))


def _check_fit(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Raises where saved LoR2C weights belong to another base model or to other groups of blocks, before one of them is
    loaded."""
    own = {key: value for key, value in model.state_dict(keep_vars=True).items() if ".lor2c." in key}
    problems = []
    copies: dict[int, tuple[str, torch.Tensor]] = {}  # an A that blocks share is saved with each of them
    for key, value in state_dict.items():
        if ".lor2c." not in key:
            continue
        here = own.get(key, own.get(key.removeprefix("base_model.model.")))
        if here is None:
            problems.append(f"{key} does not exist here")
        elif here.shape != value.shape:
            problems.append(f"{key} is {list(value.shape)} in the adapter and {list(here.shape)} here")
        else:
            other, first = copies.setdefault(id(here), (key, value))
            if not torch.equal(first, value):
                raise CheckpointError(
                    f"{other} and {key} differ in the adapter, but its configuration has these blocks share one A: set "
                    "share_A in adapter_config.json to what it was when the adapter was saved."
                )
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"The adapter was made for another base model: {'; '.join(problems[:4])}{more}.")
