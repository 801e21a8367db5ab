"""The documentation site: it builds without a warning, offline, and holds every page and figure."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from blocks import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setenv("COLUMNS", "100")
        found = _Warnings(logging.WARNING)
        logging.getLogger("mkdocs").addHandler(found)
        try:
            build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))  # strict: a warning raises Abort
        finally:
            logging.getLogger("mkdocs").removeHandler(found)
    assert found.messages == []
    return folder


class _Warnings(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_every_page_is_on_the_site(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) >= 25
    for page in [*pages, Path("index.html"), Path("changelog.html"), Path("figures.html")]:
        assert (site / page).is_file(), page


def test_pages_load_nothing_from_other_servers(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?https?:", text), page
        assert not re.findall(r"<link[^>]+stylesheet[^>]+href=\"?https?:", text), page


def test_the_reference_shows_every_public_name_and_verb(site: Path) -> None:
    from sparsegrad_lab.cli.main import VERBS
    from sparsegrad_peft import _HOME

    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    for name, home in _HOME.items():
        assert f'id="sparsegrad_peft.{home}.{name}"' in reference, name
    for verb in VERBS:
        assert f'<h2 id="{verb}">' in reference, verb
        assert f"usage: sparsegrad {verb}" in reference, verb
