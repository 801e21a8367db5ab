"""The private methods of `transformers.Trainer` that the trainers override still have the form that they expect."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_get_train_sampler", ["train_dataset"]),
        ("_save_checkpoint", ["model", "trial"]),
        ("_clip_grad_norm", ["model"]),
        ("_get_grad_norm", ["model", "grad_norm"]),
        ("_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
        ("_load_optimizer_and_scheduler", ["checkpoint"]),
    ],
)
def test_private_methods_of_the_trainer(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == ["self", *parameters]
