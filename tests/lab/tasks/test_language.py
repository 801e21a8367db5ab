"""How texts, answers and conversations are written, and which of their tokens are learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sparsegrad_lab.tasks.language import IGNORED, Writer
from tiny_runs import save_tokenizer

TALK = ["Who was warm?", "The film.", "And cold?", "The spring."]
PLAIN = "Human: Who was warm?\n\nAssistant: The film.{}\n\nHuman: And cold?\n\nAssistant: The spring.{}"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def learnt(writer: Writer, row: dict[str, Any]) -> str:
    _, labels = writer.encode(writer.row(row))
    found: str = writer.tokenizer.decode([label for label in labels if label != IGNORED])
    return found


def test_a_conversation(stories: Path) -> None:
    """With a real tokenizer, whose tokens begin with the space before a word."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    writer = Writer(tokenizer, ("conversation",))
    pieces = writer.row({"conversation": TALK})
    assert "".join(text for text, _ in pieces) == PLAIN.format("</s>", "</s>")
    assert learnt(writer, {"conversation": TALK}) == "The film.</s> The spring.</s>"
    ids, labels = writer.encode(pieces)
    assert ids == tokenizer(PLAIN.format("</s>", "</s>")).input_ids  # as the tokenizer writes it itself
    assert labels[0] == IGNORED
    # What generation begins with is what training had before the answer.
    prompt, _ = writer.encode([(writer.prompt(TALK[0]), False)])
    assert prompt == ids[: len(prompt)]
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert labels[len(prompt)] == ids[len(prompt)]
    # Letters that the tokenizer has not are several tokens of one place.
    assert learnt(writer, {"conversation": ["So?", "Ça 🙂"]}) == "Ça 🙂</s>"


def test_prompt_and_answer(tokenizer: Any) -> None:
    writer = Writer(tokenizer, ("prompt", "answer"))
    assert writer.row({"prompt": "was it", "answer": "warm"}) == [("was it", False), (" warm[SEP]", True)]
    assert writer.row({"prompt": "was it\n", "answer": "warm"}) == [("was it\n", False), ("warm[SEP]", True)]
    ids, labels = writer.encode(writer.row({"prompt": "the film", "answer": "was warm"}))
    assert tokenizer.decode(ids) == "the film was warm [SEP]"
    assert labels == [IGNORED, IGNORED, *ids[2:]]
    assert writer.encode(writer.row({"prompt": "the film", "answer": "was warm"}), 3) == (ids[:3], labels[:3])
    assert writer.prompt("the film") == "the film"


def test_a_whole_text(tokenizer: Any) -> None:
    """All but the first token, which nothing stands before."""
    writer = Writer(tokenizer, ("text",))
    ids, labels = writer.encode(writer.row({"text": "the film was warm"}))
    assert tokenizer.decode(ids) == "the film was warm [SEP]"
    assert labels == [IGNORED, *ids[1:]]


@pytest.mark.parametrize("columns", [("conversation",), ("prompt", "answer")])
def test_a_chat_template(columns: tuple[str, ...], stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = TEMPLATE
    row = {"conversation": TALK[:2], "prompt": TALK[0], "answer": TALK[1]}
    writer = Writer(tokenizer, columns)
    text = "".join(piece for piece, _ in writer.row(row))
    assert text == "<s>[INST] Who was warm? [/INST] The film.</s>"
    assert learnt(writer, row) == "The film.</s>"
    ids, _ = writer.encode(writer.row(row))
    assert ids.count(tokenizer.bos_token_id) == 1  # the template's own
    plain = Writer(tokenizer, columns, plain=True)
    assert "INST" not in "".join(piece for piece, _ in plain.row(row))
    assert "INST" not in "".join(piece for piece, _ in Writer(tokenizer, ("text",)).row({"text": "a"}))


def test_a_chat_template_that_writes_earlier_turns_anew(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(ValueError, match=r"writes earlier turns anew .*; set data.template to plain"):
        Writer(tokenizer, ("conversation",)).row({"conversation": TALK})
