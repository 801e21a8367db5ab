"""The machine: versions and devices, time and memory of a phase, speed of bfloat16, identity of a process."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.functional import linear

from .processes import engine, process_count

_PACKAGES = (
    "sparsegrad-peft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "scikit-learn",
)  # fmt: skip
_SAMPLING_SECONDS = 0.02
_SLOW = 1.5  # a processor with bfloat16 instructions takes less time than in float32
_CLOCK_SECONDS = 2.0  # a process's start time may shift by this much when the system clock is set


def environment() -> dict[str, Any]:
    """Commit, versions, device and number of processes, for the record of a run or a benchmark.

    Raises:
        subprocess.CalledProcessError: git cannot read the checkout that this package is imported from.
    """
    # A virtual machine often hides the processor's model; its instruction set narrows it down.
    instructions = torch.backends.cpu.get_cpu_capability()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, {instructions}"
    return {
        **_checkout(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "engine": engine(),
    }


def processor() -> str:
    """Name of the CPU. On Linux it is read from the kernel, since `platform` does not give it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _checkout() -> dict[str, Any]:
    """Commit of the checkout, and whether its source differs from it; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "src"))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    mean_memory_bytes: int = 0

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
    peak, total, samples, stop = before, before, 1, threading.Event()

    def sample() -> None:
        nonlocal peak, total, samples
        while not stop.wait(_SAMPLING_SECONDS):
            now = in_use()
            peak, total, samples = max(peak, now), total + now, samples + 1

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
        phase.mean_memory_bytes = total // samples


def bf16_slowdown() -> float:
    """Time of a matrix product in bfloat16 over its time in float32, on this CPU. Takes a fraction of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other work on the machine disturbs a product on several threads
    try:
        return _product_seconds(torch.bfloat16) / _product_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: torch.dtype) -> float:
    x, W = torch.ones(256, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
    times = []
    for _ in range(5):  # the first one may have to prepare a kernel
        start = time.perf_counter()
        linear(x, W)
        times.append(time.perf_counter() - start)
    return min(times)


def slow_precision_warning(precision: str, slowdown: Callable[[], float] = bf16_slowdown) -> str | None:
    """Warning for bfloat16 on a CPU without instructions for it; None if there is nothing to warn about.

    Args:
        precision: "fp32", "bf16" or "fp16".
        slowdown: measures the slowdown.
    """
    if precision != "bf16" or torch.accelerator.is_available() or (times := slowdown()) < _SLOW:
        return None
    return f"bf16 is slow on this processor: a product takes {times:.0f} times as long as in fp32. Use fp32"


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
