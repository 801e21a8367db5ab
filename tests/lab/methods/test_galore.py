"""Method galore: a resumed run ends like one that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train

Arguments = Callable[..., RunArguments]


class InterruptAt(TrainerCallback):
    """Raises KeyboardInterrupt after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_resume(arguments: Arguments, tmp_path: Path) -> None:
    """The checkpoint's optimizer state holds an object per layer, which `torch.load` refuses unless it is allowed."""
    pytest.importorskip("galore_torch")
    options = ("--method", "galore", "--adapter.rank", "2")
    (expected,) = train(arguments(tmp_path / "whole", *options), progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(arguments(tmp_path / "resumed", *options), progress=False, callbacks=[InterruptAt(8)])
    (found,) = train(arguments(tmp_path / "resumed", *options), progress=False)
    assert found["resumed"]
    assert found["scores"] == expected["scores"]
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_weight_decay_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    """The Trainer gives GaLore's groups none."""
    pytest.importorskip("galore_torch")
    with pytest.raises(ValueError, match=r"training.weight_decay"):
        train(arguments(tmp_path / "run", "--method", "galore", "--training.weight_decay", "0.1"), progress=False)
