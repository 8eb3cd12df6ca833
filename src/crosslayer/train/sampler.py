"""The order in which rows of like length are read."""

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroups(LengthGroupedSampler):
    """`train_sampling_strategy: group_by_length` with an order that seed and pass over the data decide, as accelerate's
    for a random order: transformers' draws it from the state of the moment, so that a run resumed within a pass would
    read some rows twice and others never.
    """

    def __init__(self, rows_per_step: int, lengths: list[int], seed: int) -> None:
        super().__init__(rows_per_step, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Before each pass; accelerate's loaders do it."""
        self.generator.manual_seed(self.seed + epoch)


__all__ = ["LengthGroups"]
