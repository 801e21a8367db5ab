"""The report as one HTML page that needs no network: sentences, tables that sort and filter, plots, every result."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .overview import overview, parameters
from .scatter_plots import Plot, scatter_plots
from .sections import Report
from .tables import every_run, tables_of
from .verdict import verdict

_TEMPLATE = Path(__file__).parent / "page_template"


def render_page(report: Report, title: str) -> str:
    """The page's HTML.

    All text is escaped. A content security policy allows the page's own style and script, by their hashes, and images
    within the page; nothing else runs or is loaded.
    """
    sections = report.sections
    known = [run for section in sections for run in (*section.runs, *section.trials)]
    number = {id(run): position for position, run in enumerate(known)}
    style, script = ((_TEMPLATE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"run_id": lambda run: f"run-{number[id(run)]}"}
    return environment.get_template("page.html").render(
        title=title,
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'",
        overview=overview(sections),
        sections=[
            {
                "about": section,
                "verdict": verdict(section),
                "tables": tables_of(section),
                "plots": [_as_image(plot) for plot in scatter_plots(section)],
            }
            for section in sections
        ],
        parameters=parameters() if any(section.experiment for section in sections) else None,
        every_run=every_run(run for section in sections for run in section.runs),
        runs=known,
        report=report,
    )


def _source(text: str) -> str:
    """A content security policy's name for an inline style or script: its hash."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _as_image(plot: Plot) -> dict[str, Any]:
    """A plot as an image of its own, in which no script runs."""
    data = b64encode(plot.svg.encode()).decode()
    return {"title": plot.title, "url": f"data:image/svg+xml;base64,{data}", "description": plot.description}
