"""DistributedDataParallel with two processes: a block, packed values and a plain weight train as in one process.

Each step has two micro-batches of different sizes, and one process has no rows in some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers import orthogonal
from sparsegrad_peft import Basis, SparseGradAdamW, SparseGradLinear, param_groups

STEPS, K = 5, 7


def build() -> tuple[nn.Module, SparseGradAdamW]:
    torch.manual_seed(0)
    Q = orthogonal(12)
    basis = Basis(Q[:8], Q[:6])
    linears = [nn.Linear(12, 12, dtype=torch.float64) for _ in range(3)]
    block, packed = (SparseGradLinear.from_linear(linear, basis) for linear in linears[:2])
    packed.pack(torch.arange(0, 48, 3))
    model = nn.Sequential(block, nn.GELU(), packed, nn.GELU(), linears[2])
    groups = param_groups(nn.Sequential(block, packed), k=K)
    plain = {"params": [linears[2].weight], "sparse": True, "k": K}
    return model, SparseGradAdamW([*groups, plain], lr=0.01, bases={linears[2].weight: Basis(Q, Q)})


def selecting(model: nn.Module) -> list[nn.Parameter]:
    return [model[0].S, model[2].values, model[4].weight]  # type: ignore[index]


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def shares(step: int, rank: int) -> list[torch.Tensor]:
    """The micro-batches of a process, with 8 rows together. The second process has 2 or no rows in the first one."""
    first, second = batch(step).split([5, 3])
    cut = 3 if step % 2 else 5
    return [first[:cut], second[:2]] if rank == 0 else [first[cut:], second[2:]]


def run(model: nn.Module, optimizer: SparseGradAdamW, batches: Callable[[int], list[torch.Tensor]], n: int) -> None:
    for step in range(STEPS):
        for number, micro_batch in enumerate(batches(step)):
            waits = n > 1 and number == 0  # gradients are averaged once a step
            with model.no_sync() if waits else nullcontext():  # type: ignore[operator, attr-defined]
                (model(micro_batch).square().sum() * n / 96).backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, optimizer = build()
    run(nn.parallel.DistributedDataParallel(model), optimizer, partial(shares, rank=rank), 2)
    touched = [optimizer.touched(parameter) for parameter in selecting(model)]
    torch.save({"model": model.state_dict(), "touched": touched}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_on_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    results: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model, optimizer = build()
    run(model, optimizer, lambda step: [batch(step)], 1)
    for name, value in model.state_dict().items():
        assert torch.equal(results[0]["model"][name], results[1]["model"][name])
        torch.testing.assert_close(results[0]["model"][name], value, rtol=1e-10, atol=1e-12)
    assert (
        results[0]["touched"]
        == results[1]["touched"]
        == [optimizer.touched(parameter) for parameter in selecting(model)]
    )
