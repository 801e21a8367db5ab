"""Losses that ignore the number of labels of a step, with several micro-batches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import CALIBRATION, arguments, losses, rows, saved
from transformers import Trainer

from helpers import check_equal, tiny_batch, uncalibrated_adapter
from sparsegrad_peft import calibrate_adapter
from sparsegrad_peft.tuner.trainer import SparseGradTrainer


def data(kind: str) -> list[dict[str, Any]]:
    """Rows; those of LLaMA have 4 to 10 labels each."""
    found = rows(kind)
    if kind == "llama":
        for i, row in enumerate(found):
            row["labels"] = row["labels"].clone()
            row["labels"][: i % 7] = -100
    return found


def train(kind: str, folder: Path, cls: type[Trainer] = SparseGradTrainer, **options: Any) -> Any:
    """Train with a constant learning rate of next to nothing, so that every step has the same weights."""
    model = uncalibrated_adapter(kind, dropout=0, **({"task_type": None} if kind == "vit" else {}))
    calibrate_adapter(model, [tiny_batch(kind)], n_steps=3, training=False, progress=False)
    args = arguments(folder, max_steps=3, learning_rate=1e-8, max_grad_norm=1e9, **options)
    trainer = cls(model=model, args=args, train_dataset=data(kind))
    trainer.train()
    return trainer


@pytest.mark.parametrize(("kind", "uses"), [("bert", False), ("t5", False), ("vit", True), ("llama", True)])
def test_micro_batches_are_one_batch(kind: str, uses: bool, tmp_path: Path) -> None:
    micro = train(kind, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole = train(kind, tmp_path, per_device_train_batch_size=8)
    assert micro.model_accepts_loss_kwargs is uses
    for found, expected in zip(losses(micro), losses(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_trainer_of_transformers_adds_them_up(tmp_path: Path) -> None:
    """The reason for all of this. If it fails, transformers has changed, and `trainer_loss` can go."""
    micro = train("bert", tmp_path, Trainer, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole = train("bert", tmp_path, Trainer, per_device_train_batch_size=8)
    for found, expected in zip(losses(micro), losses(whole), strict=True):
        assert found == pytest.approx([4 * value for value in expected], rel=1e-4)


def test_the_check_leaves_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With dropout, and thus with random numbers: the weights are those of a trainer that was told."""
    found = []
    for told in (False, True):
        model = uncalibrated_adapter()
        args = arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = SparseGradTrainer(model=model, args=args, train_dataset=rows(), calibration=CALIBRATION)
        trainer.model_accepts_loss_kwargs = not told
        with caplog.at_level(logging.INFO, logger="sparsegrad_peft"):
            trainer.train()
        found.append(saved(model))
    check_equal(*found)
    assert caplog.text.count("ignores num_items_in_batch") == 1


def test_a_batch_without_labels_tells_nothing(tmp_path: Path) -> None:
    """The first batch has no label, so its loss is zero for every number of labels; the second one decides."""
    trainer = SparseGradTrainer(
        model=uncalibrated_adapter("llama"), args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=rows("llama"),
    )  # fmt: skip
    batch = {name: torch.stack([row[name] for row in rows("llama", 4)]) for name in ("input_ids", "labels")}
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for inputs, known in ((empty, False), (batch, True)):
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(72))
        assert (trainer.loss_is_known, trainer.model_accepts_loss_kwargs) == (known, True)


class MeanOfRows(SparseGradTrainer):
    """The usual weighted loss, which ignores the number of labels and empties the batch."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def test_a_mean_of_ones_own_is_averaged_over_the_batches_of_a_step(tmp_path: Path) -> None:
    found = []
    for batches in (1, 4):
        args = arguments(
            tmp_path, max_steps=1, learning_rate=1e-8, gradient_accumulation_steps=batches, logging_steps=1,
            per_device_train_batch_size=8 // batches,
        )  # fmt: skip
        model = uncalibrated_adapter("bert", dropout=0)
        trainer = MeanOfRows(model=model, args=args, train_dataset=rows(), calibration=CALIBRATION)
        trainer.train()
        found.append(losses(trainer)[0])
    assert found[1] == pytest.approx(found[0], rel=0.05)


def _sum_of_labels(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / num_items_in_batch  # a TypeError for None


class DividesByLabels(SparseGradTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = _sum_of_labels(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("cls", "options"),
    [(SparseGradTrainer, {}), (SparseGradTrainer, {"compute_loss_func": _sum_of_labels}), (DividesByLabels, {})],
)
def test_losses_that_divide_by_the_number_of_labels_calibrate(cls: type, options: Any, tmp_path: Path) -> None:
    """A batch of calibration is a step of its own, whose labels are counted: the same bases as with the mean."""
    found = []
    for kind, more in ((cls, options), (SparseGradTrainer, {})):
        args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2)
        model = uncalibrated_adapter("bert", dropout=0)
        trainer = kind(model=model, args=args, train_dataset=rows(), calibration=CALIBRATION, **more)
        trainer.create_optimizer()
        found.append({name: value for name, value in saved(model).items() if "basis" in name})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-3, msg=name)


def test_a_loss_function_of_ones_own_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers asks its author to use `num_items_in_batch`. Its result is not corrected, and nothing is said."""
    found = []
    for cls in (SparseGradTrainer, Trainer):
        model = uncalibrated_adapter("bert", dropout=0)
        calibrate_adapter(model, [tiny_batch("bert")], n_steps=3, training=False, progress=False)
        args = arguments(tmp_path, max_steps=2, learning_rate=1e-8, gradient_accumulation_steps=4)
        with caplog.at_level(logging.INFO, logger="sparsegrad_peft"):
            trainer = cls(
                model=model, args=args, train_dataset=rows(),
                compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean(),
            )  # fmt: skip
            trainer.train()
        found.append(losses(trainer))
    assert "num_items_in_batch" not in caplog.text
    for own, expected in zip(*found, strict=True):
        assert own == pytest.approx(expected, rel=1e-5)
