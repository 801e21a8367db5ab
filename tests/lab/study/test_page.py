"""The page is complete, works in a real browser, and shows names from files as text."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from helpers import write_json
from sparsegrad_lab.study.page import render_page
from sparsegrad_lab.study.report import write_report
from sparsegrad_lab.study.runs import Run
from sparsegrad_lab.study.sections import Report, Section, read_report


def test_the_same_runs_give_the_same_bytes(section: Section) -> None:
    assert render_page(Report([section]), "t") == render_page(Report([section]), "t")


def test_page_is_complete(section: Section) -> None:
    """Every element is closed, every link within the page leads somewhere, every picture says what it shows."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.ids: set[str] = set()
            self.links: list[str] = []
            self.labels: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found = dict(attributes)
            self.ids |= {str(found["id"])} if "id" in found else set()
            self.links += [str(found["href"])] if tag == "a" and "href" in found else []
            self.labels += [str(found.get("alt"))] if tag == "img" else []
            if tag not in ("meta", "input", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(render_page(Report([section]), "t"))
    assert reader.open == []
    assert reader.links
    assert {link.removeprefix("#") for link in reader.links} <= reader.ids
    assert sum("highest 83.0 by sparsegrad" in label for label in reader.labels) == 2  # mrpc: time and memory
    assert any("sparsegrad +2 (" in label for label in reader.labels)


def browser() -> str | None:
    """A Chromium that is installed, or the one that SPARSEGRAD_CHROMIUM names."""
    named = os.environ.get("SPARSEGRAD_CHROMIUM")
    return named or next((found for name in ("chromium", "chromium-browser", "google-chrome")
                          if (found := shutil.which(name))), None)  # fmt: skip


BEYOND = """[...document.querySelectorAll('table, img, svg, p, dl, ul, h1')]
    .filter(element => element.getBoundingClientRect().right > innerWidth || element.scrollWidth > innerWidth)
    .map(element => element.outerHTML.slice(0, 80))"""
"Elements that are wider than the window."


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_page_in_a_browser(runs: list[Run], section: Section, study: Section, tmp_path: Path) -> None:
    """Sorted by a click, filtered by words, a run opened by a link; nothing in the console, nothing beyond the edge."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    file = tmp_path / "index.html"
    file.write_text(render_page(Report([section]), "t"), encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
        said: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(file.as_uri())
        column = "#every-run tbody tr:not([hidden]) td:nth-child(5)"
        tab.click("#every-run th:nth-child(5) button")
        shown = [float(text) for text in tab.locator(column).all_inner_texts()]
        assert shown == pytest.approx(sorted(run.value for run in runs))
        tab.click("#every-run th:nth-child(5) button")
        assert float(tab.locator(column).first.inner_text()) == 83.0
        tab.fill("input[type=search]", "rte lora")
        assert [float(text) for text in tab.locator(column).all_inner_texts()] == [60.0, 58.0]
        tab.click(f"{column} a >> nth=0")
        tab.wait_for_selector("details.run[open]")  # the page hears of the new address a moment later
        assert tab.locator("details.run[open]").count() == 1
        assert "accuracy\n60.00" in tab.locator("details.run[open] .facts >> nth=0").inner_text()
        assert '"score": 0.6' in (tab.locator("details.run[open] pre").text_content() or "")
        file.write_text(render_page(Report([section, study], (Path("gone"),), ("left",)), "t"), encoding="utf-8")
        tab.goto(file.as_uri())
        assert tab.evaluate("document.documentElement.scrollHeight") < 3000  # experiments are folded
        tab.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        for width in (1280, 390):
            tab.set_viewport_size({"width": width, "height": 844})
            assert tab.evaluate(BEYOND) == []
        chromium.close()
    assert said == []


NASTY = "bob's <img src=x onerror=alert(1)> \"&amp; </script> {{ 7 * 7 }} $x_1$"
FIELDS: dict[str, dict[str, Any]] = {
    "task": {"task": NASTY},
    "method": {"method": NASTY},
    "model": {"model": f"{NASTY}/{NASTY}"},
    "variant": {"variant": NASTY.replace("/", " ")},
    "experiment": {"experiment": NASTY.replace("/", " ")},
    "metric": {"metric": NASTY},
    "about": {"experiment": "own", "about": dict.fromkeys(("title", "question", "words"), NASTY)},
    "environment": {"environment": {"time": NASTY, "device": NASTY, "threads": 1, "python": NASTY, "packages": {},
                                    "commit": NASTY}},
    "settings": {"config": {"task": NASTY, "data": {NASTY: NASTY}, "training": {"batch_size": 1, "epochs": 1}}},
    "anything": {NASTY: NASTY},
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_names_from_files_are_text(field: str, real: dict[str, Any], tmp_path: Path) -> None:
    """Whatever a result file calls itself, the page has no element, and the folder no file, of its making."""
    folder = tmp_path / "bob's <b>results"
    for method in ("sparsegrad", "lora"):
        for seed in range(2):
            score = 0.5 + seed / 10 + (method == "lora") / 4  # no two files are of the same run
            result = {**real, "method": method, "seed": seed, "score": score, **FIELDS[field]}
            write_json(folder / f"{method}-{seed}.json", result)
    report = read_report([folder])
    replaced = [why for why in report.rejected if "has the same settings and seed, and is later" in why]
    assert len(replaced) == len(report.rejected) == (2 if field in ("method", "variant") else 0)  # methods of one name
    write_report(report, tmp_path / "out", NASTY)
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.scripts == 1
    assert tags.found <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "ul", "li", "a", "dl", "dt", "dd",
        "p", "input", "div", "table", "thead", "tbody", "tr", "th", "td", "button", "small", "figure", "figcaption",
        "img", "details", "summary", "pre", "script", "span", "svg", "polyline",
    }  # fmt: skip
    assert tags.attributes <= {
        "lang", "charset", "http-equiv", "content", "name", "id", "href", "class", "scope", "type", "src", "alt",
        "title", "data-filters", "placeholder", "aria-label", "data-label", "open", "role", "viewbox", "points",
    }  # fmt: skip
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tags.sources)
    assert "<" not in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert {path.parent for path in tmp_path.rglob("*.csv")} == {tmp_path / "out"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", folder.name}


class Tags(HTMLParser):
    """Names of elements and attributes of a page, and the sources of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.scripts += tag == "script"
        self.attributes |= {name for name, _ in attributes}
        self.sources += [str(value) for name, value in attributes if name == "src"]


def test_a_policy_lets_only_the_pages_own_script_run(section: Section) -> None:
    text = render_page(Report([section]), "t")
    [policy] = re.findall('<meta http-equiv="Content-Security-Policy" content="(.*?)">', text)
    [script] = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    [style] = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    for name, content in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in html.unescape(policy)
    assert html.unescape(policy).startswith("default-src 'none'; img-src data:;")
