"""Time and peak memory of a phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

_INTERVAL = 0.02  # seconds between two looks at the process's memory


@dataclass
class Phase:
    """What a phase took.

    On a GPU the memory is the allocator's own high-water mark. On a CPU it is the highest of the process's resident
    memory, looked at fifty times a second: the whole process, libraries included.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    "the most that was in use"
    extra_memory_bytes: int = 0
    "the most that was in use above the start of the phase"
    mean_memory_bytes: int = 0
    "in use on average"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@contextmanager
def measured() -> Iterator[Phase]:
    """Fill in a `Phase` while the block runs; also when it raises."""
    phase = Phase()
    on_gpu = torch.cuda.is_available()
    process = psutil.Process()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def in_use() -> int:
        return int(torch.cuda.memory_allocated() if on_gpu else process.memory_info().rss)

    before = in_use()
    peak, total, looks, stop = before, before, 1, threading.Event()

    def watch() -> None:
        nonlocal peak, total, looks
        while not stop.wait(_INTERVAL):
            now = in_use()
            peak, total, looks = max(peak, now), total + now, looks + 1

    watcher = threading.Thread(target=watch, daemon=True)
    start = time.perf_counter()
    watcher.start()
    try:
        yield phase
    finally:
        stop.set()
        watcher.join()
        peak = max(peak, in_use())
        if on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        phase.seconds = time.perf_counter() - start
        phase.peak_memory_bytes, phase.extra_memory_bytes = peak, peak - before
        phase.mean_memory_bytes = total // looks
