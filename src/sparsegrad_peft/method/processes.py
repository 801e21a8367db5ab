"""Collective operations of calibration, and the progress bar of rank 0. Without a process group they do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Item = TypeVar("Item")


def is_distributed() -> bool:
    """True if there is a process group, also one of a single process."""
    return dist.is_available() and dist.is_initialized()


def is_rank0() -> bool:
    """True on rank 0 and without a process group. Rank 0 shows the progress bar, and its bases are used everywhere."""
    return not is_distributed() or dist.get_rank() == 0


def progress_bar(items: Sequence[Item], description: str | None) -> Iterator[Item]:
    """Yield the items, with a progress bar on rank 0 unless `description` is None."""
    if description is None or not is_rank0():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=description, console=Console(stderr=True))


def sum_over_processes(tensor: Tensor) -> None:
    """Sum a tensor in place, with the same bits on every process (a reduction alone may round differently)."""
    if is_distributed():
        shared = _reachable(tensor)
        dist.all_reduce(shared)
        dist.broadcast(shared, src=0)
        tensor.copy_(shared)


def broadcast_from_rank0(tensor: Tensor) -> Tensor:
    """Return rank 0's tensor on every process; its shape may differ from that of the tensor passed in."""
    if not is_distributed():
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
