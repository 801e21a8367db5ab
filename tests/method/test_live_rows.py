"""Backward leaves out rows of the output's gradient that are exactly zero, and no others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from helpers import F64, orthogonal
from sparsegrad_peft import Basis, SparseGradLinear
from sparsegrad_peft.method import function
from sparsegrad_peft.method.live_rows import live_rows


def rows(n: int = 40, dead: tuple[int, ...] = (), width: int = 11) -> Tensor:
    delta = torch.randn(n, width, dtype=F64)
    delta[list(dead)] = 0
    return delta


def test_finds_the_rows_that_are_not_zero() -> None:
    found = live_rows(rows(8, dead=(0, 3, 7)))
    assert found is not None
    assert found.tolist() == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("dead", [(), (5,), (5, 6)])
def test_few_rows_are_not_worth_it(dead: tuple[int, ...]) -> None:
    assert live_rows(rows(40, dead)) is None


@pytest.mark.parametrize("value", [1e-320, -1e-320, math.nan, math.inf])
def test_a_row_with_anything_in_it_is_alive(value: float) -> None:
    """Also for the smallest number above zero, in a column that the quick check does not read."""
    delta = rows(8, dead=(1, 2, 3))
    delta[2, 10] = value
    found = live_rows(delta)
    assert found is not None
    assert found.tolist() == [0, 2, 4, 5, 6, 7]


def test_all_rows_zero_and_no_rows() -> None:
    found = live_rows(torch.zeros(4, 11))
    assert found is not None
    assert found.numel() == 0
    assert live_rows(torch.zeros(0, 11)) is None


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_dead", [0, 3, 17, 40])
@pytest.mark.parametrize("tokens", [40, 4])
def test_gradients_are_those_of_the_plain_products(
    prefer: str, train_weight: bool, packed: bool, n_dead: int, tokens: int
) -> None:
    torch.manual_seed(0)
    U, V = orthogonal(7, 3), orthogonal(11, 5)
    basis = Basis(U, V)
    layer = SparseGradLinear.from_linear(nn.Linear(7, 11, dtype=F64), basis, prefer=prefer)
    with torch.no_grad():
        layer.S.normal_()
    if packed:
        layer.S.data[:, 1] = 0
        layer.pack(torch.tensor([0, 2, 3, 5, 6, 8, 9, 11, 12, 14]))
    layer.weight.requires_grad_(train_weight)
    x = torch.randn(tokens, 7, dtype=F64, requires_grad=True)
    delta = rows(tokens, tuple(torch.randperm(tokens)[: min(n_dead, tokens)].tolist()))
    layer(x).backward(delta)

    S = layer.dense_core()
    W = layer.weight.detach() + V.T @ S @ U
    G = delta.T @ x.detach()
    G_tilde = V @ G @ U.T
    torch.testing.assert_close(x.grad, delta @ W)
    torch.testing.assert_close(layer.bias.grad, delta.sum(0))
    torch.testing.assert_close(layer.core.grad, G_tilde.reshape(-1)[layer.positions.long()] if packed else G_tilde)
    if train_weight:
        torch.testing.assert_close(layer.weight.grad, G)
    else:
        assert layer.weight.grad is None


def test_padding_of_a_classifier_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In BERT a padded token has no gradient in any block, and in the last block only the first token has one."""
    from transformers import BertConfig, BertForSequenceClassification

    from sparsegrad_peft import calibrate, group_linears, replace_linears

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    mask = torch.arange(10) < torch.tensor([[10], [6], [3], [1]])
    batch = {"input_ids": torch.randint(60, (4, 10)), "attention_mask": mask.long(), "labels": torch.tensor([0, 1] * 2)}
    groups = group_linears(model, r".*layer\.\d+\.(intermediate|output)\.dense")
    replace_linears(model, groups, calibrate(model, [batch], groups=groups, n_steps=2, progress=False).bases(c=4, r=4))
    seen: list[int] = []

    def counting(delta: Tensor) -> Tensor | None:
        found = live_rows(delta)
        seen.append(len(delta) if found is None else len(found))
        return found

    monkeypatch.setattr(function, "live_rows", counting)
    model(**batch).loss.backward()
    assert seen == [4, 4, 20, 20, 20, 20]  # 4 sentences; 10 + 6 + 3 + 1 tokens
