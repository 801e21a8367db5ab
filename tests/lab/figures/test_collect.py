"""All measurements together, for a BERT, a GPT-2, a LLaMA and a ViT."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTConfig, ViTModel

from sparsegrad_lab.figures import strided_structure, touched, update_norms
from sparsegrad_lab.figures.collect import calibration_ways, collect
from sparsegrad_lab.figures.settings import FiguresArguments
from sparsegrad_lab.figures.strided_structure import TokenKind
from sparsegrad_lab.run.exit_codes import RefusedError
from sparsegrad_lab.run.settings import RunArguments
from tiny_runs import save_tokenizer


def test_record(data: dict[str, Any], tiny_bert: Path) -> None:
    assert data["command"].startswith(f"sparsegrad figures --model {tiny_bert} --task files ")
    assert data["figures"] == {"steps": 4, "points": 2, "batches": 1, "layer": None, "redraw": False}
    assert data["environment"]["seed"] == 0
    assert data["block"] == 0
    assert list(data["block_numbers"].values()) == [[0, 1], [0, 1]]


def test_names_of_calibrations() -> None:
    """A run's own way is among those that are compared, or added to them."""
    assert calibration_ways(RunArguments())[0] == "mean gradient along a trajectory, per layer"
    papers = RunArguments()
    papers.adapter.shared, papers.adapter.c, papers.adapter.r = True, "full", "full"
    papers.calibration.walk, papers.calibration.normalize = None, False
    name, ways = calibration_ways(papers)
    assert (name, len(ways)) == ("paper: at the start, shared", 3)


def test_the_published_method_has_the_papers_bases(
    arguments: Callable[..., RunArguments], tiny_bert: Path, tmp_path: Path
) -> None:
    """Also beside a run that calibrates in another way."""
    settings = FiguresArguments(steps=2, points=2, batches=1)
    ways: list[list[str]] = [
        [],
        ["--calibration.walk", "null", "--adapter.shared", "true", "--calibration.normalize", "false"],
    ]
    one, other = (
        collect(arguments(tmp_path / "out", "--model", str(tiny_bert), *words), settings, progress=False)
        for words in ways
    )
    assert one["calibrated"] != other["calibrated"]
    assert one["runs"]["SparseGrad"] == other["runs"]["SparseGrad"]
    assert one["touched"]["touched"] == other["touched"]["touched"]


def test_a_decoder_with_transposed_weights(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """GPT-2's Conv1D stores its weight as (in, out). Its head reads the last token that is no padding.

    Only two of the four blocks are adapted. Figures call them by their numbers in the model.
    """
    from transformers import GPT2Config, GPT2Model

    words = save_tokenizer(tmp_path)
    config = GPT2Config(
        vocab_size=words, n_positions=32, n_embd=16, n_layer=4, n_head=2, bos_token_id=2, eos_token_id=3
    )
    GPT2Model(config).save_pretrained(tmp_path)
    run = arguments(tmp_path / "out", "--model", str(tmp_path), "--adapter.shared", "false", "--calibration.normalize",
                    "false", "--adapter.layers", "[1, 3]")  # fmt: skip
    with pytest.raises(RefusedError, match=r"a block with layers to adapt, 1, 3; found 2"):
        collect(run, FiguresArguments(layer=2), progress=False)
    data = collect(run, FiguresArguments(steps=2, points=2, batches=1, layer=3), progress=False)
    assert data["block"] == 3
    assert list(data["block_numbers"].values()) == [[1, 3], [1, 3]]
    assert [data["gradient"][role]["images"].shape for role in ("up", "down")] == [(2, 64, 16), (2, 16, 64)]
    assert data["touched"]["images"]["up"].shape == (64, 16)
    assert data["calibrated"] == "this run's settings"
    assert len(data["ageing"]["ways"]) == 6
    for row in data["rows"]["tokens"]["last"]:
        real = row[row != TokenKind.padding].tolist()
        assert real == [TokenKind.unread] * (len(real) - 1) + [TokenKind.live]
    assert {side["group"] for side in data["spectrum"]} == {"transformer.h.3.mlp.c_fc", "transformer.h.3.mlp.c_proj"}
    assert touched.draw(data).svg.startswith("<svg")
    assert "last block (3)" in strided_structure.draw(data).svg
    assert re.findall(r">([0-9]+)</text>", update_norms.draw(data).svg) == ["1", "3"] * 2


def test_images(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """Patches are never padding; in a ViT's last block only the class token has a gradient."""
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        num_channels=1,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    run = arguments(tmp_path / "out", "--model", str(tmp_path / "vit"), "--task", "digits", "--data.train_rows", "40")
    run.data.train_file = run.data.validation_file = None
    run.data.text = []
    data = collect(run, FiguresArguments(steps=2, points=2, batches=1), progress=False)
    middle, last = (data["rows"]["tokens"][key] for key in ("middle", "last"))
    assert middle.tolist() == [[TokenKind.live] * 17] * 8
    assert last.tolist() == [[TokenKind.live] + [TokenKind.unread] * 16] * 8
    assert strided_structure.draw(data).svg.startswith("<svg")


def test_a_language_model(language_arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """Two of three groups are "up". In the last block, the prompt's tokens have no gradient."""
    data = collect(language_arguments(tmp_path / "out"), FiguresArguments(steps=2, points=2, batches=1), progress=False)
    assert list(data["roles"].values()) == ["up", "up", "down"]
    assert list(data["gradient"]) == ["up", "down"]
    shares = data["rows"]["shares"][0]
    assert 0 < shares["last"]["live"] < shares["middle"]["live"] < 1
    assert shares["last"]["unread"] > 0
    assert update_norms.draw(data).svg.startswith("<svg")
