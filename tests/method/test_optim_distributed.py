"""DistributedDataParallel with two processes: a block, packed values and a plain weight train as in one process."""

from __future__ import annotations

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


def run(model: nn.Module, optimizer: SparseGradAdamW, rows: slice) -> None:
    for step in range(STEPS):
        model(batch(step)[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, optimizer = build()
    run(nn.parallel.DistributedDataParallel(model), optimizer, slice(4 * rank, 4 * rank + 4))
    touched = [optimizer.touched(parameter) for parameter in selecting(model)]
    torch.save({"model": model.state_dict(), "touched": touched}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_on_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    results: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model, optimizer = build()
    run(model, optimizer, slice(None))
    for name, value in model.state_dict().items():
        assert torch.equal(results[0]["model"][name], results[1]["model"][name])
        torch.testing.assert_close(results[0]["model"][name], value, rtol=1e-10, atol=1e-12)
    assert (
        results[0]["touched"]
        == results[1]["touched"]
        == [optimizer.touched(parameter) for parameter in selecting(model)]
    )
