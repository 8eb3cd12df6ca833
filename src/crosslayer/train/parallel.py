"""A model that several processes share: the recipe's section `parallel`, by transformers' DistributedConfig.

    processes = replicas x fsdp_size x tensor_parallel          (the last ones lie next to each other: one node)

Without it every process holds the whole model (DistributedDataParallel).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from ..crnet.split_rules import check_split
from ..errors import ConfigError, DataError
from ..private import let_cpus_share_models
from ..ranges import COUNT, out_of_range, where

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.distributed import DistributedConfig

ALL = -1


@dataclass(kw_only=True)
class Parallel:
    """How the processes of a launch share a model (docs/scale.md). Processes beyond both hold replicas."""

    tensor_parallel: int = 1
    """Processes that split every block between them and read the same rows: two to four of one node."""

    fsdp_size: int = 1
    """Processes that weights, gradients and optimizer states are sharded over (FSDP2), each with rows of its own; -1:
    all that `tensor_parallel` leaves."""

    def __post_init__(self) -> None:
        if problems := list(out_of_range(vars(self), RANGES, "parallel")):
            raise ConfigError("; ".join(problems))

    @property
    def is_split(self) -> bool:
        """Whether a process holds less than the whole model."""
        return self.tensor_parallel > 1 or self.fsdp_size != 1

    def distributed_config(self, processes: int) -> "DistributedConfig":
        """transformers' description of the mesh. Raises ConfigError for processes that cannot be divided like that."""
        from transformers.distributed import DistributedConfig

        shards = max(processes // self.tensor_parallel, 1) if self.fsdp_size == ALL else self.fsdp_size
        group = shards * self.tensor_parallel
        if processes % group:
            raise ConfigError(
                f"parallel: tensor_parallel={self.tensor_parallel} and fsdp_size={self.fsdp_size} want a multiple of "
                f"{group} processes, and there {'is' if processes == 1 else 'are'} {processes}; start them with "
                f"torchrun --nproc_per_node {group} -m crosslayer ..., or set both to 1"
            )
        return DistributedConfig(tp_size=self.tensor_parallel, fsdp_size=shards, dp_replicate_size=processes // group)

    def check_frozen(self, processes: int, *, is_frozen: bool) -> "DistributedConfig | None":
        """The mesh for a frozen model under an adapter that every process holds; None where each holds the model too.

        Raises ConfigError for what would need the trained weights in parts.
        """
        self._check_launcher()
        if not self.is_split:
            return None
        if self.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel={self.tensor_parallel} would hand adapters a part of what they adapt; give fsdp_size"
            )
        if not is_frozen:
            raise ConfigError(
                f"fsdp_size={self.fsdp_size} shards a model that is frozen whole, under an adapter: instructions with "
                "lor2c, one of its variants, or lora. Give one of them, or fsdp_size=1"
            )
        return self.distributed_config(processes)

    def readers(self, processes: int) -> int:
        """How many of the processes read rows of their own."""
        return processes // self.tensor_parallel

    def check(self, config: Any, processes: int) -> None:
        """Raises ConfigError for a model, or a number of processes, that this does not fit. Makes no weights."""
        self._check_launcher()
        if not self.is_split:
            return
        self.distributed_config(processes)
        if self.tensor_parallel == 1:
            return
        try:
            for layer_idx in range(config.num_hidden_layers):
                places, attention = config.places(layer_idx), config.attention_shape(layer_idx)
                check_split(type(config).__name__.removesuffix("Config"), places, attention, self.tensor_parallel)
        except ValueError as error:
            raise ConfigError(f"parallel: {error}") from None

    @staticmethod
    def _check_launcher() -> None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                "accelerate's configuration asks for FSDP; leave it out there and give fsdp_size, which shards the "
                "same way and writes checkpoints that any number of processes can go on from"
            )

    def split(self, model: "PreTrainedModel", processes: int, device: torch.device) -> "PreTrainedModel":
        """The model with this process's part of its weights alone; the same model where nothing is to be split.

        The weights are there already, the same in every process.
        """
        if not self.is_split:
            return model
        if device.type == "cpu":
            let_cpus_share_models()
        config = self.distributed_config(processes)
        _, _, mesh = type(model).prepare_distribute_model(config)
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:  # to be tied anew, as where a model is loaded
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model = type(model).maybe_distribute_model(model, config, mesh)
        model.tie_weights()
        # FSDP2 has moved what it shards, block by block.
        return model if config.dp_size > 1 else model.to(device)


RANGES = {
    "tensor_parallel": COUNT,
    "fsdp_size": where("a whole number of at least 1, or -1 for the rest", lambda x: x == ALL or x == int(x) >= 1),
}
assert RANGES.keys() == {field.name for field in fields(Parallel)}


def check_same_data(facts: dict[str, Any], processes: int) -> None:
    """Raises DataError where processes of a launch have read different data. They would train on other rows than they
    say, or wait for one another for ever. Every process has to call it.

    Args:
        facts: what a process knows of the data that it has read.
    """
    if processes == 1:
        return
    from accelerate.utils import gather_object

    every = gather_object([facts])
    different = [rank for rank, others in enumerate(every) if others != every[0]]
    if different:
        raise DataError(
            f"process {different[0]} has read other data than process 0: files changed while the run started, or the "
            "machines do not see the same files; start it again, or `crosslayer prepare` them first"
        )


def is_split(model: Any) -> bool:
    """Whether this process holds a part of the model."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


def groups_by_mesh(groups: Iterable[dict]) -> list[dict]:
    """Parameter groups of which each lies on one mesh: an optimizer takes a group in one call. Spectron takes pairs."""
    from torch.distributed.tensor import DTensor

    divided = []
    for group in groups:
        if group.get("optimizer") == "spectron":
            divided.append(group)
            continue
        by_mesh: dict[Any, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
        divided += [{**group, "params": parameters} for parameters in by_mesh.values()]
    return divided


def reshard(model: torch.nn.Module) -> None:
    """Back to this process's parts: without a backward, FSDP2 leaves the weights of its last group whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor from the parts of all processes, each of which has to call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
