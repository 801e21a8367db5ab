"""Write texts and conversations as token ids, and label the tokens that a language model learns.

    text             the text and the end-of-text token; all of it is learnt
    prompt, answer   with a space between; the answer and the end-of-text token are learnt
    conversation     "Human: ...", blank line, "Assistant: ..."; the assistant's turns are learnt

The last two are written with the tokenizer's chat template if it has one. What the template writes after a generation
prompt is learnt up to the end mark, so that generation stops there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from jinja2 import TemplateError

from ..conversations import CONVERSATION_COLUMNS, Message, prompt_conversation, turns

IGNORED = -100
"""Label of a token that is not learnt, as PyTorch's cross entropy expects it."""

Pieces = list[tuple[str, bool]]
"""Parts of a text, and whether each is learnt."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "answer"


@dataclass(frozen=True)
class Writer:
    """Writes rows for a tokenizer.

    Args:
        tokenizer: a fast tokenizer, which reports the position of a token in the text.
        columns: the task's text columns.
        plain: do not use the chat template.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """

    tokenizer: Any
    columns: tuple[str, ...]
    plain: bool = False

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"expected a fast tokenizer, found {type(self.tokenizer).__name__}; save it as tokenizer.json"
            )

    @property
    def templated(self) -> bool:
        """True if rows are written with the chat template."""
        chats = len(self.columns) == 2 or self.columns[0] in CONVERSATION_COLUMNS
        return chats and not self.plain and self.tokenizer.chat_template is not None

    def encode_row(self, row: Mapping[str, Any], max_length: int | None = None) -> tuple[list[int], list[int]]:
        """Return token ids and labels of a training row, truncated to `max_length`.

        Labels are the token ids, or -100 for tokens that are not learnt.
        """
        first = row[self.columns[0]]
        if isinstance(first, str) and len(self.columns) == 1:
            return self._encode([(first + self._end, True)], max_length)
        messages = first if isinstance(first, list) else turns([first, row[self.columns[1]]])
        if not self.templated:
            return self._encode(self._in_plain(messages), max_length)
        if _GENERATION_TAG.search(self.tokenizer.chat_template):
            return self._encode_tagged(messages, max_length)
        return self._encode(self._by_template(messages), max_length)

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Return the token ids of what a model continues.

        Args:
            prompt: a text, or a list of messages of which the user's last one is to be answered.

        Raises:
            ValueError: there are no tokens; or the messages are malformed.
        """
        if len(self.columns) == 1 and self.columns[0] not in CONVERSATION_COLUMNS:
            pieces: Pieces = [(prompt, False)]
        else:
            messages = prompt_conversation(prompt, self.columns[0])
            pieces = [(self._render(messages, True), False)] if self.templated else self._in_plain(messages)
        ids, _ = self._encode(pieces)
        if not ids:
            raise ValueError("the prompt is empty, and the tokenizer adds no token before a text; give a longer prompt")
        return ids

    def end_tokens(self) -> set[int]:
        """Return the ids that end an answer: the end-of-text token, and the end mark of the chat template."""
        tokenizer, found = self.tokenizer, set()
        if tokenizer.eos_token_id is not None:
            found.add(tokenizer.eos_token_id)
        if self.templated:
            special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
            found |= special & set(tokenizer(self._end_mark, add_special_tokens=False).input_ids)
        return found

    def _encode(self, pieces: Pieces, max_length: int | None = None) -> tuple[list[int], list[int]]:
        """Return token ids and labels. A token belongs to the piece in which it begins; the first is never learnt."""
        encoded = self.tokenizer(
            "".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True
        )
        ends, length = [], 0
        for text, _ in pieces:
            length += len(text)
            ends.append(length)
        start = self._start
        ids, labels, piece = list(start), [IGNORED] * len(start), 0
        for token, (begin, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            while piece < len(ends) - 1 and begin >= ends[piece]:
                piece += 1
            ids.append(token)
            labels.append(token if pieces[piece][1] else IGNORED)
        labels[:1] = [IGNORED] * len(labels[:1])
        return ids[:max_length], labels[:max_length]

    @property
    def _end(self) -> str:
        return self.tokenizer.eos_token or ""

    @property
    def _start(self) -> list[int]:
        """The token that the tokenizer adds before a text; a chat template writes it itself."""
        first = self.tokenizer.bos_token_id
        return [first] if not self.templated and first is not None and self.tokenizer("a").input_ids[0] == first else []

    def _in_plain(self, messages: Sequence[Message]) -> Pieces:
        if len(self.columns) == 2 and [message["role"] for message in messages] in (["user"], ["user", "assistant"]):
            return self._prompt_and_answer(messages)
        pieces: Pieces = []
        for message in messages:
            content, gap = message["content"], "\n\n" if pieces else ""
            if message["role"] == "assistant":
                space = "" if content[:1].isspace() else " "
                pieces.append((f"{space}{content}{self._end}", message["learn"]))
            elif message["role"] == "system":
                pieces.append((f"{gap}System: {content}", False))
            else:
                pieces.append((f"{gap}Human: {content}\n\nAssistant:", False))
        return pieces

    def _prompt_and_answer(self, messages: Sequence[Message]) -> Pieces:
        prompt, *answers = (message["content"] for message in messages)
        pieces: Pieces = [(prompt, False)]
        for answer in answers:
            space = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
            pieces.append((f"{space}{answer}{self._end}", messages[1]["learn"]))
        return pieces

    def _by_template(self, messages: Sequence[Message]) -> Pieces:
        """Return the conversation in pieces: each answer with its end mark, and the text between answers.

        An answer begins where the prompt for it ends, as in generation.

        Raises:
            ValueError: the template leaves out a message, or writes an answer's prompt otherwise than in generation.
        """
        text: str = self._render(messages)
        _check_complete(messages, text)
        mark = self._end_mark
        pieces: Pieces = []
        done = 0
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:number], generation_prompt=True)
                answer = message["content"].strip() + mark
                end = text.find(answer, len(prompt)) + len(answer)
                if not text.startswith(prompt) or end < len(prompt) + len(answer):
                    raise ValueError(
                        "the chat template writes an answer differently from how it is generated after the prompt, so "
                        "the tokens to learn are unknown. Mark the answers with {% generation %} in the template, or "
                        "set data.template to plain"
                    )
                pieces += [(text[done : len(prompt)], False), (text[len(prompt) : end], message["learn"])]
                done = end
        return [*pieces, (text[done:], False)]

    @cached_property
    def _end_mark(self) -> str:
        """What the template writes after an answer, up to the first special token."""
        tail: str = self._render(turns([_ANSWER, _ANSWER])).rpartition(_ANSWER)[2]
        tokens = [added.content for added in self.tokenizer.added_tokens_decoder.values() if added.special]
        special = re.search("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)), tail)
        return tail[: special.end()] if special else tail

    def _encode_tagged(self, messages: Sequence[Message], max_length: int | None) -> tuple[list[int], list[int]]:
        """Encode with a template that marks the answers with `{% generation %}`."""
        _check_complete(messages, self._render(messages))
        encoded = self._render(messages, tokenize=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        learnt = [message["learn"] for message in messages if message["role"] == "assistant"]
        if not all(learnt):
            runs = [(bool(marked), len(list(run))) for marked, run in groupby(mask)]
            if sum(marked for marked, _ in runs) != len(learnt):
                raise ValueError(
                    "the chat template's {% generation %} blocks do not match the answers, so those without loss are "
                    "unknown; set data.template to plain"
                )
            flags = iter(learnt)
            mask = [kept for marked, length in runs for kept in [marked and next(flags)] * length]
        labels = [token if kept else IGNORED for token, kept in zip(ids, mask, strict=True)]
        return ids[:max_length], labels[:max_length]

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False, tokenize: bool = False) -> Any:
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                plain, tokenize=tokenize, return_dict=tokenize, return_assistant_tokens_mask=tokenize,
                add_generation_prompt=generation_prompt,
            )  # fmt: skip
        except TemplateError as error:
            raise ValueError(
                f"the chat template refuses a conversation of {', '.join(message['role'] for message in plain)} "
                f"({error}); set data.template to plain"
            ) from error


def _check_complete(messages: Sequence[Message], text: str) -> None:
    """Raise ValueError if a message is missing in the text of the conversation."""
    for message in messages:
        if message["content"].strip() not in text:
            raise ValueError(
                f"the chat template leaves out or changes the text of a {message['role']} message; set data.template "
                "to plain"
            )
