"""Data and arguments for the tests that train with a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from helpers import tiny_batch
from sparsegrad_peft import CalibrationConfig

CALIBRATION = CalibrationConfig.paper(n_steps=8)
"More steps than an epoch of the data has batches; with dropout."


def rows(kind: str = "bert", n: int = 24) -> list[dict[str, Tensor]]:
    whole = tiny_batch(kind, n)
    return [{name: values[i] for name, values in whole.items()} for i in range(n)]


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    chosen = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, **options,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **chosen)


def saved(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and bases."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def losses(trainer: Any) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
