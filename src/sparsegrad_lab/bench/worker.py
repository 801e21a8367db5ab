"""One method in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import ctypes
import logging
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsegrad_peft.method.basis import Basis

from .methods import METHODS, NotInstalledError, Prepared, Setting
from .settings import BenchArguments
from .workloads import find_workload

T = TypeVar("T")


class Worker:
    """A process that runs one method, seen from the benchmark. Creating it waits until the method is ready.

    Attributes:
        ended: None, or why there are no more answers: ("skipped" or "failed", reason).
    """

    def __init__(self, arguments: BenchArguments, method: str, layers: int) -> None:
        self.ended: tuple[str, str] | None = None
        self._process = ProcessPoolExecutor(1, get_context("spawn"))
        self._ask(_prepare, arguments, method, layers)

    def timed_step(self) -> float | None:
        """Run a step and return its milliseconds; None if the process has ended."""
        return self._ask(_timed_step)

    def bytes(self) -> dict[str, int] | None:
        """Return `Runner.bytes`; None if the process has ended."""
        return self._ask(_bytes)

    def stop(self) -> None:
        """End the process."""
        self._process.shutdown(cancel_futures=True)

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T | None:
        if self.ended is not None:
            return None
        try:
            return self._process.submit(function, *arguments).result()
        except NotInstalledError as error:
            self.ended = ("skipped", str(error))
        except BrokenProcessPool:
            self.ended = ("failed", "the process was killed (out of memory?)")
        except (MemoryError, torch.OutOfMemoryError):
            self.ended = ("failed", "out of memory")
        except Exception as error:
            self.ended = ("failed", "".join(traceback.format_exception(error)))
        return None


_runner: Runner
"""In the process of a worker: its method."""


def _prepare(arguments: BenchArguments, method: str, layers: int) -> None:
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, without a traceback
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    _runner = Runner(arguments, method, layers)
    _runner.step()  # allocates the optimizer's state
    _runner.reset_peak()


def _timed_step() -> float:
    return _runner.timed_step()


def _bytes() -> dict[str, int]:
    return _runner.bytes()


class Runner:
    """A prepared method: runs steps and measures them."""

    def __init__(self, arguments: BenchArguments, method: str, layers: int) -> None:
        torch.set_num_threads(arguments.threads)
        torch.manual_seed(arguments.seed)
        workload = find_workload(arguments.workload)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = arguments.precision == "bf16"
        self.batch = workload.batch(arguments.tokens, arguments.seed, self.device)
        model, train_rest = workload.build(layers).to(self.device).train(), arguments.rest == "train"
        setting = Setting(model, self.batch, workload.targets, train_rest, arguments.sizes)
        self.prepared: Prepared = METHODS[method].prepare(setting)
        self.prepared.model.train()

    def loss(self) -> Tensor:
        """Run the forward pass."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.prepared.model(**self.batch).loss
        return loss

    def step(self) -> None:
        """Run forward, backward and the optimizer."""
        self.loss().backward()
        if self.prepared.optimizer is not None:
            self.prepared.optimizer.step()
            self.prepared.optimizer.zero_grad()
        for tensor in self.batch.values():
            tensor.grad = None

    def timed_step(self) -> float:
        """Run a step and return its milliseconds."""
        self._synchronize()
        start = time.perf_counter()
        self.step()
        self._synchronize()
        return (time.perf_counter() - start) * 1e3

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """Return the memory of the preparation to the system and restart the peak measurement."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux: the peak includes the preparation

    def peak(self) -> int:
        """Return the peak in bytes since `reset_peak`: of the allocator on a GPU, of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
        except OSError:
            import resource

            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def bytes(self) -> dict[str, int]:
        """Return the peak, the bytes by what holds them, and the number of trained entries."""
        model, optimizer = self.prepared.model, self.prepared.optimizer
        state = {} if optimizer is None else optimizer.state
        trained = [p for p in model.parameters() if p.requires_grad]
        modules = [module for module in model.modules() if isinstance(module, Basis)]
        bases = {buffer.data_ptr(): buffer.nbytes
                 for module in (*modules, *getattr(optimizer, "bases", {}).values())
                 for buffer in module.buffers()}  # fmt: skip
        return {
            "peak": self.peak(),
            "kept_for_backward": saved_bytes(model, self.loss),
            "optimizer": sum(v.nbytes for s in state.values() for v in s.values() if isinstance(v, Tensor)),
            "bases": sum(bases.values()),
            "gradients": sum(p.nbytes for p in trained),
            "weights": sum(p.nbytes for p in model.parameters()),
            "trainable_entries": sum(p.numel() for p in trained),
        }


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd saves in `forward` for backward, without the module's parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = forward()
    total = sum(saved.values())
    del output  # until here it keeps the saved tensors alive, so that no two share an address
    return total
