"""Settings of all tests: one thread and a fixed seed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # child processes use one thread too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

torch.set_num_threads(1)  # fixtures of wider scope run before the fixture below

pytest_plugins = ["tiny_runs", "real_models"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bitwise equality holds on one thread, and tensors this small are not worth more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_finish() -> None:
    """Leave the imported libraries out of garbage collections, each of which would take most of a second."""
    gc.collect()
    gc.freeze()
