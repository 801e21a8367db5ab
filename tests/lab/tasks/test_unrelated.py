"""Texts that are not trained on: a file's lines, or CoLA's sentences; a sample that is the same in each run."""

from __future__ import annotations

from pathlib import Path

import pytest

from real_models import data_folder
from sparsegrad_lab.tasks.unrelated import unrelated_texts


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n  \ntwo\n", encoding="utf-8")
    assert unrelated_texts(str(path)).splits["unrelated"]["text"][:] == ["one", "two"]
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"texts.txt: expected texts, one per line; found none"):
        unrelated_texts(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"texts.txt: expected UTF-8"):
        unrelated_texts(str(path))


def test_cola() -> None:
    data_folder("glue/CoLA")
    first, second = unrelated_texts("cola"), unrelated_texts("cola")
    assert len(first.splits["unrelated"]) == 256
    assert first.splits["unrelated"]["text"][:] == second.splits["unrelated"]["text"][:]
