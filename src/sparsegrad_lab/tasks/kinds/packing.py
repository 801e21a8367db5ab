"""Pack short conversations into one row. Positions start anew at each, and attention does not cross between them.

`transformers` derives the block-diagonal mask from `position_ids` that start anew, if there is no attention mask and no
cache of keys and values (`find_packed_sequence_indices` in masking_utils.py).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset

from .writer import IGNORED

_CHECKED_TOKENS = 16
_ROUNDING = 0.1
"Largest share of the effect of earlier tokens on a text's logits that is taken for rounding, as with 4-bit weights."


def pack(features: Dataset, max_length: int) -> Dataset:
    """Put several rows into one, each into the fullest row that has room for it (best-fit decreasing).

    Args:
        features: rows of "input_ids" and "labels".
        max_length: largest number of tokens of a row.

    Returns:
        Rows of "input_ids", "labels" and "position_ids". The first token of a conversation is not learnt, since the one
        before it is another's last.
    """
    rows = sorted(features, key=lambda row: -len(row["input_ids"]))
    with_room: dict[int, list[list[Any]]] = defaultdict(list)
    packed: list[list[Any]] = []
    for row in rows:
        length = len(row["input_ids"])
        room = next((room for room in range(length, max_length + 1) if with_room[room]), None)
        if room is None:
            room = max_length
            packed.append([])
            with_room[room].append(packed[-1])
        chosen = with_room[room].pop()
        chosen.append(row)
        with_room[room - length].append(chosen)
    return Dataset.from_dict({
        "input_ids": [[token for row in together for token in row["input_ids"]] for together in packed],
        "labels": [[label for row in together for label in [IGNORED, *row["labels"][1:]]] for together in packed],
        "position_ids": [[at for row in together for at in range(len(row["input_ids"]))] for together in packed],
    })  # fmt: skip


@torch.no_grad()
def prepare_model(model: Any, ids: list[int]) -> None:
    """Switch off the model's cache, and check that it keeps packed conversations apart.

    Args:
        model: a language model, with or without an adapter.
        ids: some tokens.

    Raises:
        ValueError: attention crosses from one conversation into the next.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.use_cache = False  # with a cache, transformers does not look for packed rows
    apart = "position_ids" in inspect.signature(base.forward).parameters
    training = model.training
    model.eval()
    try:
        apart = apart and _keeps_apart(model, ids[:_CHECKED_TOKENS])
    finally:
        model.train(training)
    if not apart:
        raise ValueError(
            f"data.packing: attention of a {base.config.model_type} crosses between the conversations of a row; leave "
            "data.packing out"
        )


def _keeps_apart(model: Any, ids: list[int]) -> bool:
    """True if the tokens before a conversation change its logits by far less than they do without packing."""
    device = next(model.parameters()).device
    half = len(ids) // 2
    row = torch.tensor([ids], device=device)
    straight = torch.arange(len(ids), device=device)[None]
    restarted = torch.cat([straight[:, :half], straight[:, : len(ids) - half]], dim=1)
    alone = model(input_ids=row[:, half:]).logits[0]
    packed, continued = (model(input_ids=row, position_ids=at).logits[0, half:] for at in (restarted, straight))
    return bool((packed - alone).abs().max() <= _ROUNDING * (continued - alone).abs().max())
