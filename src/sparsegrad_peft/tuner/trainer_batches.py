"""A trainer's training batches, read for calibration without a trace in the training that follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from torch.utils.data import IterableDataset

_TRL_COUNTERS = ("_metrics", "_total_train_tokens", "_logs")
"""Private attributes of TRL's trainers (1.0 to 1.16), which count in `compute_loss` what they log. Waits for a public
way to compute a loss without logging; `tests/tuner/test_trainer_trl.py` fails if TRL counts elsewhere."""
_ACCUMULATION = "current_gradient_accumulation_steps"
"""Attribute that `transformers.Trainer` sets when training has begun, and that losses of TRL read."""


class Batches:
    """A data loader that is made when it is first read, within calibration, which restores the random numbers drawn."""

    def __init__(self, make_loader: Callable[[], Any]) -> None:
        self.make_loader = make_loader
        self.loader: Any = None

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches, from the start.

        Raises:
            ValueError: the data can be read only once, so that training would lack what calibration reads.
        """
        if self.loader is None:
            self.loader = self.make_loader()
            check_rereadable(getattr(self.loader, "dataset", None))
        return iter(self.loader)

    def close(self) -> None:
        """Tell accelerate that a loader is no longer read which was not read to its end."""
        state = getattr(self.loader, "gradient_state", None)
        if state is not None and self.loader in state.dataloader_references:
            self.loader.end()


def check_rereadable(dataset: Any) -> None:
    """Raise `ValueError` for an iterable data set that goes on where it was left, such as one around a generator."""
    if isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset):
        raise ValueError(
            "the training data can be read only once, and calibration would take its first batches from training. Call "
            "calibrate_adapter(model, other_batches) before training, or pass a data set whose __iter__ starts anew"
        )


@contextmanager
def training_batches(trainer: Any) -> Iterator[Batches]:
    """Yield the batches of a trainer's training loader; afterwards the trainer is as before."""
    prepared = getattr(trainer.accelerator, "_dataloaders", [])  # keeps every loader alive, with its worker processes
    before, loader = list(prepared), closing(Batches(trainer.get_train_dataloader))
    try:
        with restored_counters(trainer), single_batches(trainer), loader as batches:
            yield batches
    finally:
        prepared[:] = before


@contextmanager
def restored_counters(trainer: Any) -> Iterator[None]:
    """Restore TRL's counters when the block ends."""
    counters = {name: copy.deepcopy(vars(trainer)[name]) for name in _TRL_COUNTERS if name in vars(trainer)}
    tokens = trainer.state.num_input_tokens_seen
    try:
        yield
    finally:
        vars(trainer).update(counters)
        trainer.state.num_input_tokens_seen = tokens


@contextmanager
def single_batches(trainer: Any) -> Iterator[None]:
    """Let the losses of TRL take each batch for a whole step, before training has begun."""
    known = hasattr(trainer, _ACCUMULATION)
    if not known:
        setattr(trainer, _ACCUMULATION, 1)
    try:
        yield
    finally:
        if not known:
            delattr(trainer, _ACCUMULATION)
