"""The layers that are measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.figures import setup
from sparsegrad_lab.figures.setup import evenly_spaced, load_setup


def test_evenly_spaced() -> None:
    assert evenly_spaced(list("abc"), 6) == list("abc")
    assert evenly_spaced([str(n) for n in range(24)], 4) == ["0", "8", "15", "23"]


def test_packed_conversations_are_kept_apart(
    language_words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training: otherwise attention crosses between them, and the gradients are others."""
    prepared: list[Any] = []
    monkeypatch.setattr(setup, "prepare_model", lambda model, ids: prepared.append((model, ids)))
    loaded = load_setup(parse([*language_words(tmp_path)[1:], "--data.packing", "true"]), None)
    assert prepared == [(loaded.model, loaded.rows["input_ids"][0])]
