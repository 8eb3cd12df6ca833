"""A stream that begins again when it ends, and goes on where a checkpoint says.

Every process reads its own part of the source, and so does every worker of its loader (data/stream.py). The last row of
a batch brings the position after it, which arrives with the batch: whatever loader and workers have read ahead, a
checkpoint holds the positions of what was trained on.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainingArguments, default_data_collator

from ..data.files import quiet
from ..data.stream import TrainingStream
from ..errors import CheckpointError, ConfigError, DataError
from .run_folder import read_json, write_json

POSITION = "position"
"""Key of a batch: JSON of [worker, pass, state of `datasets`]."""


class Passes(IterableDataset):
    """Pass after pass over a training stream, each shuffled anew, as one stream without an end.

    transformers' Trainer counts the steps of a stream from its first pass. With one stream that has no end, a run goes
    on where it was in any of them.
    """

    def __init__(self, stream: TrainingStream, batch_size: int) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.process, self.processes = 0, 1
        self.positions: dict[int, str] = {}
        """Of the last batch of each worker that was trained on."""
        self.last_worker = -1
        """Whose batch was trained on last."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        me, workers = (0, 1) if info is None else (info.id, info.num_workers)
        part = {"reader": self.process * workers + me, "readers": self.processes * workers}
        number, state, rows_so_far = 0, None, 0
        if me in self.positions:
            _, number, state = json.loads(self.positions[me])
            if me <= self.last_worker:  # it was this worker's turn before the next one's: a batch that is skipped
                yield from [{POSITION: ""}] * self.batch_size
        while True:
            blocks = self.stream.one_pass(number, **part)
            is_empty = state is None
            for row in _rows_after(blocks, state):
                is_empty = False
                rows_so_far += 1
                if rows_so_far % self.batch_size == 0:
                    row[POSITION] = json.dumps([me, number, blocks.state_dict()])
                yield row
            if is_empty:
                raise DataError(
                    f"the stream holds no block for one of its {part['readers']} readers (processes x loader workers); "
                    "check the source, or take fewer"
                )
            number, state = number + 1, None

    def loader(self, arguments: TrainingArguments, accelerator: Accelerator) -> DataLoader:
        """Batches of the part of this process, with their positions."""
        self.process, self.processes = data_process(accelerator)
        loader = DataLoader(
            self,
            batch_size=self.batch_size,
            collate_fn=_collate,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            generator=torch.Generator(),  # the seed of its workers is not drawn from what the model draws from
        )
        # One process of one: accelerate would divide among processes what is divided already.
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def trained_on(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch without its position, which is kept."""
        position = batch.pop(POSITION)
        self.last_worker = json.loads(position)[0]
        self.positions[self.last_worker] = position
        return batch

    def resumed(self, loader: DataLoader) -> DataLoader:
        """A loader of this stream that goes on from the positions, with the worker whose turn it is."""
        return skip_first_batches(loader, self.last_worker + 1)

    def save(self, folder: Path, process: int) -> None:
        """Write the positions into a checkpoint. Raises OSError."""
        positions = {str(worker): position for worker, position in self.positions.items()}
        write_json(folder / _file_of(process), {"last_worker": self.last_worker, "positions": positions})

    def load(self, folder: Path, process: int) -> None:
        """Go on from the positions in a checkpoint. Raises CheckpointError."""
        content = read_json(folder / _file_of(process))
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{folder / _file_of(process)} cannot be read, so that where the run was is not known; "
                "put it back, or start again in another --output_dir"
            )
        self.last_worker = content["last_worker"]
        self.positions = {int(worker): position for worker, position in content["positions"].items()}


class StreamTrainer(Trainer):
    """Trainer that takes a stream (`Passes`) with a loader of its own, keeps its position in checkpoints, and goes on
    from there. Other data it leaves to the next base class."""

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, Passes):
            return self.train_dataset.loader(self.args, self.accelerator)
        return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        if isinstance(self.train_dataset, Passes):
            epoch_iterator = map(self.train_dataset.trained_on, epoch_iterator)
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        except DataError as error:  # from a worker it comes with its traceback in its text
            raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error

    def _save_rng_state(self, output_dir) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, Passes):
            self.train_dataset.save(Path(output_dir), self.args.process_index)

    def _run_epoch(self, **settings) -> None:
        checkpoint = settings["resume_from_checkpoint"]
        if isinstance(self.train_dataset, Passes) and checkpoint is not None:
            # Nothing is read again: the stream begins at its position, and the Trainer somewhere in its first epoch.
            self.train_dataset.load(Path(checkpoint), self.args.process_index)
            settings["train_dataloader"] = self.train_dataset.resumed(settings["train_dataloader"])
            settings["epoch"] += settings["steps_trained_in_current_epoch"] / settings["steps_in_epoch"]
            self._load_rng_state(checkpoint)
        super()._run_epoch(**settings)


def data_process(accelerator: Accelerator) -> tuple[int, int]:
    """(which one, of how many) among the processes that read different rows; those of one tensor-parallel group read
    the same."""
    layout = accelerator.parallelism_config
    alike = 1 if layout is None else layout.non_data_parallel_size
    return accelerator.process_index // alike, accelerator.num_processes // alike


def check_streaming(arguments: TrainingArguments) -> None:
    """Raises ConfigError for settings of accelerate that would divide a stream a second time."""
    for name in ("dispatch_batches", "split_batches"):
        if getattr(arguments.accelerator_config, name, None):
            raise ConfigError(
                f"training.accelerator_config: {name} is not for streams, of which every process reads its own part; "
                "leave it out"
            )


def _rows_after(blocks: Any, state: Any) -> Iterator[dict[str, Any]]:
    """The rows of a pass that come after a state; all of them for None."""
    if state is not None:
        blocks.load_state_dict(state)
    rows = ({name: column[0] for name, column in batch.items()} for batch in blocks.iter(1))
    with quiet():  # it would say that a shuffle buffer is lost: ours holds nothing
        first = list(itertools.islice(rows, 1))
    yield from first
    yield from rows


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {**default_data_collator(rows), POSITION: rows[-1][POSITION]}


def _file_of(process: int) -> str:
    return f"stream_{process}.json"
