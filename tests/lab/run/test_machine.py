"""A warning for bf16 on processors that are slow in it, and the identity of a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsegrad_lab.run import train as module
from sparsegrad_lab.run.machine import bf16_slowdown, slow_precision_warning
from sparsegrad_lab.run.settings import RunArguments


def test_only_slow_bf16_gives_a_warning() -> None:
    assert slow_precision_warning("fp32", lambda: 60.0) is None
    if not torch.accelerator.is_available():
        assert "60 times as long" in str(slow_precision_warning("bf16", lambda: 60.0))
        assert slow_precision_warning("bf16", lambda: 0.6) is None


def test_bf16_slowdown_is_measured() -> None:
    threads = torch.get_num_threads()
    assert 0.05 < bf16_slowdown() < 1000
    assert torch.get_num_threads() == threads


def test_a_run_prints_the_warning(
    arguments: Callable[..., RunArguments],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "slow_precision_warning", lambda precision: f"{precision} is slow here")
    asked = arguments(tmp_path / "run")
    module.train(asked)
    assert "fp32 is slow here" in capfd.readouterr().err
    device = json.loads((Path(asked.output) / "environment.json").read_text())["device"]
    assert torch.cuda.is_available() or device.endswith(torch.backends.cpu.get_cpu_capability())
