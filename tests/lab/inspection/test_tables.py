"""The printed tables."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from transformers import (
    BertConfig,
    LlamaConfig,
    T5Config,
)

from helpers import TINY_SIZES
from sparsegrad_lab.inspection.inspect import Inspection, inspect
from sparsegrad_lab.inspection.tables import render


def printed(inspection: Inspection, width: int = 80) -> str:
    text = io.StringIO()
    render(inspection, Console(file=text, width=width))
    return text.getvalue()


@pytest.mark.parametrize(
    ("config", "options"),
    [(BertConfig(), {}), (LlamaConfig(), {"dtype": "bfloat16"}), (T5Config(), {"shared": False}),
     (LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80), {"c": "full", "r": "full"})],
    ids=["bert", "llama", "t5", "llama-70b"],
)  # fmt: skip
def test_printed_at_80_columns(config: Any, options: dict[str, Any]) -> None:
    inspection = inspect(config, **options)
    text = printed(inspection)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text  # nothing is cut off
    for part in ("embeddings", "attention", "MLP", "norms", "head", "other"):
        assert part in text
    for number in (inspection.parts.total, inspection.parts.mlp, inspection.entries, inspection.layers):
        assert f"{number:,}" in text
    assert "Activations are not counted" in text
    assert inspection.groups[-1].name in text


def test_printed_numbers_have_units() -> None:
    text = printed(inspect(BertConfig()))
    assert "Calibration needs 118.6 MB more at its peak" in text
    assert "These layers hold 100 % of the MLP's weights." in text
    assert "in MB (1e6 bytes)" in text
    assert "LoRA rank 6, AdamW" in text
    assert "0.068-6.78" in text  # 12 bytes for each of 5,640 to 565,248 entries
    assert "[odd]" in printed(inspect(BertConfig(**TINY_SIZES, name_or_path="[odd]")))
