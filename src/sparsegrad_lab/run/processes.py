"""Several processes of one run, as `torchrun` and `accelerate launch` start them: rank 0 writes and speaks.

Light: torch is imported only where there are several processes.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

from .exit_codes import RefusedError

Result = TypeVar("Result")

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"Variables of torchrun and of MPI, as accelerate reads them."
_LAUNCHER = (*_SIZES, *_RANKS, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def process_count() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return _first_number(_SIZES, 1)


def rank() -> int:
    """Number of this process, from 0."""
    return _first_number(_RANKS, 0) if process_count() > 1 else 0


def is_rank0() -> bool:
    """True for the process that writes and speaks."""
    return rank() == 0


def _first_number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def engine() -> str:
    """What averages the gradients, for the record of a run."""
    return "DDP" if process_count() > 1 else "one process"


@contextmanager
def joined() -> Iterator[None]:
    """Form the group of all processes, and leave it in the end. Does nothing for one process, or within itself.

    Raises:
        RefusedError: the launcher asks for an engine other than DDP.
    """
    if process_count() == 1:
        yield
        return
    for variable, name in _ENGINES.items():
        if os.environ.get(variable, "").lower() == "true":
            raise RefusedError(
                f"several processes of the sparsegrad command train with DDP, found {name} ({variable}=true); "
                "launch it without, or train in Python as in examples/distributed"
            )
    import torch
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())
    try:
        yield
    finally:
        PartialState._reset_state()
        distributed.destroy_process_group()


def on_rank0(call: Callable[[], Result]) -> Result:
    """Call a function on rank 0 only, and return its result, or raise its error, on every process."""
    if process_count() == 1:
        return call()
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_rank0():
        try:
            outcome = (call(), None)
        except Exception as error:
            outcome = (None, error)
    result, failure = from_rank0(outcome)
    if failure is not None:
        vars(failure)["of_all"] = True
        raise failure
    return result


def from_rank0(content: Any) -> Any:
    """Rank 0's content on every process."""
    if process_count() == 1:
        return content
    from torch import distributed

    box = [content]
    distributed.broadcast_object_list(box, src=0)
    return content if is_rank0() else box[0]


def reports(error: BaseException) -> bool:
    """True if this process is to print an error: of those that all processes have, only rank 0 does."""
    of_all = getattr(error, "of_all", False) or isinstance(error, RefusedError | KeyboardInterrupt)
    return is_rank0() or not (of_all or type(error).__name__ == "TrainingDivergedError")


@contextmanager
def only_rank0_speaks() -> Iterator[None]:
    """Silence the output and the warnings of the other processes, but not their errors."""
    if is_rank0():
        yield
        return
    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def work_alone() -> None:
    """Leave the launcher's group for good: this process goes on as if it had been started by itself, on its own GPU."""
    if process_count() == 1:
        return
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    local_rank = os.environ.get("LOCAL_RANK", "0")
    visible = devices.split(",") if devices else []
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(local_rank)] if int(local_rank) < len(visible) else local_rank
    for name in _LAUNCHER:
        os.environ.pop(name, None)
