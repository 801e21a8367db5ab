"""The report as one HTML page that needs no network: the answer, plots, tables that sort and filter, every result."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .contents import contents_of
from .plots import Plot, cost_plots, curve_plots, difference_plots, forgetting_plots, run_plots
from .run_card import HEIGHT, WIDTH, run_card
from .sections import Report, Section

_TEMPLATE = Path(__file__).parent / "page_template"


def render_page(report: Report, title: str) -> str:
    """The page's HTML.

    All text is escaped. A content security policy allows the page's own style and script, by their hashes, and images
    within the page; nothing else runs or is loaded.
    """
    contents = contents_of(report)
    known = [run for section in report.sections for run in (*section.runs, *section.trials)]
    number = {id(run): position for position, run in enumerate(known)}
    style, script = ((_TEMPLATE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"run_id": lambda run: f"run-{number[id(run)]}", "run_card": run_card}
    return environment.get_template("page.html").render(
        title=title,
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'",
        contents=contents,
        plots=[_plots(chapter.section) for chapter in contents.chapters],
        runs=known,
        failures=[failure for section in report.sections for failure in section.failures],
        report=report,
        curve_size=(WIDTH, HEIGHT),
    )


def _plots(section: Section) -> dict[str, list[dict[str, Any]]]:
    return {
        "summary": [_as_image(plot) for plot in _summary(section)],
        "curves": [_as_image(plot) for plot in curve_plots(section)],
        "runs": [_as_image(plot) for plot in run_plots(section)],
    }


def _summary(section: Section) -> list[Plot]:
    return [*difference_plots(section), *cost_plots(section), *forgetting_plots(section)]


def _source(text: str) -> str:
    """A content security policy's name for an inline style or script: its hash."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _as_image(plot: Plot) -> dict[str, Any]:
    """A plot as an image of its own, in which no script runs."""
    data = b64encode(plot.svg.encode()).decode()
    return {
        "title": plot.title, "url": f"data:image/svg+xml;base64,{data}", "caption": plot.caption,
        "description": plot.description,
    }  # fmt: skip
