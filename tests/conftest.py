"""What all tests share: one thread, and a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side: what a test starts takes one thread as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")

torch.set_num_threads(1)  # also for fixtures of a module or of all tests, which come before those of a test

pytest_plugins = ["tiny_runs", "real_models"]  # tiny models, a finished run, small real models


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Handing out work this small takes longer than the work; and equality to the bit is promised on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
