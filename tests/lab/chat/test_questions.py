"""Question files: MT-Bench-Inf as published, and errors that name the line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from real_models import data_folder
from sparsegrad_lab.chat.questions import REFERENCE_CATEGORIES, read_questions


def test_mt_bench_inf() -> None:
    found = read_questions(data_folder("mt_bench") / "mt_bench_inf.jsonl")
    assert len(found) == 80
    assert {len(question.turns) for question in found} == {2}
    assert set(Counter(question.category for question in found).values()) == {10}
    referenced = [question for question in found if question.category in REFERENCE_CATEGORIES and question.reference]
    assert {len(question.reference) for question in referenced} == {2}
    assert len(referenced) == 29  # of 30: question 123 has none


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": ["a"]}', r"line 1: expected a number or a text as question_id, found None"),
        ('{"question_id": 1, "turns": "a"}', r"line 1: expected a list of texts as turns, found 'a'"),
        ('{"question_id": 1, "turns": []}', r"line 1: expected a list of texts as turns, found '\[\]'"),
        ('{"question_id": 1, "turns": ["a"], "category": 3}', r"line 1: expected a text as category, found 3"),
        (
            '{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}',
            r"line 2: the question_id 1 is there",
        ),
        ("", r"expected questions, found none"),
    ],
)
def test_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.jsonl")
