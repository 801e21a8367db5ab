"""Whether a processor is quick in the precision that a run asks for."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

_SLOW = 1.5  # with instructions for bfloat16, a product takes less time than in float32


def bf16_slowdown() -> float:
    """How many times as long as in float32 a product in bfloat16 takes here: measured, in part of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on a machine with other work wait for each other, in either type
    try:
        return _seconds(torch.bfloat16) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    x, W = torch.ones(256, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
    times = []
    for _ in range(5):  # the first one may have a kernel to prepare
        start = time.perf_counter()
        linear(x, W)
        times.append(time.perf_counter() - start)
    return min(times)


def slow_precision(precision: str, slowdown: Callable[[], float] = bf16_slowdown) -> str | None:
    """What a user should know of bfloat16 on a processor that has no instructions for it; None where all is well.

    Args:
        precision: "fp32", "bf16" or "fp16".
        slowdown: measures it.
    """
    if precision != "bf16" or torch.accelerator.is_available() or (times := slowdown()) < _SLOW:
        return None
    return f"bf16 is slow here: a product takes {times:.0f} times as long as in fp32 on this processor; fp32 is faster"
