"""Models without a chat template, and runs of a method that trains the weights themselves."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from chat_models import save_model
from sparsegrad_lab.chat.model import _Stream, open_model


def test_without_a_template_the_users_next_message_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path / "plain", template=None)
    with caplog.at_level(logging.WARNING):
        model = open_model(str(tmp_path / "plain"))
    assert "has no chat template: conversations are written as Human: and Assistant: turns" in caplog.text
    shown: list[str] = []
    stream = _Stream(model.tokenizer, shown.append, "\n\nHuman:")
    for words in ("a film\n", "\n", "one\n\n", "Hum", "an: and more"):
        stream.on_finalized_text(words)
    assert "".join(shown) == "a film\n\none"
    assert model.answer([[{"role": "user", "content": "what is warm"}]], 4)


def test_a_model_that_sees_both_sides(tiny_bert: Path) -> None:
    with pytest.raises(ValueError, match=r"is a bert, which sees the words that it has to predict"):
        open_model(str(tiny_bert))


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder"):
        open_model(str(tmp_path / "nothing"))
