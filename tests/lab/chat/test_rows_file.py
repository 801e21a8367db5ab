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


@pytest.mark.parametrize(("content", "kept"), [('{"a": 1}\n{"a": 2}', 2), ('{"a": 1}\n{"a": ', 1), ('{"a": ', 0)])
def test_the_last_line_is_kept_if_it_is_whole(content: str, kept: int, tmp_path: Path) -> None:
    """Another program may write no last line break. Nothing changes before the first new row."""
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with open_rows(path) as file:
        assert [row["a"] for row in file.rows] == [1, 2][:kept]
        assert path.read_text(encoding="utf-8") == content
        for number in (3, 4):
            file.append({"a": number})
    with open_rows(path) as file:
        assert [row["a"] for row in file.rows] == [*[1, 2][:kept], 3, 4]


def test_half_of_a_pair_of_surrogates(tmp_path: Path) -> None:
    """A judge may write one; UTF-8 has no form for it."""
    path = tmp_path / "rows.jsonl"
    with open_rows(path) as file:
        file.append({"a": "so \ud83d"})
    with open_rows(path) as file:
        assert file.rows == [{"a": "so ?"}]
