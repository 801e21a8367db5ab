"""Time and memory of a phase of a run, such as calibration or training."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

_SAMPLING_SECONDS = 0.02


@dataclass
class Phase:
    """Time and memory of a phase.

    On a GPU, memory is what PyTorch's allocator has in use, and the peak is exact. On a CPU, it is the resident memory
    of the whole process, libraries included, sampled 50 times a second.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    extra_memory_bytes: int = 0
    "peak minus the memory in use at the start of the phase"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@contextmanager
def measured() -> Iterator[Phase]:
    """Measure a block: the `Phase` is filled in at its end, also when it raises."""
    phase = Phase()
    on_gpu = torch.cuda.is_available()
    process = psutil.Process()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def in_use() -> int:
        return int(torch.cuda.memory_allocated() if on_gpu else process.memory_info().rss)

    before = in_use()
    peak, stop = before, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.wait(_SAMPLING_SECONDS):
            peak = max(peak, in_use())

    sampler = threading.Thread(target=sample, daemon=True)
    start = time.perf_counter()
    sampler.start()
    try:
        yield phase
    finally:
        stop.set()
        sampler.join()
        peak = max(peak, in_use())
        if on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        phase.seconds = time.perf_counter() - start
        phase.peak_memory_bytes, phase.extra_memory_bytes = peak, peak - before
