"""The collective operations that calibration needs, and who shows a bar. Without a process group they do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Item = TypeVar("Item")


def together() -> bool:
    """Whether this process is one of several (or could be: a group of one counts)."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this is the process that speaks for all: it shows the progress bar, and its bases are taken."""
    return not together() or dist.get_rank() == 0


def shown(items: Sequence[Item], words: str | None) -> Iterator[Item]:
    """The items, with a progress bar beside these words where this process speaks; None shows no bar."""
    if words is None or not is_first():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=words, console=Console(stderr=True))


def sum_over_processes(tensor: Tensor) -> None:
    """Sum in place, with the same bits on every process (a reduction alone need not round alike everywhere)."""
    if together():
        shared = _reachable(tensor)
        dist.all_reduce(shared)
        dist.broadcast(shared, src=0)
        tensor.copy_(shared)


def taken_from_first(tensor: Tensor) -> Tensor:
    """The first process's tensor, on every process; its shape may differ from the one given."""
    if not together():
        return tensor
    shape = _reachable(torch.tensor(tensor.shape, device=tensor.device))
    dist.broadcast(shape, src=0)
    shared = _reachable(tensor)
    if shape.tolist() != list(tensor.shape):
        shared = shared.new_empty(shape.tolist())
    dist.broadcast(shared, src=0)
    return shared.to(tensor.device)


def _reachable(tensor: Tensor) -> Tensor:
    # NCCL moves tensors between GPUs only; Gram matrices may live on the CPU to spare GPU memory.
    return tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
