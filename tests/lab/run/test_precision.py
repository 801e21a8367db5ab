"""bf16 on processors that are slow in it: said, not refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsegrad_lab.run import train as module
from sparsegrad_lab.run.precision import bf16_slowdown, slow_precision
from sparsegrad_lab.run.settings import RunArguments


def test_only_bf16_that_is_slow_is_spoken_of() -> None:
    assert slow_precision("fp32", lambda: 60.0) is None
    if not torch.accelerator.is_available():
        assert "60 times as long" in str(slow_precision("bf16", lambda: 60.0))
        assert slow_precision("bf16", lambda: 0.6) is None


def test_what_is_measured_is_of_this_processor() -> None:
    threads = torch.get_num_threads()
    assert 0.05 < bf16_slowdown() < 1000
    assert torch.get_num_threads() == threads


def test_a_run_says_it(
    arguments: Callable[..., RunArguments],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "slow_precision", lambda precision: f"{precision} is slow here")
    asked = arguments(tmp_path / "run")
    module.train(asked)
    assert "fp32 is slow here" in capfd.readouterr().err
    device = json.loads((Path(asked.output) / "environment.json").read_text())["device"]
    assert torch.cuda.is_available() or device.endswith(torch.backends.cpu.get_cpu_capability())
