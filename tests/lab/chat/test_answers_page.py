"""The page shows every answer as it is, with its rating."""

from __future__ import annotations

from sparsegrad_lab.chat.answers_page import answers_page
from sparsegrad_lab.chat.questions import Question
from sparsegrad_lab.chat.ratings import table_of


def test_answers_side_by_side() -> None:
    questions = [Question(81, "writing", ("What is it?", "Why?"))]
    models = {"lora": {81: ["```python\n<b>x</b>\n```", "No."]}, "sparsegrad": {81: ["A film.", "Yes."]}}
    rows = [
        {"question_id": 81, "category": "writing", "turn": turn, "model": name, "score": score}
        for turn, name, score in [(1, "lora", 3.0), (2, "lora", None), (1, "sparsegrad", 7.5), (2, "sparsegrad", 8.0)]
    ]
    page = answers_page(questions, models, rows, table_of(rows), "Mean rating.")
    assert "| all questions | 3.00 | 7.75 |" in page
    assert "## 81, writing\n\n### Turn 1\n\n```text\nWhat is it?\n```\n" in page
    assert "**lora**, rated 3\n\n````text\n```python\n<b>x</b>\n```\n````\n" in page  # a longer fence than the answer's
    assert "**lora**\n\n```text\nNo.\n```" in page  # without a rating
    assert "**sparsegrad**, rated 7.5\n\n```text\nA film.\n```" in page


def test_names_with_the_mark_of_tables() -> None:
    rows = [{"question_id": 1, "category": "a|b", "turn": 1, "model": "x|y", "score": 3.0}]
    page = answers_page([], {}, rows, table_of(rows), "")
    assert "|  | x\\|y |\n| --- | --- |\n" in page
    assert "\n| a\\|b | 3.00 |\n" in page


def test_names_are_no_html() -> None:
    question = Question("<b>1", "<script>", ("What?",))
    page = answers_page([question], {"<i>m": {"<b>1": ["A film."]}}, [], {}, "")
    assert "## &lt;b>1, &lt;script>" in page
    assert "**&lt;i>m**" in page
