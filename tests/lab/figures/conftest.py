"""Figures of a tiny model, and its model and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.figures.folder import read
from sparsegrad_lab.figures.setup import Setup, load_setup
from sparsegrad_lab.run.settings import RunArguments

Words = Callable[..., list[str]]

SHORT = ["--figures.steps", "4", "--figures.points", "2", "--figures.batches", "1"]


@pytest.fixture(scope="session")
def figures_of(words: Words) -> Words:
    """Return arguments for `sparsegrad figures` with the tiny model; figures have no epochs."""

    def figures(output: Path, *more: str) -> list[str]:
        found = words(output)[1:]
        place = found.index("--training.epochs")
        return ["figures", *found[:place], *found[place + 2 :], *SHORT, *more]

    return figures


@pytest.fixture(scope="session")
def folder(figures_of: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures as the command writes them; tests must not change them."""
    output = tmp_path_factory.mktemp("figures") / "tiny"
    assert main(figures_of(output)) == 0
    return output


@pytest.fixture(scope="session")
def data(folder: Path) -> dict[str, Any]:
    return read(folder)


@pytest.fixture
def setup(arguments: Callable[..., RunArguments], tmp_path: Path) -> Setup:
    """Model and batches without dropout, so that a gradient can be taken twice."""
    loaded = load_setup(arguments(tmp_path), None)
    for module in loaded.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return loaded
