"""Tiny models, data and arguments for the tests that train with a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import batch, make
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import set_seed

from sparsegrad_peft import CalibrationConfig, SparseGradConfig

CALIBRATION = CalibrationConfig(n_steps=8)
"More steps than an epoch of the data has batches; with dropout."


def rows(kind: str = "bert", n: int = 24) -> list[dict[str, Tensor]]:
    whole = batch(kind, n)
    return [{name: values[i] for name, values in whole.items()} for i in range(n)]


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    chosen = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, **options,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **chosen)


def adapted(kind: str = "bert", *, dropout: float = 0.1, low_cpu_mem_usage: bool = False, **options: Any) -> PeftModel:
    """Not calibrated, with a trained head where there is one."""
    base = make(kind)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    task = {"task_type": "SEQ_CLS"} if kind == "bert" else {"task_type": "CAUSAL_LM"}
    set_seed(0)
    config = SparseGradConfig(**{"c": 0.5, "r": 0.25, **task, **options})
    return get_peft_model(base, config, low_cpu_mem_usage=low_cpu_mem_usage)


def saved(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and bases."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def losses(trainer: Any) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def check_equal(found: Any, expected: Any, where: str = "") -> None:
    """To the bit, whatever is inside."""
    assert type(found) is type(expected), where
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            check_equal(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            check_equal(one, other, f"{where}[{i}]")
    else:
        assert found == expected, where
