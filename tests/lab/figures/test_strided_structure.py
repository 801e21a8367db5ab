"""Figure 3: the kinds of tokens, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsegrad_lab.figures.setup import ZERO_ROW_BATCHES, load_setup
from sparsegrad_lab.figures.strided_structure import TokenKind, classify, kind_shares
from sparsegrad_lab.run.settings import RunArguments


def test_zero_rows(data: dict[str, Any], arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """Padding has no gradient; in the last block only the first token of each row has one."""
    batch = next(load_setup(arguments(tmp_path), None).batches(ZERO_ROW_BATCHES))
    mask = batch["attention_mask"]
    assert 0 < mask.sum() < mask.numel()  # some padding
    last = mask.clone()
    last[:, 0] = TokenKind.live
    tokens = data["rows"]["tokens"]
    assert tokens["middle"].tolist() == (TokenKind.live * mask).tolist()
    assert tokens["last"].tolist() == last.tolist()
    padding = 1 - float(mask.sum()) / mask.numel()
    first = data["rows"]["shares"][0]
    assert first["middle"] == pytest.approx({"padding": padding, "unread": 0, "live": 1 - padding, "live_padding": 0},
                                            abs=1e-6)  # fmt: skip
    assert first["last"]["live"] == pytest.approx(8 / mask.numel(), abs=1e-6)
    assert [point["step"] for point in data["rows"]["shares"]] == [0, 2, 4]
    assert all(point[key]["live_padding"] == 0 for point in data["rows"]["shares"] for key in ("middle", "last"))


def test_token_kinds() -> None:
    kinds = classify(torch.tensor([[True, False, False, True]]), torch.tensor([[1, 1, 0, 0]]))
    assert kinds.tolist() == [[TokenKind.live, TokenKind.unread, TokenKind.padding, TokenKind.live_padding]]
    assert kind_shares([kinds, torch.full((1, 4), TokenKind.padding)]) == {
        "padding": 0.625, "unread": 0.125, "live": 0.125, "live_padding": 0.125,
    }  # fmt: skip
