"""All measurements together, for a BERT and a GPT-2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsegrad_lab.figures import touched
from sparsegrad_lab.figures.collect import collect
from sparsegrad_lab.figures.settings import FiguresArguments
from sparsegrad_lab.figures.strided_structure import TokenKind
from sparsegrad_lab.run.settings import RunArguments
from tiny_runs import save_tokenizer


def test_record(data: dict[str, Any], tiny_bert: Path) -> None:
    assert data["command"].startswith(f"sparsegrad figures --model {tiny_bert} --task files ")
    assert data["figures"] == {"steps": 4, "points": 2, "batches": 1, "layer": None, "redraw": False}
    assert data["environment"]["seed"] == 0
    assert (data["block"], data["blocks"]) == (0, 2)


def test_a_decoder_with_transposed_weights(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """GPT-2's Conv1D stores its weight as (in, out). Its head reads the last token that is no padding."""
    from transformers import GPT2Config, GPT2Model

    words = save_tokenizer(tmp_path)
    config = GPT2Config(
        vocab_size=words, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=2, eos_token_id=3
    )
    GPT2Model(config).save_pretrained(tmp_path)
    run = arguments(tmp_path / "out", "--model", str(tmp_path), "--adapter.shared", "false", "--calibration.normalize",
                    "false")  # fmt: skip
    data = collect(run, FiguresArguments(steps=2, points=2, batches=1, layer=2), progress=False)
    assert [data["gradient"][role]["images"].shape for role in ("up", "down")] == [(2, 64, 16), (2, 16, 64)]
    assert data["touched"]["images"]["up"].shape == (64, 16)
    assert data["calibrated"] == "this run's settings"
    assert len(data["ageing"]["ways"]) == 6
    for row in data["rows"]["tokens"]["last"]:
        real = row[row != TokenKind.padding].tolist()
        assert real == [TokenKind.unread] * (len(real) - 1) + [TokenKind.live]
    assert {side["group"] for side in data["spectrum"]} == {"transformer.h.2.mlp.c_fc", "transformer.h.2.mlp.c_proj"}
    assert touched.draw(data).svg.startswith("<svg")
