"""Chat formats: what each becomes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sparsegrad_lab.tasks.conversations import completed_prompt, prompt_conversation, training_conversation, turns

OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello."},
]
SYSTEM = {"role": "system", "content": "Be brief.", "learn": False}


@pytest.mark.parametrize("messages", [OPENAI, SHAREGPT])
def test_two_formats(messages: list[dict[str, Any]]) -> None:
    expected = [SYSTEM, *turns(["Hi", "Hello."])]
    assert training_conversation(messages, "") == expected
    assert prompt_conversation(messages, "") == expected[:2]
    assert prompt_conversation("Hi", "") == expected[1:2]


def test_a_last_question_is_not_learnt() -> None:
    later = [*OPENAI, {"role": "user", "content": "And?"}]
    assert training_conversation(later, "") == training_conversation(OPENAI, "")
    assert prompt_conversation(later, "")[-1]["content"] == "And?"


def test_a_message_of_weight_0_is_not_learnt() -> None:
    talk = [*OPENAI[1:2], {**OPENAI[2], "weight": 0}, *OPENAI[1:2], {**OPENAI[2], "weight": 1}]
    assert [message["learn"] for message in training_conversation(talk, "")] == [False, False, False, True]


def test_prompt_and_completion() -> None:
    """Only the completion is learnt, also if the prompt has an answer in it."""
    asked = [*OPENAI, {"role": "user", "content": "And?"}]
    answer = [{"role": "assistant", "content": "Well."}]
    for completion in (answer, "Well."):
        found = completed_prompt(asked, completion, "")
        assert [message["content"] for message in found] == ["Be brief.", "Hi", "Hello.", "And?", "Well."]
        assert [message["learn"] for message in found] == [False] * 4 + [True]
    assert completed_prompt("Hi", answer, "") == turns(["Hi", "Well."])


USER, ASSISTANT = OPENAI[1:]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], r"rows, line 3: expected a list of messages with role and content, found \[\]"),
        ("Hi", r"rows, line 3: expected a list of messages with role and content, found a text, 'Hi'"),
        ({"role": "user"}, r"expected a list of messages with role and content, found \{'role'"),
        (["Hi"], r"message 1: expected an object with role and content, found 'Hi'"),
        ([{"role": "tool", "content": "x"}], r"message 1: expected role to be one of system, user, .* found 'tool'"),
        ([{"role": ["user"], "content": "x"}], r"expected role to be one of"),
        ([{"text": "x"}], r"expected from to be one of"),
        ([{"role": "user", "content": None}], r"message 1: expected a text as content, found None"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"message 1: expected a text as content, found \[\{"),
        ([ASSISTANT], r"message 1: expected user and assistant in turn.*found assistant in place of user"),
        ([USER, USER], r"message 2: .*found user in place of assistant"),
        ([USER, ASSISTANT, OPENAI[0]], r"message 3: .*found system in place of user"),
        ([OPENAI[0]], r"expected a message of the user, found a system message only"),
        ([USER], r"expected a message of the assistant to learn, found none"),
        ([USER, {**ASSISTANT, "weight": 0}], r"expected a message of the assistant to learn, found none"),
        ([USER, {**ASSISTANT, "weight": 2}], r"message 2: expected weight to be 0 \(not learnt\) or 1, found 2"),
        ([USER, {**ASSISTANT, "weight": "0"}], r"message 2: expected weight to be 0 .*found '0'"),
        ([USER, {**ASSISTANT, "tool_calls": [{}]}], r"message 2: expected a text only, found tool_calls"),
    ],
)
def test_refused(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        training_conversation(value, "rows, line 3")
