"""The files of the figures: complete SVGs, equal bytes for equal numbers, old and damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from helpers import write_json
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.figures import touched, update_norms
from sparsegrad_lab.figures.folder import read
from sparsegrad_lab.figures.strided_structure import TokenKind

Words = Callable[..., list[str]]

NAMES = [
    "data_flow", "gradient_before_after", "strided_structure", "spectrum", "ageing", "touched", "update_norms",
]  # fmt: skip

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_complete(name: str, folder: Path) -> None:
    text = (folder / f"{name}.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    first, second = list(root)[:2]
    assert first.tag.endswith("}title")
    assert second.tag.endswith("}desc")
    assert first.text
    assert len(second.text or "") > 60
    assert len(text) < 300_000
    assert "nan" not in (second.text or "")
    page = (folder / "index.md").read_text(encoding="utf-8")
    assert f"## {first.text}\n\n![{second.text}]({name}.svg)\n\n" in page


def test_equal_numbers_give_equal_bytes(data: dict[str, Any], folder: Path) -> None:
    for figure in (touched, update_norms):
        drawing = figure.draw(data)
        assert drawing.svg == (folder / f"{drawing.name}.svg").read_text(encoding="utf-8")


def test_redraw_from_the_first_file_format(
    figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers suffice: the run's model is not read. This format has no figures.npz and images in 8-bit base64."""
    shutil.copy(SAMPLES / "figures" / "figures.json", tmp_path)
    assert main(figures_of(tmp_path, "--figures.redraw", "true", "--model", "nowhere")) == 0
    output = capsys.readouterr().out
    assert "touched.svg: Which entries the published method touches. Images of" in output
    assert output.endswith(f"written: {tmp_path}/index.md, figures.json, figures.npz and an SVG for each figure\n")
    assert {path.name for path in tmp_path.glob("*.svg")} == {f"{name}.svg" for name in NAMES}
    data = read(tmp_path)
    for role, shape in (("up", (32, 16)), ("down", (16, 32))):
        images, cells = data["gradient"][role]["images"], data["touched"]["images"][role]
        assert images.shape == (2, *shape)
        squares = np.sort(100 ** images[1].astype(float).ravel())[::-1]
        assert squares[:5].sum() / squares.sum() == pytest.approx(data["gradient"][role]["shares"][1], abs=0.02)
        assert np.isfinite(cells).sum() / 512 == pytest.approx(data["touched"]["touched"][role][-1])
    assert data["rows"]["tokens"]["last"][:, 0].tolist() == [TokenKind.live] * 8  # the classifier reads the first token


def test_folders_that_hold_something_else(
    figures_of: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    assert main(figures_of(tmp_path)) == 1
    assert "not empty and has no figures.json; choose another output folder" in capsys.readouterr().err
    assert main(figures_of(tmp_path / "note.txt")) == 1
    assert "expected a folder, found a file" in capsys.readouterr().err
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "mine"


def test_damaged_numbers(folder: Path, tmp_path: Path) -> None:
    """A record of something else or without a part; no arrays, cut-off ones, and an array that is missing."""
    record, arrays = tmp_path / "figures.json", tmp_path / "figures.npz"

    def refused() -> None:
        with pytest.raises(ValueError, match=r"figures\.json: expected the numbers of figures"):
            read(tmp_path)

    whole = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    for content in ({"task": 1}, [], {key: value for key, value in whole.items() if key != "ageing"}):
        write_json(record, content)
        refused()
    record.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"figures\.json: expected JSON"):
        read(tmp_path)
    record.write_bytes((folder / "figures.json").read_bytes())
    refused()
    arrays.write_bytes((folder / "figures.npz").read_bytes()[:-100])
    refused()
    arrays.write_bytes((folder / "figures.npz").read_bytes())
    record.write_text(record.read_text(encoding="utf-8").replace("rows/tokens/last", "rows/tokens/none"), "utf-8")
    refused()
