"""How texts, answers and conversations are written, and which of their tokens are learnt."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sparsegrad_lab.tasks.conversations import Message, turns
from sparsegrad_lab.tasks.kinds.writer import IGNORED, Writer
from tiny_runs import save_tokenizer

TALK = turns(["Who was warm?", "The film.", "And cold?", "The spring."])
PLAIN = "Human: Who was warm?\n\nAssistant: The film.{}\n\nHuman: And cold?\n\nAssistant: The spring.{}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token }}[INST] <<SYS>>{{ m.content }}<</SYS>> "
    "{% elif m.role == 'user' %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{% if loop.index0 != 1 or messages[0].role != 'system' %}[INST] {% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think></think>{% endif %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
REWRITING = "{{ messages | length }}{{ messages[-1].content }}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture
def real_tokenizer(stories: Path) -> Any:
    """LLaMA's tokenizer: its tokens begin with the space before a word."""
    found = AutoTokenizer.from_pretrained(stories)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


def whole(writer: Writer, row: dict[str, Any]) -> str:
    text: str = writer.tokenizer.decode(writer.encode_row(row)[0])
    return text


def learnt(writer: Writer, row: dict[str, Any]) -> list[str]:
    """The runs of learnt tokens, as text."""
    _, labels = writer.encode_row(row)
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [writer.tokenizer.decode(run) for run in runs if run]


