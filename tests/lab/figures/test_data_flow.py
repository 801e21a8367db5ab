"""The diagram of a layer: what it draws is what the settings say."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

import sparsegrad_lab.figures
from sparsegrad_lab.figures.data_flow import draw
from sparsegrad_lab.methods.settings import AdapterArguments


@pytest.mark.parametrize(
    ("adapter", "drawn"),
    [
        (AdapterArguments(), {"neurons"}),
        (AdapterArguments(neurons=False), set()),
        (AdapterArguments(density=0.1), {"neurons", "top-k", "SparseAdam"}),
        (AdapterArguments(c="full", r="full", k=5), {"top-k", "SparseAdam"}),
        (AdapterArguments(shared=True), {"shared by a group"}),
    ],
)
def test_forms(adapter: AdapterArguments, drawn: set[str]) -> None:
    drawing = draw(adapter)
    text = " ".join(
        element.text or "" for element in ElementTree.fromstring(drawing.svg).iter() if "text" in element.tag
    )
    assert {word for word in ("neurons", "top-k", "SparseAdam", "shared by a group") if word in text} == drawn
    assert ("k largest" in drawing.alt) == ("top-k" in drawn)
    assert ("neurons" in drawing.caption) == ("neurons" in drawn)


def test_the_file_for_documents_is_the_default() -> None:
    file = Path(sparsegrad_lab.figures.__file__).with_name("data_flow.svg")
    assert file.read_text(encoding="utf-8") == draw(AdapterArguments()).svg
