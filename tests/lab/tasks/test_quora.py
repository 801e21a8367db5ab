"""The task `quora`: files, broken bytes, splits, and the real pairs if SPARSEGRAD_DATA is set."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from sparsegrad_lab.tasks.load import load_task
from sparsegrad_lab.tasks.quora import load_quora
from sparsegrad_lab.tasks.settings import DataArguments

DATA = os.environ.get("SPARSEGRAD_DATA")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "qqp").mkdir()
    rows = [b"%d\tWhy %d?\tHow \xff %d?\t%d" % (row % 2, row, row, row) for row in range(10)]
    (tmp_path / "qqp" / "dev.tsv").write_bytes(b"\n".join(rows) + b"\n")
    return tmp_path


def test_broken_bytes_are_replaced_and_counted(pairs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        task = load_quora(pairs)
    assert task.splits["validation"][3] == {"question1": "Why 3?", "question2": "How \ufffd 3?", "label": 1}
    assert "dev.tsv: 10 lines have bytes that are not UTF-8" in caplog.text


def test_val_size_trains_on_the_evaluation_rows(pairs: Path) -> None:
    (pairs / "qqp" / "train.tsv").write_text("not read\n")
    splits = load_task("quora", DataArguments(folder=str(pairs), val_size=0.4)).splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "validation": 4}
    assert not set(splits["train"]["question1"]) & set(splits["validation"]["question1"])


def test_paraphrases_are_the_duplicates_without_a_label(pairs: Path) -> None:
    task = load_task("paraphrases", DataArguments(folder=str(pairs), val_size=0.4))
    rows = [row for split in task.splits.values() for row in split]
    assert sorted(row["question1"] for row in rows) == [f"Why {number}?" for number in (1, 3, 5, 7, 9)]
    assert task.labels is None
    assert not set(task.splits["train"]["question1"]) & set(task.splits["validation"]["question1"])
    assert set(rows[0]) == {"question1", "question2"}


def test_a_missing_file_is_named_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DataArguments(folder=str(tmp_path)).problems("quora") == [
        f"{tmp_path}: expected dev.tsv of the Quora pairs, in {tmp_path / 'qqp'}, {tmp_path}"
    ]
    monkeypatch.delenv("SPARSEGRAD_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"expected a folder with qqp/dev.tsv, in data.folder or in \$SPARSEGRAD_DATA"
    ):
        load_quora()


@pytest.mark.skipif(not DATA, reason="SPARSEGRAD_DATA is not set")
def test_the_real_pairs(caplog: pytest.LogCaptureFixture) -> None:
    """10,000 pairs, half of them duplicates; some lines have broken bytes."""
    splits = load_quora(val_size=0.2).splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8041, "validation": 1959}
    assert sum(splits["validation"]["label"]) == 979
    assert "lines have bytes that are not UTF-8" in caplog.text
