"""The machine: versions, devices, and the speed of bfloat16."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from .processes import engine, process_count

_PACKAGES = (
    "sparsegrad-peft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "scikit-learn",
)  # fmt: skip
_SLOW = 1.5  # a processor with bfloat16 instructions takes less time than in float32


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
