"""What all figures share: the `Drawing` they return, and helpers to draw with matplotlib and to word numbers."""

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

ROLE_COLOURS = {"up": "#1f77b4", "down": "#d95f02", "all": "#555555"}
EMPTY_CELL = "#f2f2f2"
"Background of an image: seen where a cell holds NaN."


@dataclass(frozen=True)
class Drawing:
    """A finished figure with its texts."""

    name: str
    "file name, without suffix"
    title: str
    alt: str
    "description with numbers, for readers who do not see the figure"
    caption: str
    "one or two sentences: what to look for"
    svg: str

    @classmethod
    def of(cls, name: str, title: str, alt: str, caption: str, figure: Figure) -> Drawing:
        """Render a matplotlib figure, with title and description in the SVG. Equal data gives equal bytes."""
        head, end, rest = svg_text(figure).partition(">")
        texts = f"<title>{escape(title)}</title>\n <desc>{escape(alt)}</desc>"
        return cls(name, title, alt, caption, f'{head} role="img"{end}\n {texts}{rest}')


def svg_text(figure: Figure) -> str:
    """Return the figure as an `<svg>` element. Equal figures give equal bytes; text stays text."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "sparsegrad", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. It is not registered with pyplot, which would need a display."""
    return Figure(figsize=(width, height), layout="constrained")


def set_title(figure: Figure, title: str, data: Mapping[str, Any], details: str = "") -> None:
    """Write the title, and below it the model, the task and `details`."""
    figure.suptitle(f"{title}\n{run_title(data)}{details}", fontsize=11)


def shared_legend(figure: Figure, axes: Any, columns: int = 2) -> None:
    """Put the legend of `axes` below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def step_axis(axes: Any, steps: int) -> None:
    """Label the x axis with whole training steps, from 0 to `steps`."""
    every = max(1, math.ceil(steps / 6))
    axes.set_xticks(sorted({*range(0, steps - every // 2, every), steps}))
    axes.set_xlabel("training step")
    axes.grid(alpha=0.3)


def draw_image(axes: Any, cells: Any, shape: tuple[int, int], **options: Any) -> Any:
    """Show cells as an image on axes of the matrix's own `shape`. Cells that are NaN stay empty.

    Returns:
        The image, for a colour bar.
    """
    axes.set_facecolor(EMPTY_CELL)
    extent = (0, shape[1], shape[0], 0)
    # "none": the SVG holds the cells themselves, not resampled pixels.
    return axes.imshow(cells, aspect="auto", interpolation="none", extent=extent, **options)


def percent(share: float) -> str:
    """Format a share: 0.123 is "12 %", 0.0123 is "1.2 %"."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def short_name(name: str) -> str:
    """Return a layer's or group's name from its block on: `encoder.layer.3.output.dense` is `output.dense`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit() or part == "*"]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def run_title(data: Mapping[str, Any]) -> str:
    """Return "MODEL on TASK"."""
    model = data["config"]["model"].rstrip("/").rpartition("/")[2]
    return f"{model} on {data['config']['task']}"
