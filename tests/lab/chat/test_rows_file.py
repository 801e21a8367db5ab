"""The file of JSON lines: whole lines only, one writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsegrad_lab.chat.rows_file import open_rows


def test_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with open_rows(path) as file:
        file.append({"a": "ä"})
        with pytest.raises(FileExistsError, match=r"another process writes this file"), open_rows(path):
            pass
    with open_rows(path) as file:
        assert file.rows == [{"a": "ä"}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nno json\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: "), open_rows(path):
        pass
    assert path.read_text(encoding="utf-8").count("\n") == 3
