"""What all tests share: one thread, and a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest_plugins = ["tiny_runs", "real_models"]  # tiny models, a finished run, small real models


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Handing out work this small takes longer than the work; and equality to the bit is promised on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
