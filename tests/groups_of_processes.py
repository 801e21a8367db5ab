"""Start a group of real processes (gloo), once for all checks of a test file."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

_PRELOADED = ["torch.distributed.tensor", "trl", "sparsegrad_peft.tuner", "sparsegrad_lab.run.train"]


def preload() -> None:
    """Have the server that all processes are forked from import the libraries, which takes each of them seconds."""
    torch.multiprocessing.set_forkserver_preload(_PRELOADED)


def run_in_processes(n: int, work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """Call `work(rank, folder)` in `n` new processes, without a process group; return what each returns."""
    preload()
    torch.multiprocessing.start_processes(_save_result, args=(work, folder), nprocs=n, start_method="forkserver")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(n)]


def _save_result(rank: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"result-{rank}.pt")


def in_group(n: int, rank: int, folder: Path, name: str, call: Callable[[int], Any]) -> Any:
    """Call `call(rank)` in a group of the first `n` processes; return None on the others."""
    if rank >= n:
        return None
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=n)
    try:
        return call(rank)
    finally:
        dist.destroy_process_group()


def launcher_environment(rank: int, n: int, port: int) -> dict[str, str]:
    """Return the variables that `torchrun` sets, for libraries that make the group themselves."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def message_of(call: Callable[[], Any]) -> str:
    """Type and message of the error that a call ends with; "" if it ends without one."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