def test_a_conversation_without_a_template(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    writer = Writer(tokenizer, ("conversation",))
    row = {"conversation": TALK}
    ids, labels = writer.encode_row(row)
    assert ids == tokenizer(PLAIN.format("</s>", "</s>")).input_ids
    assert learnt(writer, row) == ["The film.</s>", "The spring.</s>"]
    assert labels[0] == IGNORED
    # Generation starts from exactly the tokens that precede the answer in training.
    prompt = writer.encode_prompt("Who was warm?")
    assert prompt == ids[: len(prompt)] == writer.encode_prompt(TALK[:1])
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert labels[len(prompt)] == ids[len(prompt)]
    system: list[Message] = [{"role": "system", "content": "Be brief.", "learn": False}]
    assert whole(writer, {"conversation": system + TALK[:2]}).startswith(
        "<s> System: Be brief.\n\nHuman: Who was warm?"
    )
    # The tokenizer writes unknown letters as several byte tokens at one position.
    assert learnt(writer, {"conversation": turns(["So?", "Ça 🙂"])}) == ["Ça 🙂</s>"]


def test_prompt_and_answer(tokenizer: Any) -> None:
    writer = Writer(tokenizer, ("prompt", "answer"))
    ids, labels = writer.encode_row({"prompt": "the film", "answer": "was warm"})
    assert tokenizer.decode(ids) == "the film was warm [SEP]"
    assert labels == [IGNORED, IGNORED, *ids[2:]]
    assert writer.encode_row({"prompt": "the film", "answer": "was warm"}, 3) == (ids[:3], labels[:3])
    assert writer.encode_row({"prompt": "the film\n", "answer": "was warm"}) == (ids, labels)
    assert writer.encode_prompt("the film") == ids[:2]
    assert writer.encode_row({"prompt": turns(["the film", "was warm"])}) == (ids, labels)  # as messages
    assert writer.encode_prompt(turns(["the film"])) == ids[:2]


def test_a_whole_text(tokenizer: Any) -> None:
    """All tokens but the first, which nothing precedes."""
    writer = Writer(tokenizer, ("text",))
    ids, labels = writer.encode_row({"text": "the film was warm"})
    assert tokenizer.decode(ids) == "the film was warm [SEP]"
    assert labels == [IGNORED, *ids[1:]]


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (
            LLAMA_2,
            "<s>[INST] Who was warm? [/INST] The film.</s>[INST] And cold? [/INST] The spring.</s>",
            ["The film.</s>", "The spring.</s>"],
        ),
        (
            CHATML,
            "<|im_start|>user\nWho was warm?<|im_end|>\n<|im_start|>assistant\nThe film.<|im_end|>\n"
            "<|im_start|>user\nAnd cold?<|im_end|>\n<|im_start|>assistant\nThe spring.<|im_end|>\n",
            ["The film.<|im_end|>", "The spring.<|im_end|>"],
        ),
        (
            TAGGED,
            "<|im_start|>user\nWho was warm?<|im_end|>\n<|im_start|>assistant\nThe film.<|im_end|>\n"
            "<|im_start|>user\nAnd cold?<|im_end|>\n<|im_start|>assistant\n<think></think>The spring.<|im_end|>\n",
            ["The film.<|im_end|>", "The spring.<|im_end|>"],
        ),
    ],
)
def test_the_mask_of_a_chat_template(template: str, text: str, answers: list[str], real_tokenizer: Any) -> None:
    """Token by token: the ids are those of the rendered text, and exactly the answers are learnt."""
    real_tokenizer.chat_template = template
    writer = Writer(real_tokenizer, ("messages",))
    row = {"messages": TALK}
    ids, labels = writer.encode_row(row)
    assert ids == real_tokenizer(text, add_special_tokens=False).input_ids
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    expected = [real_tokenizer.decode(real_tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
    assert learnt(writer, row) == expected
    only_last = [{**message, "learn": number == 3} for number, message in enumerate(TALK)]
    assert learnt(writer, {"messages": only_last}) == expected[1:]
    plain = Writer(real_tokenizer, ("messages",), plain=True)
    assert plain.encode_row(row)[0] == real_tokenizer(PLAIN.format("</s>", "</s>")).input_ids


def test_a_prompt_ends_where_the_answer_begins(real_tokenizer: Any) -> None:
    real_tokenizer.chat_template = CHATML
    writer = Writer(real_tokenizer, ("messages",))
    ids, labels = writer.encode_row({"messages": TALK})
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    assert writer.encode_prompt("Who was warm?") == ids[:first]
    # The assistant's last message is what a model is asked for.
    assert writer.encode_prompt(TALK) == writer.encode_prompt(TALK[:3])


def test_a_system_message(real_tokenizer: Any) -> None:
    real_tokenizer.chat_template = LLAMA_2
    system: list[Message] = [{"role": "system", "content": "Be brief.", "learn": False}]
    writer = Writer(real_tokenizer, ("messages",))
    row = {"messages": system + TALK[:2]}
    text = "<s>[INST] <<SYS>>Be brief.<</SYS>> Who was warm? [/INST] The film.</s>"
    assert writer.encode_row(row)[0] == real_tokenizer(text, add_special_tokens=False).input_ids
    assert learnt(writer, row) == ["The film.</s>"]


def test_prompt_and_answer_with_a_chat_template(real_tokenizer: Any) -> None:
    real_tokenizer.chat_template = LLAMA_2
    writer = Writer(real_tokenizer, ("prompt", "answer"))
    row = {"prompt": "Who was warm?", "answer": "The film."}
    text = "<s>[INST] Who was warm? [/INST] The film.</s>"
    assert writer.encode_row(row)[0] == real_tokenizer(text, add_special_tokens=False).input_ids
    assert learnt(writer, row) == ["The film.</s>"]
    assert "INST" not in whole(Writer(real_tokenizer, ("text",)), {"text": "a"})


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_generation_ends_at_the_end_mark(template: str, real_tokenizer: Any) -> None:
    mark = real_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Writer(real_tokenizer, ("messages",)).end_tokens() == {real_tokenizer.eos_token_id}
    real_tokenizer.chat_template = template
    assert Writer(real_tokenizer, ("messages",)).end_tokens() == {real_tokenizer.eos_token_id, mark}
    assert Writer(real_tokenizer, ("text",)).end_tokens() == {real_tokenizer.eos_token_id}


TRL_TEMPLATES = Path(str(getattr(find_spec("trl"), "origin", ""))).parent / "chat_templates"


@pytest.mark.skipif(not TRL_TEMPLATES.is_dir(), reason="trl is not installed")
@pytest.mark.parametrize(
    ("name", "mark", "before_the_last"),
    [
        ("qwen2_5", "<|im_end|>", ""),
        ("qwen3", "<|im_end|>", "<think>\n\n</think>\n\n"),  # earlier turns have no such block
        ("llama3", "<|eot_id|>", ""),
        ("gemma3", "<end_of_turn>", ""),
        ("phi3", "<|end|>", ""),
        ("qwen3_instruct_2507_training", "<|im_end|>", ""),  # with {% generation %}
    ],
)
def test_templates_of_the_field(name: str, mark: str, before_the_last: str, real_tokenizer: Any) -> None:
    real_tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>", "<|end|>"]})
    real_tokenizer.chat_template = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    writer = Writer(real_tokenizer, ("messages",))
    found = [answer.rstrip() for answer in learnt(writer, {"messages": TALK})]
    assert found == [f"The film.{mark}", f"{before_the_last}The spring.{mark}"]
    assert writer.end_tokens() == {real_tokenizer.eos_token_id, real_tokenizer.convert_tokens_to_ids(mark)}


@pytest.mark.skipif(not TRL_TEMPLATES.is_dir(), reason="trl is not installed")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("idefics3", r"leaves out or changes the text of a user message"),  # writes lists of parts only
        (
            "deepseekv3",
            r"writes an answer differently from how it is generated after the prompt",
        ),  # the prompt has <think>
    ],
)
def test_templates_of_the_field_that_are_refused(name: str, words: str, real_tokenizer: Any) -> None:
    real_tokenizer.chat_template = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        Writer(real_tokenizer, ("messages",)).encode_row({"messages": TALK})


def test_a_template_that_leaves_out_a_turn(real_tokenizer: Any) -> None:
    real_tokenizer.chat_template = REWRITING
    with pytest.raises(ValueError, match=r"leaves out or changes the text of a user message; set data.template"):
        Writer(real_tokenizer, ("conversation",)).encode_row({"conversation": TALK})


def test_a_template_that_refuses_the_conversation(real_tokenizer: Any) -> None:
    real_tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(ValueError, match=r"refuses a conversation of user, .* \(no user\); set data.template to"):
        Writer(real_tokenizer, ("conversation",)).encode_row({"conversation": TALK})


def test_an_empty_prompt(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"the prompt is empty, and the tokenizer adds no token before a text"):
        Writer(tokenizer, ("text",)).encode_prompt("")
