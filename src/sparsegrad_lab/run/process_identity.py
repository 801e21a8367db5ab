"""Names of processes that hold for one machine and one life: numbers alone are used again, in containers at once."""

from __future__ import annotations

import os
import socket

import psutil

_CLOCK = 2.0  # seconds by which the start of a process may seem to move when the machine's clock is set


def mark(process: int | None = None) -> str:
    """Host, number and start of a process; None: of this one."""
    process = os.getpid() if process is None else process
    try:
        start = f"{psutil.Process(process).create_time():.2f}"
    except psutil.NoSuchProcess:
        start = "0"
    return f"{socket.gethostname()}:{process}:{start}"


def is_here(marked: str) -> bool:
    """Whether it is of this machine, whose processes can be looked at."""
    return marked.partition(":")[0] == socket.gethostname()


def is_alive(marked: str) -> bool:
    """Whether a process of this machine runs; one that has ended and waits to be collected does not."""
    _, process, start = marked.split(":")
    try:
        found = psutil.Process(int(process))
        return abs(found.create_time() - float(start)) < _CLOCK and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
