"""DeepSpeed ZeRO with two real processes: whole cores train as in one process, and `k` is refused by name."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groups_of_processes import free_port, message_of, run_in_processes, set_launcher_environment
from helpers import orthogonal
from sparsegrad_peft import Basis, SparseGradAdamW, SparseGradLinear, param_groups

pytest.importorskip(
    "deepspeed", reason="the extra deepspeed is not installed: pip install 'sparsegrad-peft[deepspeed]'"
)

STEPS, ROWS = 5, 8


def build() -> nn.Module:
    torch.manual_seed(0)
    Q = orthogonal(12, dtype=torch.float32)
    layers = [SparseGradLinear.from_linear(nn.Linear(12, 12), Basis(Q[:8], Q[:6])) for _ in range(2)]
    layers[1].pack(torch.arange(0, 48, 3))
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def batch(step: int) -> Tensor:
    return torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(step))


def train(rank: int, stage: int, k: int | None) -> dict[str, Tensor]:
    import deepspeed

    model = build()
    optimizer = SparseGradAdamW(param_groups(model, k=k), lr=0.01)
    settings = {
        "train_batch_size": ROWS, "train_micro_batch_size_per_gpu": ROWS // 2, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        engine.backward(engine(batch(step)[rank * ROWS // 2 : (rank + 1) * ROWS // 2]).square().mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def work(rank: int, folder: Path, port: int) -> dict[int, Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    set_launcher_environment(rank, 2, port)
    warnings.simplefilter("ignore")
    import deepspeed.ops

    for name in ("shm_comm", "deepspeed_shm_comm"):  # an extension whose build can hang
        deepspeed.ops.__compatible_ops__[name] = False
    torch.distributed.init_process_group("gloo")
    found = {stage: (train(rank, stage, None), message_of(partial(train, rank, stage, 7))) for stage in (1, 2, 3)}
    torch.distributed.barrier()  # DeepSpeed keeps groups of its own: destroying this one would abort the process
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    return run_in_processes(2, partial(work, port=free_port()), tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whole_cores_train_as_in_one_process(results: list[dict[int, Any]], stage: int) -> None:
    model = build()
    optimizer = SparseGradAdamW(param_groups(model), lr=0.01)
    for step in range(STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(results[0][stage][0][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_selection_is_refused(results: list[dict[int, Any]], stage: int) -> None:
    for result in results:
        assert "found parts made by DeepSpeed ZeRO; train the cores whole" in result[stage][1]
