"""Batches of rows of similar length, which need little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthSampler(LengthGroupedSampler):
    """`LengthGroupedSampler` whose order depends only on seed and epoch, so that a resumed run repeats it.

    Args:
        batch_size: rows per step.
        lengths: of the rows, in tokens.
        seed: of the run.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    @classmethod
    def of_dataset(cls, batch_size: int, seed: int, dataset: Any) -> LengthSampler:
        """A sampler for a data set with "input_ids"."""
        return cls(batch_size, [len(tokens) for tokens in dataset["input_ids"]], seed)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(super().__iter__())
