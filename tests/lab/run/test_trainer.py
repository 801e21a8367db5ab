"""The Trainer of a run: where it logs, and the loss of micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train

Arguments = Callable[..., RunArguments]


def test_tensorboard_and_rows_held_out(arguments: Arguments, tmp_path: Path) -> None:
    """The events outlive the checkpoints; the same run may be resumed without the report."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--report_to", "tensorboard", "--data.validation_file", "null", "--val_size", "0.25"]
    [result] = train(arguments(tmp_path / "run", *more), progress=False)
    assert result["rows"] == {"train": 36, "validation": 12}
    events = EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    scores = [event.value for event in events.Scalars("eval/accuracy")]
    assert scores == pytest.approx([evaluation["accuracy"] for evaluation in result["evaluations"]])
    [again] = train(arguments(tmp_path / "run", *more, "--report_to", "none"), progress=False)
    assert again == result


def test_a_package_that_is_not_installed(arguments: Arguments, tmp_path: Path) -> None:
    given = arguments(tmp_path / "run")
    given.report_to = "no_such_package"  # type: ignore[assignment]
    assert given.problems() == ["report_to: no_such_package is not installed; pip install no_such_package"]
