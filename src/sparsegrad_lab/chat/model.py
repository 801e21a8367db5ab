"""A language model that answers conversations: of a finished run, of an adapter, or pretrained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TextStreamer

import sparsegrad_peft.tuner  # noqa: F401  # registers SparseGrad, so that PEFT can load its adapters

from ..run.adapter_files import check_adapter
from ..run.finished_run import load_adapter, open_run, read_run
from ..tasks.conversations import Message
from ..tasks.generation import RowSampling, generate, generation_ends
from ..tasks.kinds.language import LanguageKind
from ..tasks.kinds.writer import Writer
from ..tasks.model_folder import model_path
from ..tasks.pretrained import check_causal, load_config, load_tokenizer
from ..tasks.task import LANGUAGE, Task

logger = logging.getLogger(__name__)

_COLUMNS = ("conversation",)


class _Stream(TextStreamer):
    """Hands on the text of an answer as it grows, up to a stop text.

    Args:
        tokenizer: of the model.
        show: gets the words.
        stop: a text that ends the answer; None: no such text.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None], stop: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self._stop, self._held = show, stop or "", ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on the next words. What may be the beginning of the stop text is held back."""
        text, stop, _ = (self._held + text).partition(self._stop) if self._stop else (self._held + text, "", "")
        begun = range(len(self._stop), 0, -1) if not (stop or stream_end) else ()
        held = next((length for length in begun if text.endswith(self._stop[:length])), 0)
        self._held = text[len(text) - held :]
        self._show(text[: len(text) - held])


@dataclass(frozen=True)
class ChatModel:
    """A model, and how conversations are written for it."""

    name: str
    model: Any
    tokenizer: Any
    writer: Writer
    base_name: str | None = None
    "the pretrained model that was trained; None: this is a pretrained model"
    adapter_off: bool = False
    "answer without the adapter"
    weights: Path | None = None
    "folder of the trained weights; None: this is a pretrained model"

    @property
    def context(self) -> int | None:
        """Largest number of tokens of a conversation; None if the config does not state it."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return found

    @property
    def _stop(self) -> str | None:
        """Where an answer ends: without a chat template, a model may go on to write the user's next message."""
        return None if self.writer.templated else "\n\nHuman:"

    def base(self) -> ChatModel | None:
        """The model before it was trained; it shares the weights of an adapter's model. None for a pretrained model."""
        if self.base_name is None:
            return None
        if isinstance(self.model, PeftModel):
            return replace(self, name=self.base_name, adapter_off=True, base_name=None, weights=None)
        return open_model(self.base_name)

    def answer(
        self, conversations: Sequence[Sequence[Message]], max_new_tokens: int, sampling: RowSampling | None = None
    ) -> list[str]:
        """Return the next message of each conversation.

        Raises:
            ValueError: a conversation leaves no room for an answer in the model's context.
        """
        return self._generate(conversations, max_new_tokens, sampling=sampling)

    def stream(
        self, conversation: Sequence[Message], max_new_tokens: int, show: Callable[[str], None],
        sampling: RowSampling | None = None,
    ) -> str:  # fmt: skip
        """As `answer` for one conversation; `show` gets the words as they are generated."""
        streamer = _Stream(self.tokenizer, show, self._stop)
        (text,) = self._generate([conversation], max_new_tokens, sampling=sampling, streamer=streamer)
        return text

    def _generate(
        self, conversations: Sequence[Sequence[Message]], max_new_tokens: int, *, sampling: RowSampling | None,
        streamer: TextStreamer | None = None,
    ) -> list[str]:  # fmt: skip
        prompts = [self.writer.encode_prompt(list(messages)) for messages in conversations]
        rooms = [max_new_tokens] * len(prompts)
        if (context := self.context) is not None:
            rooms = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
            if min(rooms) < 1:
                raise ValueError(
                    f"the conversation has {max(map(len, prompts)):,} tokens, and the model's context is {context:,}; "
                    "shorten it"
                )
        # A row that the context shortens is a batch of its own: it must not shorten the others.
        whole = [row for row, room in enumerate(rooms) if room == max_new_tokens]
        batches = [whole] if whole else []
        batches += [[row] for row, room in enumerate(rooms) if room < max_new_tokens]
        ends = sorted(self.writer.end_tokens() | generation_ends(self.model))
        off: AbstractContextManager[Any] = self.model.disable_adapter() if self.adapter_off else nullcontext()
        texts: dict[int, str] = {}
        with off:
            for rows in batches:
                found = generate(
                    self.model, self.tokenizer, [prompts[row] for row in rows], rooms[rows[0]], ends,
                    stop_text=self._stop, streamer=streamer, sampling=None if sampling is None else sampling.of(rows),
                )  # fmt: skip
                texts.update(zip(rows, found, strict=True))
        return [texts[row] for row in range(len(prompts))]


def open_model(name: str) -> ChatModel:
    """Load the model of a finished run, an adapter's folder, or a pretrained model.

    Raises:
        FileNotFoundError: there is no such model, or the run is not finished.
        ValueError: it is not a language model, or its weights are damaged.
    """
    folder, plain = Path(name).expanduser(), False
    if folder.name == "adapter" and (folder.parent / "config.yaml").is_file():
        folder = folder.parent  # an adapter in its run
    base_name: str | None = None
    weights = None
    if (folder / "config.yaml").is_file():
        _, _, task = read_run(folder)
        if task.kind != LANGUAGE:
            raise ValueError(f"{name}: expected a run of a language model, found one of {task.kind} ({task.name})")
        run = open_run(folder)
        model, tokenizer, weights = run.model, run.processor, run.folder.weights
        base_name, plain = run.arguments.model, run.arguments.data.template == "plain"
    elif (folder / "adapter_config.json").is_file():
        base_name = check_adapter(folder).base_model_name_or_path
        if base_name is None:
            raise ValueError(
                f"{name}: adapter_config.json names no base_model_name_or_path, since the base is a local model; "
                "give the folder of the run, or write the base's folder there"
            )
        check_causal(base_name, load_config(model_path(base_name)))
        weights = folder
        tokenizer = load_tokenizer(folder if (folder / "tokenizer_config.json").is_file() else base_name)
        model = load_adapter(_pretrained(base_name, tokenizer), folder)
    else:
        check_causal(name, load_config(model_path(name)))  # a clear error if there is no such model
        tokenizer = load_tokenizer(name)
        model = _pretrained(name, tokenizer)
    if torch.cuda.is_available():
        model.cuda()
    writer = Writer(tokenizer, _COLUMNS, plain)
    if not writer.templated and not plain:
        logger.warning("%s has no chat template: conversations are written as Human: and Assistant: turns", name)
    return ChatModel(name, model.eval(), tokenizer, writer, base_name, weights=weights)


def _pretrained(name: str, tokenizer: Any) -> Any:
    return LanguageKind().load_model(name, Task("chat", _COLUMNS, None, (), {}, kind=LANGUAGE), tokenizer)
