"""What every figure has: a name, a title, words for those who do not see it, and what to look for."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = {"up": "#1f77b4", "down": "#d95f02", "all": "#555555"}
"""Of the roles of layers, the same in all figures."""


@dataclass(frozen=True)
class Drawing:
    """A figure and its words."""

    name: str
    "of its file"
    title: str
    alt: str
    "what it shows, with numbers"
    see: str
    "one sentence: what to look for"
    figure: Figure

    def svg(self) -> str:
        """The figure as a file of its own, with title and description in it; equal numbers give equal bytes."""
        text = svg_text(self.figure)
        words = f"<title>{escape(self.title)}</title>\n <desc>{escape(self.alt)}</desc>"
        head, end, rest = text.partition(">")
        return f'{head} role="img"{end}\n {words}{rest}'


def svg_text(figure: Figure) -> str:
    """The figure as an `<svg>` element with its text as text; equal figures give equal bytes."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "sparsegrad", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def percent(share: float) -> str:
    """A share in words: 0.123 is "12 %", 0.0123 is "1.2 %"."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def short(name: str) -> str:
    """The part of a layer's or group's name that tells its role: `encoder.layer.3.output.dense` is `output.dense`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit() or part == "*"]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def of_run(data: Mapping[str, Any]) -> str:
    """Model and task, for titles."""
    model = data["config"]["model"].rstrip("/").rpartition("/")[2]
    return f"{model} on {data['config']['task']}"


def new_figure(width: float, height: float) -> Figure:
    """Without pyplot: no window, no state."""
    return Figure(figsize=(width, height), layout="constrained")


def steps_axis(axes: Any, steps: int) -> None:
    """Whole steps only, from the first to the last."""
    every = max(1, math.ceil(steps / 6))
    axes.set_xticks(sorted({*range(0, steps - every // 2, every), steps}))
    axes.set_xlabel("training step")
    axes.grid(alpha=0.3)
