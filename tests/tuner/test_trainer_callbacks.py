"""`SparseGradCalibration` in a plain `transformers.Trainer`, with the Trainer's own optimizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from trainers import CALIBRATION, arguments, losses, rows, saved
from transformers import Trainer

from helpers import check_equal, uncalibrated_adapter
from sparsegrad_peft import calibrate_adapter
from sparsegrad_peft.tuner.trainer import SparseGradCalibration


def plain_trainer(folder: Path, model: PeftModel, *, callback: bool = True, **options: Any) -> Trainer:
    args = arguments(folder, weight_decay=0.1, **options)
    callbacks = [SparseGradCalibration(CALIBRATION)] if callback else []
    return Trainer(model=model, args=args, train_dataset=rows(), callbacks=callbacks)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_as_if_calibrated_by_hand_beforehand(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, uncalibrated_adapter(low_cpu_mem_usage=low_cpu_mem_usage))
    if low_cpu_mem_usage:
        assert any(p.is_meta for p in trainer.model.parameters())
    trainer.train()
    grouped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert len(trainer.optimizer.state) == len(grouped)  # all of them have taken steps, and nothing else has

    model = uncalibrated_adapter()
    loader = plain_trainer(tmp_path, model, callback=False).get_train_dataloader()
    calibrate_adapter(model, loader, config=CALIBRATION, progress=False)
    by_hand = plain_trainer(tmp_path, model, callback=False)
    by_hand.train()
    check_equal(saved(trainer.model), saved(model))
    assert losses(trainer) == losses(by_hand)
    assert all(v.any() for name, v in saved(model).items() if "sparsegrad_S" in name)


def test_resumed(tmp_path: Path) -> None:
    straight = plain_trainer(tmp_path / "straight", uncalibrated_adapter(), save_strategy="steps", save_steps=2)
    straight.train()
    resumed = plain_trainer(tmp_path / "resumed", uncalibrated_adapter(), callback=True)
    seen = []
    resumed.model.register_forward_hook(lambda *_: seen.append(resumed.state.global_step))
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert seen == [2, 3]  # no step of calibration
    check_equal(saved(resumed.model), saved(straight.model))
    check_equal(resumed.optimizer.state_dict(), straight.optimizer.state_dict())


@pytest.mark.parametrize("wrapped", [{"world_size": 2}, {"fsdp": "full_shard"}, {"deepspeed": "config.json"}])
def test_too_late_in_a_wrapped_model(wrapped: dict[str, Any]) -> None:
    model = uncalibrated_adapter()
    before = saved(model)
    args: Any = SimpleNamespace(**{"world_size": 1, "fsdp": "", "deepspeed": None, "disable_tqdm": True, **wrapped})
    given = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "train_dataloader": None}
    with pytest.raises(ValueError, match=r"'default' is not calibrated, and the model is already wrapped for \d proc"):
        SparseGradCalibration().on_train_begin(args, None, None, **given)
    check_equal(saved(model), before)


def test_too_late_for_an_optimizer_that_has_trained(tmp_path: Path) -> None:
    model = uncalibrated_adapter(init_weights=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with pytest.warns(UserWarning, match="was not calibrated"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None)).train()
    again = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None),
        callbacks=[SparseGradCalibration()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="the optimizer has already trained"):
        again.train()


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    """For trainers whose loss is not the model's."""
    seen = []

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        seen.append(sorted(batch))
        loss: torch.Tensor = model(**batch).logits.square().mean()
        return loss

    trainer = plain_trainer(tmp_path, uncalibrated_adapter(), callback=False)
    trainer.add_callback(SparseGradCalibration(CALIBRATION, loss_fn))
    trainer.train()
    assert len(seen) == CALIBRATION.n_steps
    assert trainer.model.peft_config["default"].calibrated
