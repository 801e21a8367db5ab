"""Whether a trainer's loss uses `num_items_in_batch`, the number of labels in a step.

`transformers.Trainer` passes this number to every model whose `forward` takes `**kwargs`. It expects a sum over labels
divided by it, and so multiplies the loss by the number of processes and adds up the micro-batches of a step. Most
classifiers of transformers, and models such as BERT for masked tokens or T5, ignore the number and return the mean of
their own batch. Loss and gradient are then too large by the number of processes times that of micro-batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..method.restored_state import restored_state
from .trainer_batches import restored_counters

logger = logging.getLogger(__name__)

_SAME = 0.1
"""Relative difference below which two losses count as equal. Repeated passes differ by rounding on some devices, and a
loss that uses the number is halved when it doubles."""


def checked(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a trainer's `compute_loss`: the first batch shows if the loss uses the number, and the Trainer is told."""

    @wraps(compute_loss)
    def compute(trainer: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        number = kwargs.get("num_items_in_batch")
        if not trainer.loss_is_known and matters(trainer, number):
            trainer.loss_is_known = True  # for a `compute_loss` within this one
            uses = uses_num_items(
                trainer, model, lambda n: compute_loss(trainer, model, {**inputs}, num_items_in_batch=n), number
            )
            trainer.loss_is_known = uses is not None
            if uses is False:
                logger.info(
                    "the loss of %s ignores num_items_in_batch; it is averaged over the batches of a step",
                    type(trainer.accelerator.unwrap_model(model)).__name__,
                )
                trainer.model_accepts_loss_kwargs = False
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    return compute


def matters(trainer: Any, num_items_in_batch: Any) -> bool:
    """True if the Trainer relies on a model's use of the number, and a step has several batches.

    False with `compute_loss_func`: transformers asks its author to use the number.
    """
    if trainer.compute_loss_func is not None:
        return False
    batches = trainer.args.world_size * trainer.args.gradient_accumulation_steps
    return num_items_in_batch is not None and trainer.model_accepts_loss_kwargs and batches > 1


def uses_num_items(
    trainer: Any, model: nn.Module, compute_loss: Callable[[Any], Tensor], num_items_in_batch: Any
) -> bool | None:
    """Compare the losses of one batch for two numbers of labels. All processes call this, and get the same answer.

    Takes two forward passes in eval mode, without gradients. Model, random numbers and TRL's counters stay as they are.

    Args:
        trainer: whose loss it is.
        model: the model that the trainer computes with.
        compute_loss: returns the loss of the batch for a number of labels.
        num_items_in_batch: the real number of labels; gives the type and the device.

    Returns:
        True if the loss uses the number, False if not, None if all losses are zero, such as for a batch without labels.
    """
    one = num_items_in_batch * 0 + 1
    with torch.no_grad(), restored_counters(trainer), restored_state(model, []):
        model.eval()
        losses = [compute_loss(number).detach().float().mean() for number in (one, one + one)]
    found = trainer.accelerator.gather(torch.stack(losses)).reshape(-1, 2)
    if not bool(found.any()):
        return None
    first, second = found.T
    return bool(((first - second).abs() > _SAME * first.abs()).any())
