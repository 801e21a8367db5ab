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
    memory, looked at fifty times a second, less what there was at the start: the whole process, libraries included.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    "the most that was in use"
    extra_memory_bytes: int = 0
    "the most that was in use above the start of the phase"

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
        before = torch.cuda.memory_allocated()
    else:
        before = process.memory_info().rss
    peak, stop = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(_INTERVAL):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    start = time.perf_counter()
    if not on_gpu:
        watcher.start()
    try:
        yield phase
    finally:
        if on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            stop.set()
            watcher.join()
            peak = max(peak, process.memory_info().rss)
        phase.seconds = time.perf_counter() - start
        phase.peak_memory_bytes, phase.extra_memory_bytes = peak, peak - before
