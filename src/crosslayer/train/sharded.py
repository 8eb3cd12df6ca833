"""Checkpoints of a model that processes share: each writes its part, in the background, with torch's own format.

checkpoint-N/
  sharded/        weights and optimizer state (torch.distributed.checkpoint): any number of processes can read them
  ...             configuration, tokenizer, schedule, random states, the Trainer's state; the manifest, last
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..private import without_strided_shards

FOLDER = "sharded"


def has_shards(checkpoint: Path) -> bool:
    """Whether a checkpoint is of this kind."""
    return (checkpoint / FOLDER).is_dir()


class ShardWriter:
    """Writes one checkpoint at a time, while training goes on; every process has one."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._group: Any = None

    def start(self, checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, finish: Callable[[], None]) -> None:
        """Copy this process's part and write it in the background; `finish` is called when all have written theirs.

        Raises what writing the one before it raised.
        """
        self.wait()
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # beside the one that trains
        writing = dcp.async_save(_state(model, optimizer), checkpoint_id=checkpoint / FOLDER, process_group=self._group)

        def wait_and_finish() -> None:
            writing.result()  # type: ignore[union-attr]
            finish()

        self._pending = self._threads.submit(wait_and_finish)

    def wait(self) -> None:
        """Until what was started is whole. Raises what writing it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def load_weights(checkpoint: Path, model: Any) -> None:
    """The weights of a sharded checkpoint, into a model that is split over any number of processes, or whole."""
    state = get_model_state_dict(model)
    _read(checkpoint, "model", state)
    set_model_state_dict(model, state)


def load_optimizer(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """The same for the optimizer's state; rates and other settings stay those of the optimizer."""
    content: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    _read(checkpoint, "optimizer", content["state"])
    set_optimizer_state_dict(model, optimizer, content)


def _state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer)["state"],
    }
    return without_strided_shards(state)


def _read(checkpoint: Path, name: str, state: dict[str, Any]) -> None:
    """Fills the tensors of `state`, of which the checkpoint calls all `name`."""
    contiguous = without_strided_shards(state)
    dcp.load({name: contiguous}, checkpoint_id=checkpoint / FOLDER, no_dist=not dist.is_initialized())
    state.update(without_strided_shards(contiguous, like=state))
