"""`sparsegrad report` writes a page, Markdown and CSV."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from helpers import write_json
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.study.report import markdown, write_report
from sparsegrad_lab.study.sections import read_report


def test_command_writes_page_markdown_and_csv(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--output", str(tmp_path / "out"), "--title", "A <title>"]) == 0
    shown = capsys.readouterr().out
    assert "9 runs\n  Mean of 2 tasks: sparsegrad 72.0, lora 70.0; without full (not on mrpc).\n" in shown
    assert "\n  sparsegrad against lora: too few runs to tell. +2.00 points" in shown
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<h1>A &lt;title&gt;</h1>" in text
    assert not re.search("https?:", re.sub("<pre>.*?</pre>", "", text, flags=re.DOTALL))
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8", newline="") as file:
        assert ["mean of tasks", "72.0", "70.0", "not all run"] in list(csv.reader(file))
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") == markdown(read_report([folder]), "A <title>")


def test_names_that_are_alike_in_file_names_keep_a_file_each(tmp_path: Path, real: dict[str, Any]) -> None:
    """Two experiments whose names differ in a character that file names do not have, or in capitals."""
    names = ["my study", "my-study", "My-Study"]
    for number, name in enumerate(names):
        result = {
            **real,
            "experiment": name,
            "scale": "cpu",
            "trial": False,
            "status": "finished",
            "score": number / 10,
        }
        write_json(tmp_path / "in" / f"{number}.json", result)
    assert main(["report", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    found = sorted(path.name for path in (tmp_path / "out").glob("*scores*.csv"))
    assert found == ["My-Study-scores.csv", "my-study-scores-2.csv", "my-study-scores-3.csv"]
    texts = [(tmp_path / "out" / name).read_text(encoding="utf-8") for name in found]
    assert len(set(texts)) == 3
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert text.count("Calibration ÷ training: ratio of the two times.") == 1  # in "How to read the tables"
    assert text.count("### Costs\n") == 3


def test_tables_of_an_earlier_report_are_removed(folder: Path, tmp_path: Path) -> None:
    """And no file that a report has not written."""
    out = tmp_path / "out"
    write_report(read_report([folder]), out, "t")
    (out / "my-scores.csv").write_text("mine", encoding="utf-8")
    assert (out / "comparison.csv").is_file()
    write_report(read_report([folder / "glue" / "rte" / "lora-0.json"]), out, "t")
    assert sorted(file.name for file in out.glob("*.csv")) == ["costs.csv", "my-scores.csv", "runs.csv", "scores.csv"]


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


def test_a_run_that_a_later_one_replaces_is_named(tmp_path: Path, real: dict[str, Any]) -> None:
    for name, time in (("first", "2026-01-01T00:00:00+00:00"), ("later", "2026-01-02T00:00:00+00:00")):
        environment = {**real["environment"], "time": time}
        write_json(tmp_path / name / "result.json", {**real, "environment": environment, "score": len(name) / 10})
    report = read_report([tmp_path])
    first, later = tmp_path / "first" / "result.json", tmp_path / "later" / "result.json"
    assert report.rejected == (f"{first}: {later} has the same settings and seed, and is later",)


def test_a_folder_without_experiments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--folder", str(tmp_path / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["reproduce", "--folder", str(tmp_path)]) == 1
    assert "has no experiment for scale 'cpu'" in capsys.readouterr().err
