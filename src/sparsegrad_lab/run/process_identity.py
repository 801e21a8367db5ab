"""Which process holds a lock, and whether it still runs."""

from __future__ import annotations

import os
import socket

import psutil

_CLOCK_SECONDS = 2.0  # a process's start time may shift by this much when the system clock is set


def process_identity(pid: int | None = None) -> str:
    """Host, number and start time of a process; None: of this one.

    The number alone is not enough: numbers are reused, and containers on one disk use the same ones.
    """
    pid = os.getpid() if pid is None else pid
    try:
        start = f"{psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        start = "0"
    return f"{socket.gethostname()}:{pid}:{start}"


def is_on_this_host(identity: str) -> bool:
    """True if the process belongs to this machine, so that `is_alive` can tell."""
    return identity.partition(":")[0] == socket.gethostname()


def is_alive(identity: str) -> bool:
    """True if a process of this machine still runs. A zombie does not."""
    _, pid, start = identity.split(":")
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(start)) < _CLOCK_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
