"""Figure 1: the data flow of a SparseGrad layer, in the form that the run's settings give it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..methods.settings import AdapterArguments
from .drawing import Drawing


def draw(adapter: AdapterArguments) -> Drawing:
    """Draw the layer: neurons or directions on its wide side, selected entries or all, its own bases or shared ones.

    `data_flow.svg` in this folder is the drawing of the default settings, for documents.
    """
    neurons, _ = adapter.form
    selects = adapter.density is not None or adapter.k is not None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, autoescape=True
    )
    svg = environment.get_template("data_flow_template.svg").render(
        neurons=neurons, selects=selects, shared=adapter.shared
    )
    title, alt = (element.text or "" for element in list(ElementTree.fromstring(svg))[:2])
    changed = "the k entries with the largest gradients" if selects else "all entries of S"
    wide = " V selects neurons: nothing is multiplied there." if neurons else ""
    caption = f"Backward needs x Uᵀ (T, c) instead of x (T, in). A step changes {changed}.{wide}"
    return Drawing("data_flow", title, alt, caption, svg)
