"""`SparseGradTrainer` stopped and resumed equals never stopped, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainers import CALIBRATION, arguments, rows, saved

from helpers import check_equal, uncalibrated_adapter
from sparsegrad_peft.tuner.trainer import SparseGradTrainer


class Counted(SparseGradTrainer):
    losses = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        return super().compute_loss(*args, **kwargs)


def make_trainer(folder: Path, density: float | None) -> Counted:
    args = arguments(
        folder, max_steps=6, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.02,
        warmup_steps=2, weight_decay=0.1,
    )  # fmt: skip
    return Counted(
        model=uncalibrated_adapter(), args=args, train_dataset=rows(), calibration=CALIBRATION, density=density,
        rest_learning_rate=1e-3,
    )  # fmt: skip


def log(trainer: SparseGradTrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("density", [None, 0.2])
@pytest.mark.parametrize("step", [2, 4], ids=["within an epoch", "within the next"])
def test_stopped_and_resumed_equals_never_stopped(density: float | None, step: int, tmp_path: Path) -> None:
    straight = make_trainer(tmp_path / "straight", density)
    straight.train()
    assert straight.losses == 2 + 8 + 6 * 2  # a check of the loss, calibration, steps
    at = tmp_path / "straight" / f"checkpoint-{step}"
    resumed = make_trainer(tmp_path / "resumed", density)
    resumed.train(resume_from_checkpoint=str(at))
    assert resumed.losses == 2 + (6 - step) * 2  # no second calibration
    check_equal(saved(resumed.model), saved(straight.model))
    check_equal(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    check_equal(resumed.lr_scheduler.state_dict(), straight.lr_scheduler.state_dict())
    assert log(resumed) == log(straight)
    assert [entry["step"] for entry in log(straight)] == [1, 2, 3, 4, 5, 6]
    assert all(entry["grad_norm"] > 0.02 for entry in log(straight))  # clipped in each step
    sparse = straight.optimizer.param_groups[0]["sparse"]
    assert sparse is (density is not None)
    states = straight.optimizer.state
    assert all(("positions" in states[p]) is sparse for p in straight.optimizer.param_groups[0]["params"])
    # Dropout and the steps after the checkpoint count: without its random numbers it is another run.
    if step == 2 and density is None:
        (at / "rng_state.pth").unlink()
        other = make_trainer(tmp_path / "other", density)
        other.train(resume_from_checkpoint=str(at))
        assert log(other) != log(straight)
