"""One method in a process of its own, so that its peak memory is its own; it makes a step when it is told to."""

from __future__ import annotations

import ctypes
import logging
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.sizes import Sizes

from .methods import METHODS, NotInstalledError, Prepared, Setting
from .workloads import find_workload


@dataclass(frozen=True)
class Job:
    """What a process is to prepare."""

    workload: str
    method: str
    tokens: int
    layers: int
    train_rest: bool
    sizes: Sizes
    seed: int
    threads: int
    bf16: bool


def serve(job: Job, pipe: Connection) -> None:
    """Prepare, answer "ready", then a number of milliseconds for each "step", and the bytes for "bytes"."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # of libraries, about settings that are meant here
    try:
        running = Running(job)
        running.step()  # allocates the optimizer's state
        running.forget_peak()
        pipe.send(("ready", None))
        while (asked := pipe.recv()) != "stop":
            pipe.send((asked, running.timed_step() if asked == "step" else running.bytes()))
    except NotInstalledError as error:
        pipe.send(("skipped", str(error)))
    except (EOFError, BrokenPipeError):
        pass  # nobody asks any more
    except BaseException as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        pipe.send(("failed", "out of memory" if out_of_memory else traceback.format_exc()))


class Running:
    """A prepared method, step by step."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        workload = find_workload(job.workload)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = job.bf16
        model = workload.make(job.layers)
        self.batch = workload.batch(job.tokens, job.seed, self.device)
        setting = Setting(model.to(self.device).train(), self.batch, workload.targets, job.train_rest, job.sizes)
        self.prepared: Prepared = METHODS[job.method].prepare(setting)
        self.prepared.model.train()

    def loss(self) -> Tensor:
        """Forward."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.prepared.model(**self.batch).loss
        return loss

    def step(self) -> None:
        """Forward, backward, optimizer."""
        self.loss().backward()
        if self.prepared.optimizer is not None:
            self.prepared.optimizer.step()
            self.prepared.optimizer.zero_grad()
        for tensor in self.batch.values():
            tensor.grad = None

    def timed_step(self) -> float:
        """Milliseconds."""
        self._wait()
        start = time.perf_counter()
        self.step()
        self._wait()
        return (time.perf_counter() - start) * 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Memory of preparing (calibration, decompositions) is not that of a step: give it back, start anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux: the peak is that of the whole process

    def peak(self) -> int:
        """Most bytes in use since `forget_peak`: the allocator's on a GPU, the process's on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
        except OSError:
            import resource

            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def bytes(self) -> dict[str, int]:
        """By what holds them."""
        model, optimizer = self.prepared.model, self.prepared.optimizer
        state = {} if optimizer is None else optimizer.state
        trained = [p for p in model.parameters() if p.requires_grad]
        bases = [b for m in model.modules() if isinstance(m, Basis) for b in m.buffers()]
        for basis in {id(b): b for b in getattr(optimizer, "bases", {}).values()}.values():
            bases += list(basis.buffers())
        return {
            "peak": self.peak(),
            "kept_for_backward": saved_bytes(model, self.loss),
            "optimizer": sum(v.nbytes for s in state.values() for v in s.values() if isinstance(v, Tensor)),
            "bases": sum({t.data_ptr(): t.nbytes for t in bases}.values()),
            "gradients": sum(p.nbytes for p in trained),
            "weights": sum(p.nbytes for p in model.parameters()),
            "trainable_entries": sum(p.numel() for p in trained),
        }


def saved_bytes(module: nn.Module, forward: Any) -> int:
    """Bytes that autograd keeps from forward to backward, parameters and buffers of the module aside."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    total = sum(kept.values())
    del output
    return total
