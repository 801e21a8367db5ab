"""The two training runs: touched entries and update norms, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.figures.setup import Setup
from sparsegrad_lab.figures.training import relative_change, train_sparsegrad
from sparsegrad_lab.run.exit_codes import ExitCode
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_peft import Basis

Words = Callable[..., list[str]]


def test_touched_is_what_is_counted(data: dict[str, Any]) -> None:
    measured = data["touched"]
    assert measured["selection"] == {"density": 0.01}
    for role in ("up", "down"):
        curve, image = measured["touched"][role], measured["images"][role]
        assert curve[:2] == [0, pytest.approx(5 / 512)]
        assert curve == sorted(curve)
        assert len(curve) == 5
        assert curve[-1] == pytest.approx(np.isfinite(image).sum() / 512)  # few enough entries that a cell is one
        assert set(image[np.isfinite(image)].tolist()) == {1.0}


def test_sparsegrad_run(setup: Setup, arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """In the original space only selected entries move, so the moved entries are the touched ones."""
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    ends: dict[str, Tensor] = {}
    name = setup.shown_layers["down"]

    def advance() -> None:
        ends[name] = setup.weight(name).detach().clone()

    run = arguments(tmp_path, "--adapter.k", "7")
    result = train_sparsegrad(setup, run, dict.fromkeys(setup.layers, Basis.identity()), 3, advance)
    moved = ends[name] != before[f"{name}.weight"]
    assert result["selection"] == {"k": 7}
    assert result["touched"]["down"][-1] == pytest.approx(int(moved.sum()) / 512)
    assert result["touched"]["down"][1] == pytest.approx(7 / 512)
    assert np.isfinite(result["images"]["down"]).tolist() == moved.tolist()
    change = (ends[name] - before[f"{name}.weight"]).norm() / before[f"{name}.weight"].norm()
    group = next(group for group, names in setup.groups.items() if name in names)
    assert result["norms"][group][0] == pytest.approx(float(change))
    assert all(torch.equal(value, before[key]) for key, value in setup.model.state_dict().items())


def test_update_norms(data: dict[str, Any]) -> None:
    for run in data["runs"].values():
        assert len(run["losses"]) == 4
        assert [len(norms) for norms in run["norms"].values()] == [2, 2]
        assert all(0 < norm < 1 for norms in run["norms"].values() for norm in norms)
    assert relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 6.5]])) == 0.5


def test_training_that_diverges(figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(figures_of(tmp_path / "out", "--training.learning_rate", "1e30")) == ExitCode.DIVERGED
    assert "; lower training.learning_rate, found 1e+30" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
