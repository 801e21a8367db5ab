"""A process that ends early is noted."""

from __future__ import annotations

from sparsegrad_lab.bench.settings import BenchArguments
from sparsegrad_lab.bench.worker import Worker


def test_a_worker_that_ends() -> None:
    """An error in the process, and a process that is killed."""
    worker = Worker(BenchArguments(workload="mlp-16x32", tokens=8, threads=1), "floor", 1)
    milliseconds = worker.timed_step()
    assert milliseconds is not None
    assert milliseconds > 0
    assert worker._ask(int, "x") is None
    assert worker.ended is not None
    assert worker.ended[0] == "failed"
    assert "ValueError: invalid literal" in worker.ended[1]
    assert worker.timed_step() is None

    worker.ended = None
    (process,) = worker._process._processes.values()
    process.kill()
    process.join()
    assert worker.timed_step() is None
    assert worker.ended == ("failed", "the process was killed (out of memory?)")
    worker.stop()
