"""The exit code says how a run ended, and a study reads it."""

from __future__ import annotations

import pytest
import torch

from sparsegrad_lab.run.exit_codes import ExitCode, RefusedError, exit_code_of, refusing, status_of
from sparsegrad_peft.tuner.trainer import TrainingDivergedError


def cpu_out_of_memory() -> BaseException:
    """The error that PyTorch raises for 8 exabytes of CPU memory."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (TrainingDivergedError("the loss of step 3 is nan"), ExitCode.DIVERGED, "diverged"),
        (ValueError("the loss of step 0 does not depend on any target weight"), ExitCode.FAILED, "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), ExitCode.OUT_OF_MEMORY, "out of memory"),
        (MemoryError(), ExitCode.OUT_OF_MEMORY, "out of memory"),
        (cpu_out_of_memory(), ExitCode.OUT_OF_MEMORY, "out of memory"),
        (RefusedError("this run cannot be started"), ExitCode.REFUSED, "failed"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "killed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_code_and_status(error: BaseException, code: ExitCode, status: str) -> None:
    assert exit_code_of(error) is code
    assert status_of(code) == status


def test_settings_that_do_not_fit() -> None:
    """They are refused as the same error, which may be of one process only."""
    wrong, failed = ValueError("expected at most 512 tokens"), OSError("no connection")
    for error, code in ((wrong, ExitCode.REFUSED), (failed, ExitCode.FAILED)):
        with pytest.raises(type(error)) as caught, refusing():
            raise error
        assert caught.value is error
        assert exit_code_of(error) is code


@pytest.mark.parametrize(("returncode", "status"), [(0, "finished"), (-9, "killed"), (77, "failed")])
def test_status_of_other_return_codes(returncode: int, status: str) -> None:
    assert status_of(returncode) == status
