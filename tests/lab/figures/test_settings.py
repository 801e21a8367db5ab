"""Settings of the figures, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.figures.settings import FiguresArguments
from sparsegrad_lab.run.exit_codes import ExitCode, RefusedError
from sparsegrad_lab.run.settings import RunArguments

Words = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("steps", "points", "measured"), [(60, 4, [0, 20, 30, 40, 60]), (4, 3, [0, 2, 4]), (2, 2, [0, 1, 2])]
)
def test_measured_steps(steps: int, points: int, measured: list[int]) -> None:
    assert FiguresArguments(steps=steps, points=points).measured_steps == measured


def test_another_method() -> None:
    with pytest.raises(RefusedError, match="method: figures show SparseGrad only, found 'lora'; remove the setting"):
        FiguresArguments().check(RunArguments(method="lora"))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--figures.steps", "1"), "figures.steps must be at least 2, found 1"),
        (("--figures.points", "1"), "figures.points must be at least 2, found 1"),
        (("--figures.points", "9"), "figures.points must be at most 5 with 4 training steps, found 9; lower"),
        (("--figures.batches", "0"), "figures.batches must be at least 1, found 0"),
        (("--figures.layer", "-1"), "figures.layer must be at least 0, found -1"),
        (("--figures.layer", "2"), "figures.layer: expected the number of a block with layers to adapt, 0, 1; found 2"),
        (("--seeds", "[1, 2]"), "seeds: figures show one run, found [1, 2]; give one seed"),
        (("--training.precision", "bf16"), "training.precision: figures measure gradients in fp32, found 'bf16'"),
        (("--weight_decay", "0.1"), "training.weight_decay (--weight_decay): figures do not read it; leave it out"),
        (("--push_to_hub", "me/x"), "push_to_hub: figures do not read it; leave it out"),
        (("--training.batch_size", "0"), "training.batch_size must be at least 1, found 0"),
        (("--adapter.c", "99"), "found 99"),
        (("--figures.redraw", "true"), "figures.json: no such file, so there is nothing to redraw"),
    ],
)
def test_refused(
    more: tuple[str, ...],
    expected: str,
    figures_of: Words,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needs_files = more[0] == "--figures.redraw"  # the figures that are there
    assert main(figures_of(tmp_path / "out", *more)) == (ExitCode.FAILED if needs_files else ExitCode.REFUSED)
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
