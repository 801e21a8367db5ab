"""Hooks of mkdocs: pages that live outside docs/, links that leave docs/, and the help of the verbs."""

from __future__ import annotations

import io
import os
import posixpath
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FIGURES = ROOT / "benchmarks" / "results" / "figures"
COSTS = ROOT / "benchmarks" / "results" / "costs"
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/figures/index.md": "figures.md",
    "benchmarks/results/curves.png": "figures/curves.png",
    "src/sparsegrad_lab/figures/data_flow.svg": "figures/method.svg",
    **{path.relative_to(ROOT).as_posix(): f"figures/{path.name}" for path in FIGURES.glob("*.svg")},
    **{path.relative_to(ROOT).as_posix(): f"figures/costs-{path.name}" for path in COSTS.glob("*.svg")},
}
"""Path from the root -> path on the site."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
_BADGE = re.compile(r"^\[!\[.*img\.shields\.io.*\n", re.MULTILINE)
_HELP = "<!-- help of all verbs -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `OUTSIDE`."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Point links to where the files are on the site. A link to a source file becomes the file's name."""
    places = {os.path.realpath(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}
    folder = Path(page.file.abs_src_path or "").parent

    def on_site(match: re.Match[str]) -> str:
        image, text, name, anchor = match.groups()
        target = os.path.realpath(folder / name)
        if target in places:
            place = posixpath.relpath(places[target], posixpath.dirname(page.file.src_uri))
            return f"{image}[{text}]({place}{anchor or ''})"
        is_source = os.path.exists(target) and not target.startswith(str(DOCS))
        return text if is_source else match[0]  # mkdocs warns of links to nothing

    markdown = _LINK.sub(on_site, _BADGE.sub("", markdown))  # badges are loaded from another server
    return markdown.replace(_HELP, help_of_all_verbs()) if _HELP in markdown else markdown


def help_of_all_verbs() -> str:
    """Return what `sparsegrad COMMAND --help` prints, a section a subcommand."""
    os.environ["COLUMNS"] = "100"
    from sparsegrad_lab.cli.main import VERBS, main

    sections = []
    for verb, description in VERBS.items():
        out = io.StringIO()
        with redirect_stdout(out), suppress(SystemExit):
            main([verb, "--help"])
        sections.append(
            f"## {verb}\n\n{description[0].upper()}{description[1:]}.\n\n```text\n{out.getvalue().strip()}\n```"
        )
    return "\n\n".join(sections)
