"""Two processes with `SparseGradTrainer`: one calibration on the rows of both, and the same weights on both."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

STEPS = 3


def train(folder: str, **options: Any) -> dict[str, Any]:
    from trainers import CALIBRATION, adapted, arguments, rows, saved  # here: not before the environment is set

    from sparsegrad_peft.tuner.trainer import SparseGradTrainer

    trainer = SparseGradTrainer(
        model=adapted(dropout=0), args=arguments(folder, max_steps=STEPS, **options), train_dataset=rows(),
        calibration=CALIBRATION, density=0.2,
    )  # fmt: skip
    trainer.train()
    return {"model": saved(trainer.model), "processes": trainer.accelerator.num_processes}


def diverges_on_one(folder: str, rank: int) -> str:
    from trainers import CALIBRATION, adapted, arguments, rows

    from sparsegrad_peft.tuner.trainer import SparseGradTrainer, TrainingDivergedError

    class NotFinite(SparseGradTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if rank == 1 and self.state.global_step == 1 else loss

    trainer = NotFinite(model=adapted(), args=arguments(folder), train_dataset=rows(), calibration=CALIBRATION)
    with pytest.raises(TrainingDivergedError, match="loss of step 2 is nan") as error:
        trainer.train()
    return str(error.value)


def too_late(folder: str) -> str:
    from trainers import adapted, arguments, rows
    from transformers import Trainer

    from sparsegrad_peft.tuner.trainer import SparseGradCalibration

    trainer = Trainer(
        model=adapted(), args=arguments(folder), train_dataset=rows(), callbacks=[SparseGradCalibration()]
    )
    with pytest.raises(ValueError, match="already wrapped for 2 processes") as error:
        trainer.train()
    return str(error.value)


def worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, "per_device_train_batch_size": 2}
    result = train(folder, **options)
    torch.save({**result, "words": [diverges_on_one(folder, rank), too_late(folder)]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["processes"] == 2
    assert len([name for name in first["model"] if "sparsegrad_basis" in name]) == 24
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    # Sums over rows in another order: nearly the same statistics, and nearly the same training in the same bases.
    alone = train(str(tmp_path))["model"]
    for name in alone:
        U = alone[name]
        if "sparsegrad_basis" in name:  # up to signs, the same directions
            products = (U @ first["model"][name].T).abs()
            torch.testing.assert_close(products.diagonal(), torch.ones(len(U)), rtol=0, atol=0.05)
    assert first["words"] == second["words"]
