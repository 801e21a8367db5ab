"""What the processes of a group do together: wait for each other, average, broadcast. Without a group: nothing."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .precision import at_least_float32

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

PATIENCE = 180.0
"Seconds that `wait_for_all` waits for the other processes."
_WARN_AFTER = 20.0
_LAST_WORDS = timedelta(seconds=10)
"How long a process that failed waits for the others to notice, before it raises its own error."
_RAISED_AGAIN = {error.__name__: error for error in (ValueError, TypeError, RuntimeError)}

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_distributed() -> bool:
    """True if there are several processes."""
    return world_size() > 1


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


def check_starting_together(what: str, model: nn.Module) -> None:
    """Wait until every process is about to start the work, and check that all have the same weights.

    Raises:
        RuntimeError, ValueError: see `wait_for_all` and `check_equal_weights`.
    """
    wait_for_all(what)
    check_equal_weights(dict(model.named_parameters()))


def wait_for_all(what: str) -> None:
    """Wait until every process has called this, so that a call on some of them ends with an error and not in a hang.

    The processes meet in the key-value store of the group, which has no time-out of its own.

    Args:
        what: the work that is about to start, for the messages.

    Raises:
        RuntimeError: some processes have not called it in time.
    """
    if not is_distributed():
        return
    store = dist.distributed_c10d._get_default_store()
    number = store.add(f"sparsegrad/calls/{dist.get_rank()}", 1)  # the same on every process
    keys = [f"sparsegrad/{number}/{rank}" for rank in range(world_size())]
    store.set(keys[dist.get_rank()], what)
    start, warned, pause = time.monotonic(), False, 0.001
    while not store.check(keys):
        waited = time.monotonic() - start
        if (waited > min(_WARN_AFTER, PATIENCE) and not warned) or waited > PATIENCE:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            if waited > PATIENCE:
                raise RuntimeError(
                    f"{what} runs on every process, and rank {ranks} of {len(keys)} processes did not call it within "
                    f"{PATIENCE:.0f} s. Call it on all ranks, each with its own batches"
                )
            warned = True
            logger.warning("%s waits for rank %s of %d processes", what, ranks, len(keys))
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


@contextmanager
def failing_together() -> Iterator[None]:
    """Run a block on every process. If it raises on some of them, raise on all.

    Otherwise the processes without an error wait in their next collective operation until the time-out of the group.
    The outcome goes through the key-value store of the group: it works also while other processes are in a collective
    operation that the failed process has left.

    Raises:
        Exception: the block's own error on the processes where it failed. On the others, an error with the message of
            the first that failed, and the ranks of all. It is a `ValueError` or `TypeError` if the first error is one,
            and otherwise a `RuntimeError`.
    """
    if not is_distributed():
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    rank, n = dist.get_rank(), world_size()
    store = dist.distributed_c10d._get_default_store()
    key = f"sparsegrad/outcome/{store.add(f'sparsegrad/outcomes/{rank}', 1)}"
    if failure is not None:
        store.set(f"{key}/{rank}", f"{type(failure).__name__}: {failure}")
        store.add(f"{key}/failed", 1)
    if store.add(f"{key}/arrived", 1) == n:
        store.set(f"{key}/all", "")
    if failure is not None:
        with suppress(dist.DistError):  # another process may be in a collective operation and never arrive
            store.wait([f"{key}/all"], _LAST_WORDS)
        raise failure
    store.wait([f"{key}/all"])  # until the time-out of the group
    if store.add(f"{key}/failed", 0):
        failed = [rank for rank in range(n) if store.check([f"{key}/{rank}"])]
        kind, _, message = store.get(f"{key}/{failed[0]}").decode().partition(": ")
        where = f"(on rank {', '.join(map(str, failed))} of {n} processes)"
        if kind in _RAISED_AGAIN:
            raise _RAISED_AGAIN[kind](f"{message} {where}")
        raise RuntimeError(f"{kind}: {message} {where}")


def check_equal_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise on every process unless all have the same weights, bit for bit. Sharded weights are left out.

    Raises:
        ValueError: the names or the values differ.
    """
    if not is_distributed():
        return
    whole = {name: w.detach() for name, w in weights.items() if not is_sharded(w) and not w.is_meta}
    named = hashlib.sha256("\n".join(f"{name} {tuple(w.shape)} {w.dtype}" for name, w in whole.items()).encode())
    if _differ(torch.tensor([len(whole), int.from_bytes(named.digest()[:7], "big")])).any():
        raise ValueError(
            f"the processes hold different layers: this one has {len(whole)} weights, the first is "
            f"{next(iter(whole), 'none')}. Calibrate before the model is split into pipeline stages or by tensor "
            "parallelism, or pass ready statistics, calibration=..."
        )
    # Sums of the bit patterns as integers: the order of summation, and so the device, does not matter.
    bits = (weight.contiguous().view(_BITS[weight.element_size()]) for weight in whole.values())
    sums = [pattern.sum(dtype=torch.int64).cpu() for pattern in bits]
    differs = _differ(torch.stack(sums)).tolist() if sums else []
    different = [name for name, differ in zip(whole, differs, strict=True) if differ]
    if different:
        raise ValueError(
            f"the processes start from different weights: {len(different)} of {len(whole)} differ, such as "
            f"{different[0]}. Load the same checkpoint on every process, or set the same seed before the model is made"
        )


def check_averages_gradients(model: nn.Module, weight: Tensor, name: str) -> None:
    """Raise unless FSDP2 has sharded this weight of the model, and nothing else has.

    Raises:
        TypeError: the weight is tensor-parallel.
    """
    from torch.distributed.fsdp import FSDPModule

    dimensions = weight.device_mesh.mesh_dim_names or ()  # type: ignore[attr-defined]
    if "tp" in dimensions or not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise TypeError(
            f"{name}: expected a weight that is whole or sharded by fully_shard (FSDP2), found a tensor-parallel one; "
            "calibrate before the model is split, or pass ready statistics"
        )


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Return the mean over the processes, computed in float32 at least."""
    if not is_distributed():
        return tensor
    shared = _reachable(tensor.to(at_least_float32(tensor.dtype)).contiguous())
    if shared is tensor:
        shared = tensor.clone()
    dist.all_reduce(shared)
    return shared.div_(world_size()).to(tensor.device)


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


def is_sharded(tensor: Tensor) -> bool:
    """True for a `DTensor`, as `fully_shard` makes them; its package takes a second to import."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered from all processes, all of which must call this; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_shard(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; others as they are. It shares the storage."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _differ(numbers: Tensor) -> Tensor:
    """Tell which of some integers differ between the processes."""
    lowest, highest = _reachable(numbers.clone()), _reachable(numbers.clone())
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return (lowest != highest).cpu()


def _reachable(tensor: Tensor) -> Tensor:
    # NCCL moves tensors between GPUs only; Gram matrices may live on the CPU to spare GPU memory.
    return tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
