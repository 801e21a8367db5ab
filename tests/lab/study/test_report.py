"""`sparsegrad report` writes a page, Markdown and CSV."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.study.report import markdown
from sparsegrad_lab.study.sections import read_report


def test_command_writes_page_markdown_and_csv(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--output", str(tmp_path / "out"), "--title", "A <title>"]) == 0
    shown = capsys.readouterr().out
    assert "9 runs\n  Mean of 2 tasks: sparsegrad 72.0, lora 70.0.\n  sparsegrad against lora: +2.00 points" in shown
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<h1>A &lt;title&gt;</h1>" in text
    assert not re.search("https?:", re.sub("<pre>.*?</pre>", "", text, flags=re.DOTALL))
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8", newline="") as file:
        assert ["mean of tasks", "72.0", "70.0", "not all run"] in list(csv.reader(file))
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") == markdown(read_report([folder]), "A <title>")


@pytest.mark.parametrize("kind", ["nothing there", "nothing in it", "broken"])
def test_no_runs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        "nothing there": "there is no",
        "nothing in it": "no finished runs below",
        "broken": "result.json: expected JSON",
    }
    folder = tmp_path / "runs"
    if kind != "nothing there":
        folder.mkdir()
    if kind == "broken":
        (folder / "result.json").write_text("{", encoding="utf-8")
    assert main(["report", str(folder), "--output", str(tmp_path / "out")]) == 1
    assert words[kind] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
