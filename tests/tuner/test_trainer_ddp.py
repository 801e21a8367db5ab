"""Two processes with `SparseGradTrainer`: one calibration on the rows of both, and the same weights on both."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsegrad_peft import CalibrationConfig
from sparsegrad_peft.method.config import Trajectory, normalized_step

CALIBRATION = CalibrationConfig(n_steps=8, trajectory=Trajectory(1e-3, normalized_step), gram_dtype=torch.float64)
"A walk by rounded gradients: signs would differ where a gradient is nearly zero."


def train(folder: str, checkpoint: str | None = None, **options: Any) -> dict[str, Any]:
    from trainers import arguments, rows, saved

    from helpers import uncalibrated_adapter  # here: not before the environment is set
    from sparsegrad_peft.tuner.trainer import SparseGradTrainer

    model = uncalibrated_adapter(dropout=0)
    trainer = SparseGradTrainer(
        model=model, train_dataset=rows(), calibration=CALIBRATION, density=0.2,
        args=arguments(folder, max_steps=3, warmup_steps=2, save_strategy="steps", save_steps=2, **options),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    deltas = {n: m.get_delta_weight("default").detach() for n, m in model.named_modules() if hasattr(m, "sparsegrad_S")}
    return {"model": saved(model), "deltas": deltas, "processes": trainer.accelerator.num_processes}


def train_with_new_bases(folder: str, **options: Any) -> dict[str, Any]:
    from trainers import arguments, rows, saved

    from helpers import uncalibrated_adapter
    from sparsegrad_peft.tuner.trainer import SparseGradTrainer

    model = uncalibrated_adapter(dropout=0, c="full", r="full")
    trainer = SparseGradTrainer(
        model=model, args=arguments(folder, max_steps=3, warmup_steps=2, **options), train_dataset=rows(),
        calibration=CalibrationConfig(n_steps=12, trajectory=None), density=0.2, refresh_every=2,
    )  # fmt: skip
    trainer.train()
    state = {
        f"{name}.{part}": value
        for name, parameter in model.named_parameters()
        for part, value in trainer.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    deltas = {n: m.get_delta_weight("default").detach() for n, m in model.named_modules() if hasattr(m, "sparsegrad_S")}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"model": {**saved(model), **state}, "deltas": deltas, "losses": losses}


def diverges_on_one(folder: str, rank: int) -> str:
    from trainers import arguments, rows

    from helpers import uncalibrated_adapter
    from sparsegrad_peft.tuner.trainer import SparseGradTrainer, TrainingDivergedError

    class NotFinite(SparseGradTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if rank == 1 and self.state.global_step == 1 else loss

    trainer = NotFinite(
        model=uncalibrated_adapter(), args=arguments(folder), train_dataset=rows(), calibration=CALIBRATION
    )
    with pytest.raises(TrainingDivergedError, match="loss of step 2 is nan") as error:
        trainer.train()
    return str(error.value)


def too_late(folder: str) -> str:
    from trainers import arguments, rows
    from transformers import Trainer

    from helpers import uncalibrated_adapter
    from sparsegrad_peft.tuner.trainer import SparseGradCalibration

    trainer = Trainer(
        model=uncalibrated_adapter(), args=arguments(folder), train_dataset=rows(), callbacks=[SparseGradCalibration()]
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
    options = {
        "ddp_backend": "gloo", "ddp_find_unused_parameters": False, "per_device_train_batch_size": 2,
        "average_tokens_across_devices": False,  # with it, the Trainer doubles BERT's loss on two processes
    }  # fmt: skip
    result = train(folder, **options)
    torch.save(train_with_new_bases(folder, **options), f"{folder}/refreshed-{rank}.pt")
    torch.save({**result, "words": [diverges_on_one(folder, rank), too_late(folder)]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["processes"] == 2
    assert len([name for name in first["model"] if "sparsegrad_basis" in name]) == 12
    assert any(name.endswith("sparsegrad_S.default") and value.any() for name, value in first["model"].items())
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    # The same up to the order of summation, and the signs of the basis vectors.
    resumed = train(str(tmp_path / "resumed"), f"{tmp_path}/checkpoint-2")  # on one process
    for name, value in resumed["deltas"].items():
        torch.testing.assert_close(first["deltas"][name], value, rtol=1e-3, atol=1e-6, msg=name)
    alone = train(str(tmp_path / "alone"))
    for name, value in alone["model"].items():
        if "sparsegrad_basis" in name:
            same = (value.float() @ first["model"][name].float().T).abs()
            torch.testing.assert_close(same, torch.eye(len(value)), rtol=0, atol=1e-2)  # they are kept in bfloat16
        elif "sparsegrad_S" not in name:
            torch.testing.assert_close(first["model"][name], value, msg=name)
    for name, value in alone["deltas"].items():
        assert float((first["deltas"][name] - value).norm()) < 0.01 * float(value.norm()), name
    assert first["words"] == second["words"]

    # New bases after step 2: the same on both, to the bit, and what one process finds on all rows.
    first, second = (torch.load(tmp_path / f"refreshed-{rank}.pt", weights_only=True) for rank in range(2))
    assert any(name.endswith("sparsegrad_S.default.positions") for name in first["model"])
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    alone = train_with_new_bases(str(tmp_path))
    for name, value in alone["model"].items():
        if "sparsegrad_basis" in name:  # signs aside; the last directions are those of next to no gradient
            assert ((value @ first["model"][name].T).abs().diagonal()[:10] > 0.999).all(), name
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for name, value in alone["deltas"].items():
        # Second moments turn as the variances of uncorrelated entries, which depends on those directions too.
        assert float((first["deltas"][name] - value).norm()) < 0.2 * float(value.norm()), name
