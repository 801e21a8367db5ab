"""DistributedDataParallel with two processes: one selection from the averaged gradient, the same on both."""

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
    linears = [nn.Linear(12, 12, dtype=torch.float64) for _ in range(2)]
    layers = [SparseGradLinear.from_linear(linear, basis) for linear in linears]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1])
    return model, SparseGradAdamW(param_groups(model, k=K), lr=0.01)


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
    touched = [optimizer.touched(model[i].S) for i in (0, 2)]  # type: ignore[index]
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
    assert results[0]["touched"] == results[1]["touched"] == [optimizer.touched(model[i].S) for i in (0, 2)]
