"""Generate text with a causal language model: batches of prompts, greedy or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .library_logs import suppress_library_logs

_TAIL = 16


class RowSampling(LogitsProcessor):
    """Lets greedy decoding sample each row from a random stream of its own.

    The argmax of `scores / temperature + Gumbel noise` is a sample from `softmax(scores / temperature)`. With a stream
    for each row, a row's text does not depend on the other rows of its batch.

    Args:
        temperatures: one a row; 0: greedy.
        seeds: one a row.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[int]) -> None:
        self.temperatures, self.seeds = temperatures, seeds
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def of(self, rows: Sequence[int]) -> RowSampling:
        """Return the sampling of some of the rows, from the beginning of their streams."""
        return RowSampling([self.temperatures[row] for row in rows], [self.seeds[row] for row in rows])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) whose argmax is the sampled token."""
        found = scores.float()
        for row, (temperature, generator) in enumerate(zip(self.temperatures, self.generators, strict=True)):
            if temperature > 0:
                noise = -torch.empty(found.shape[1]).exponential_(generator=generator).log()
                found[row] = found[row] / temperature + noise.to(found.device)
        return found


class StopText(StoppingCriteria):
    """Ends a row that has generated a text, in whatever tokens.

    Args:
        tokenizer: of the model.
        text: at most as many characters as `_TAIL` tokens always have.
        prompt_length: tokens before the generated ones, padding included.
    """

    def __init__(self, tokenizer: Any, text: str, prompt_length: int) -> None:
        self.tokenizer, self.text, self.start = tokenizer, text, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return which rows end: (rows,)."""
        tails = self.tokenizer.batch_decode(input_ids[:, max(self.start, input_ids.shape[1] - _TAIL) :])
        return torch.tensor([self.text in tail for tail in tails], device=input_ids.device)


def generation_ends(model: Any) -> set[int]:
    """Return the end tokens in the model's generation config."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    *,
    sampling: RowSampling | None = None,
    streamer: Any = None,
    stop_text: str | None = None,
) -> list[str]:
    """Return the continuations of prompts, without special tokens and outer spaces.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        prompts: token ids; shorter ones are padded on the left.
        max_new_tokens: largest number of tokens of a continuation.
        ends: ids of the tokens that end a continuation.
        sampling: how to sample; None: greedy.
        streamer: a streamer of transformers that gets the tokens of a single prompt.
        stop_text: a text that ends a continuation, and is cut off with all that follows.
    """
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    device = next(model.parameters()).device
    ids = torch.tensor([[*[pad] * (length - len(prompt)), *prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    criteria = [] if stop_text is None else [StopText(tokenizer, stop_text, length)]
    with suppress_library_logs():
        generated = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            pad_token_id=pad, eos_token_id=list(ends) or None, streamer=streamer,
            stopping_criteria=StoppingCriteriaList(criteria),
            logits_processor=LogitsProcessorList([] if sampling is None else [sampling]),
        )  # fmt: skip
    texts: list[str] = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
    return [(text if stop_text is None else text.partition(stop_text)[0]).strip() for text in texts]
