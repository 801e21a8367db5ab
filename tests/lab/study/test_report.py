"""A report's numbers are those of its runs, by hand; the page works in a real browser."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.inspection.inspect import inspect
from sparsegrad_lab.inspection.shipped_models import FOLDER, PUBLISHED
from sparsegrad_lab.study.cost_tables import costs, costs_by_task
from sparsegrad_lab.study.experiment import experiment_names
from sparsegrad_lab.study.overview import overview, parameters
from sparsegrad_lab.study.page import render_page
from sparsegrad_lab.study.report import markdown
from sparsegrad_lab.study.runs import Run
from sparsegrad_lab.study.scatter_plots import scatter_plots
from sparsegrad_lab.study.sections import Report, Section, read_report, read_sections
from sparsegrad_lab.study.statistics import compare, mean_of_tasks, score_table
from sparsegrad_lab.study.tables import comparisons, every_run, scores, searches, tables_of
from sparsegrad_lab.study.verdict import verdict

SCORES = {  # task -> method -> score of each seed
    "glue/rte": {"sparsegrad": [0.60, 0.64], "lora": [0.58, 0.60], "full": [0.66]},
    "glue/mrpc": {"lora": [0.80, 0.82], "sparsegrad": [0.81, 0.83]},
}


@pytest.fixture
def folder(tmp_path: Path, real: dict[str, Any]) -> Path:
    """Result files as runs write them, with scores of our own."""
    for task, methods in SCORES.items():
        for method, found in methods.items():
            for seed, score in enumerate(found):
                path = tmp_path / "results" / task / f"{method}-{seed}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                result = {**real, "task": task, "method": method, "seed": seed, "score": score}
                path.write_text(json.dumps(result), encoding="utf-8")
    return tmp_path / "results"


@pytest.fixture
def runs(folder: Path) -> list[Run]:
    [found] = read_sections([folder])
    return list(found.runs)


@pytest.fixture
def section(folder: Path) -> Section:
    [found] = read_sections([folder])
    return found


def test_means(runs: list[Run], section: Section) -> None:
    assert len(runs) == 9
    assert list(section.methods) == ["sparsegrad", "lora", "full"]
    rte = score_table(runs).loc["rte"]
    assert (rte["sparsegrad"].mean(), rte["sparsegrad"].std()) == (pytest.approx(62), pytest.approx(math.sqrt(8)))
    assert mean_of_tasks(section, "sparsegrad") == pytest.approx(72)
    assert mean_of_tasks(section, "lora") == pytest.approx(70)
    assert math.isnan(mean_of_tasks(section, "full"))  # has not run on MRPC


def test_a_mean_is_over_the_seeds_that_all_have(section: Section) -> None:
    """A seed in which everything is ten points better, run by one method alone, does not put it ahead."""
    mine = next(run for run in section.runs if run.method == "sparsegrad")
    more = [
        run.model_copy(update={"seed": 7, "score": run.score + 0.1})
        for run in section.runs if run.method == "sparsegrad" and run.seed == mine.seed
    ]  # fmt: skip
    assert {run.task_name for run in more} == {"rte", "mrpc"}
    wider = replace(section, runs=(*section.runs, *more))
    assert mean_of_tasks(wider, "sparsegrad") == mean_of_tasks(section, "sparsegrad") == pytest.approx(72)
    assert mean_of_tasks(wider, "lora") == pytest.approx(70)


def test_comparison_by_hand(runs: list[Run]) -> None:
    """Differences 2, 4, 1, 1: mean 2, standard error 0.7071, t(3) = 2.828."""
    found = compare(runs, "sparsegrad", "lora")
    assert (found.pairs, found.ahead) == (4, 4)
    assert found.difference == pytest.approx(2)
    assert (found.low, found.high) == (pytest.approx(2 - 3.1824 * 0.70711, abs=1e-3), pytest.approx(4.2503, abs=1e-3))
    assert found.p == pytest.approx(0.0663, abs=1e-4)
    assert "p = 0.066, over the means of 2 tasks p = 0.3; too few pairs to tell)" in str(found)
    one = compare(runs, "full", "lora")
    assert (one.pairs, one.difference) == (1, pytest.approx(8))
    assert math.isnan(one.p)
    assert "too few pairs for a test" in str(one)
    assert compare(runs, "full", "none").pairs == 0


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([2, 4, 1, 1, 2], "too few pairs to tell"),  # p = 0.022
        ([2, 4, 1, 1, 2, 2], "; significant)"),
        ([2, 4, -1, -1, 2, 2], "not significant"),
    ],
)
def test_what_is_said_of_a_difference(differences: list[int], said: str, runs: list[Run]) -> None:
    pairs = [
        runs[0].model_copy(update={"variant": method, "seed": seed, "score": (50 + more) / 100})
        for seed, difference in enumerate(differences)
        for method, more in (("a", difference), ("b", 0))
    ]
    found = compare(pairs, "a", "b")
    assert (found.pairs, found.difference) == (len(differences), pytest.approx(sum(differences) / len(differences)))
    assert said in str(found)


def test_tables(runs: list[Run], section: Section) -> None:
    table = scores(section)
    assert table.header == ["task", "sparsegrad", "lora", "full"]
    by_task = {row[0].partition(",")[0]: row[1:] for row in table.rows}
    assert by_task["rte"] == ["62.0 ± 2.8 (2)", "59.0 ± 1.4 (2)", "66.0 (1)"]
    assert by_task["mrpc"][2] == "not run"
    assert by_task["mean of tasks"] == ["72.0", "70.0", "not all run"]
    assert comparisons(section).rows[0][:3] == ["sparsegrad", "4", "+2.00"]
    assert len(every_run(runs).rows) == 9
    assert verdict(section)[0] == "Mean of 2 tasks: sparsegrad 72.0, lora 70.0."
    assert verdict(replace(section, baseline="prefix")) == [
        "9 runs of sparsegrad, lora, full; no comparison with prefix is possible."
    ]


def test_losses_are_lower_the_better_and_apart(folder: Path) -> None:
    """Losses 1.20, 1.30 against 1.25, 1.32: ahead in both, by 0.035; no mean over losses and points."""
    file = next(folder.rglob("*.json"))
    real = json.loads(file.read_text(encoding="utf-8"))
    for method, losses in (("sparsegrad", [1.20, 1.30]), ("lora", [1.25, 1.32])):
        for seed, loss in enumerate(losses):
            result = {**real, "task": "oasst1", "method": method, "seed": seed, "score": loss, "metric": "loss"}
            (folder / f"{method}-{seed}.json").write_text(json.dumps(result), encoding="utf-8")
    [section] = read_sections([folder])
    found = compare([run for run in section.runs if run.unit == "loss"], "sparsegrad", "lora")
    assert (found.pairs, found.ahead, found.difference) == (2, 2, pytest.approx(-0.035))
    assert str(found).startswith("sparsegrad against lora: -0.0350 loss (lower is better) over 2 pairs of runs")
    assert "ahead in 2." in str(found)
    by_task = {row[0]: row[1:] for row in scores(section).rows}
    assert by_task["oasst1, loss"][:2] == ["1.250 ± 0.071 (2)", "1.285 ± 0.049 (2)"]
    assert by_task["mean of tasks, points"][:2] == ["72.0", "70.0"]
    assert by_task["mean of tasks, loss"] == ["1.250", "1.285", "not all run"]
    assert [row[0] for row in comparisons(section).rows] == [
        "sparsegrad", "full", "sparsegrad, loss", "full, loss",
    ]  # fmt: skip
    assert verdict(section)[:2] == [
        "Mean of 2 tasks: sparsegrad 72.0, lora 70.0.",
        "oasst1 (lower is better): sparsegrad 1.250, lora 1.285.",
    ]
    assert any("+2.00 points over 4 pairs" in sentence for sentence in verdict(section))  # as without them
    assert "oasst1: lowest 1.200 by sparsegrad" in render_page(Report([section]), "t")
    assert "rte: highest 66.0 by full" in render_page(Report([section]), "t")


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


@pytest.fixture
def study(tmp_path: Path, real: dict[str, Any]) -> Section:
    """Of the shipped comparison: a few runs, two trials, one that ran out of memory, the rest not run."""

    def write(name: str, **what: Any) -> None:
        base = {**real, "experiment": "comparison", "scale": "cpu", "trial": False, "status": "finished", "seed": 0,
                "model": "minilm"}  # fmt: skip
        path = tmp_path / "study" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**base, **what}), encoding="utf-8")

    write("a", task="glue/rte", variant="sparsegrad", score=0.6, learning_rate=1e-2)
    write("b", task="glue/rte", variant="lora", score=0.5)
    for rate, score in ((1e-2, 0.55), (1e-3, 0.45)):
        write(f"t{rate}", task="glue/rte", variant="sparsegrad", score=score, learning_rate=rate, trial=True, seed=100)
    failed = {"task": "glue/rte", "variant": "full", "seed": 1, "status": "out of memory", "error": "too <large>",
              "config": {}, "experiment": "comparison", "scale": "cpu", "trial": False}  # fmt: skip
    (tmp_path / "study" / "c.json").write_text(json.dumps(failed), encoding="utf-8")
    [found] = read_sections([tmp_path / "study"])
    return found


def test_a_study_names_what_was_not_run_and_what_failed(study: Section) -> None:
    table = scores(study)
    assert [row[0].partition(",")[0] for row in table.rows] == ["sst2", "mrpc", "stsb", "cola", "rte", "mean of tasks"]
    rte = dict(zip(table.header, table.rows[4], strict=True))
    assert rte["sparsegrad"] == "60.0 (1)"
    assert rte["full"] == "out of memory: seed 1"
    assert rte["meprop"] == "not run"
    assert set(table.rows[0][1:]) == {"not run"}
    assert set(table.rows[5][1:]) == {"not all run"}
    # The published differences stand beside ours.
    against = {row[0]: row for row in comparisons(study).rows}
    assert against["sparsegrad"][2] == "+10.00"
    assert against["full"][-1] == "+0.9, +1.1, +1.9"
    assert against["sparsegrad"][-1] == ""
    assert searches(study).rows == [["rte", "sparsegrad", "0.001: 45.0, 0.01: 55.0", "0.01 (edge)"]]
    assert verdict(study)[-2:] == [
        "Not run: sparsegrad-paper, meprop; sparsegrad on sst2, mrpc, stsb, cola; 2 of the other 3 runs of sparsegrad; "
        "lora on sst2, mrpc, stsb, cola; 2 of the other 3 runs of lora; full on sst2, mrpc, stsb, cola; 2 of the other "
        "3 runs of full.",
        "Failed: full out of memory on rte.",
    ]
    # Of a study of time and memory there is no score to look at.
    short = replace(study, scored=False)
    assert list(tables_of(short)) == ["search", "costs", "speed"]
    assert " ".join(verdict(short)).startswith(
        "2 short runs that measure time and memory only. Not run: sparsegrad-paper"
    )
    speed = dict(zip(costs_by_task(study).header, costs_by_task(study).rows[4], strict=True))
    one = next(run for run in study.runs if run.variant == "lora")
    assert speed["lora"] == f"{one.steps / one.training.seconds:.2f} / {one.megabytes:,.0f}"
    assert [row[1:] for row in costs_by_task(study).rows[:4]] == [["not run"] * 3] * 4
    assert speed["full"] == "out of memory"
    text = render_page(Report([study]), "t")
    assert "full, seed 1: out of memory (too &lt;large&gt;)" in text
    assert 'id="of-comparison"' in text
    assert "out of memory: seed 1" in markdown(Report([study]), "t")


def test_all_experiments_are_in_the_overview(study: Section, section: Section) -> None:
    """Also those that were not run; where there is no study, there is none."""
    assert overview([section]) is None
    assert overview([study]) is None  # a section alone says all of it itself
    digits = replace(study, name="digits", experiment="digits", tasks=("rte",), seeds=(0,))
    table = overview([study, digits])
    assert table is not None
    assert len(table.rows) == len(experiment_names())
    by = {row[0]: row[2:] for row in table.rows}
    said = "sparsegrad against lora: +10.00 points over 1 pair of runs; too few pairs for a test."
    none = "No method has run on all of sst2, mrpc, stsb, cola, rte yet; rte, one seed: sparsegrad 60.0, lora 50.0."
    assert by["The paper's comparison"] == [f"{none} {said}", "2 of 75"]
    assert by["A vision transformer"] == [f"rte, one seed: sparsegrad 60.0, lora 50.0. {said}", "2 of 18"]
    assert by["Attention layers"] == ["not run", "0 of 12"]
    assert by["An encoder-decoder"] == ["not run: its sizes are for scale paper", ""]
    assert 'id="overview"' in render_page(Report([study, digits]), "t")
    failed = [replace(section, runs=(), trials=()) for section in (study, digits)]
    table = overview(failed)
    assert table is not None
    assert [row[2:] for row in table.rows if row[0] == "A vision transformer"] == [
        ["No run has a score yet.", "0 of 18"]
    ]
    assert "## Questions and answers" in markdown(Report([study, digits]), "t")


@pytest.fixture
def real(finished_run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished_run / "result.json").read_text(encoding="utf-8"))
    return found


def written(folder: Path, name: str, found: dict[str, Any]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(found), encoding="utf-8")


def test_models_are_apart(real: dict[str, Any], tmp_path: Path) -> None:
    """Ten points behind on one model, and the other has not run LoRA: no mean over the two."""
    common = {**real, "experiment": "comparison", "scale": "paper", "trial": False, "status": "finished"}
    for model, scores_of in {
        "bert-base-uncased": {"sparsegrad": 0.6, "lora": 0.7}, "roberta-large": {"sparsegrad": 0.85},
    }.items():  # fmt: skip
        for variant, score in scores_of.items():
            what = {"task": "glue/rte", "model": model, "variant": variant, "score": score}
            written(tmp_path / "s", f"{model}-{variant}.json", {**common, **what})
    sections = read_sections([tmp_path / "s"])
    assert [section.name for section in sections] == [
        "comparison-bert-base-uncased", "comparison-roberta-base", "comparison-roberta-large",
    ]  # fmt: skip
    assert "sparsegrad against lora: -10.00 points over 1 pair" in verdict(sections[0])[1]
    assert verdict(sections[1])[0] == "No run has a score yet."
    assert mean_of_tasks(replace(sections[2], tasks=("rte",)), "sparsegrad") == pytest.approx(85)
    text = render_page(Report(list(sections)), "t")
    assert all(f'id="of-{section.name}"' in text for section in sections)
    assert "roberta-large</h2>" in text


def test_trials_and_runs_of_a_study_are_no_seeds(folder: Path, real: dict[str, Any]) -> None:
    """What `sparsegrad search` and `reproduce` leave below `runs` has its own summary and result files."""
    before = len(read_sections([folder])[0].runs)
    found = {**real, "task": "glue/rte", "method": "sparsegrad", "seed": 7, "score": 0.1}
    for inner, mark in (("search-rte/trial-000", "../search.json"), ("study/deep/run", "../../claims.journal")):
        written(folder / inner, "result.json", found)
        (folder / inner / mark).write_text("{}", encoding="utf-8")
    assert len(read_sections([folder])[0].runs) == before
    [asked_for] = read_sections([folder / "search-rte"])
    assert len(asked_for.runs) == 1
    written(folder / "search-rte" / "by-itself", "result.json", found)  # not one of the trials
    assert len(read_sections([folder])[0].runs) == before + 1


def test_runs_of_one_seed_are_told_apart(folder: Path, real: dict[str, Any]) -> None:
    """By the settings in which they differ; of two with the same settings the later one counts."""
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        for more, time in (("", "2026-01-02"), ("-before", "2026-01-01")):
            what = {
                "task": "glue/rte", "method": "full", "seed": 0, "score": 10 * rate + (more != "") / 2,
                "learning_rate": rate, "environment": {**real["environment"], "time": time},
            }  # fmt: skip
            written(folder / f"{name}{more}", "result.json", {**real, **what})
    (folder / "glue" / "rte" / "full-0.json").unlink()
    [section] = read_sections([folder])
    names = {"full (learning_rate 0.0001)": 0.1, "full (learning_rate 0.01)": 10.0}
    assert {run.method_name: run.value for run in section.runs if "full" in run.method_name} == pytest.approx(names)


def test_rows_of_ones_own_are_told_apart(real: dict[str, Any], tmp_path: Path) -> None:
    """A task is named by its file, and everybody's is "train"."""
    for name, method, rows in (("a", "lora", "d"), ("b", "full", "d"), ("c", "full", "d2")):
        data = {**real["config"]["data"], "train_file": f"{rows}/train.csv"}
        config = {**real["config"], "task": "files", "data": data}
        written(tmp_path / "own" / name, "result.json", {**real, "task": "train", "method": method, "config": config})
    [section] = read_sections([tmp_path / "own"])
    assert section.tasks == ("train (train_file d/train.csv)", "train (train_file d2/train.csv)")
    assert compare(section.runs, "full", "lora").pairs == 1


def test_a_baseline_that_has_no_runs(folder: Path) -> None:
    with pytest.raises(ValueError, match="one of full, lora, sparsegrad; found 'lore'"):
        read_sections([folder], "lore")


def test_a_difference_on_one_task_is_none_over_tasks(runs: list[Run]) -> None:
    """Two tasks with +8 and +1 in each of four seeds: sure of these runs, not of tasks."""
    pairs = [
        runs[0].model_copy(update={"variant": method, "seed": seed, "task": task, "score": 0.5 + more})
        for task, difference in (("x", 0.08), ("y", 0.01))
        for seed in range(4)
        for method, more in (("a", difference + seed / 1000), ("b", 0.0))
    ]
    found = compare(pairs, "a", "b")
    assert found.low > 0
    assert (found.tasks, found.p_tasks > 0.05) == (2, True)
    assert "significant over runs, not over tasks" in str(found)
    same = [run.model_copy(update={"score": 0.5}) for run in pairs]
    assert compare(same, "a", "b").p == 1
    assert "not significant" in str(compare(same, "a", "b"))


def test_runs_of_another_experiment_are_named(study: Section, tmp_path: Path) -> None:
    [run] = [run for run in study.runs if run.variant == "sparsegrad"]
    written(
        tmp_path / "study",
        "d.json",
        {**json.loads(run.as_json()), "experiment": "calibration", "variant": "trajectory"},
    )
    sections = {section.name: section for section in read_sections([tmp_path / "study"])}
    assert sections["comparison"].shared == ()
    assert sections["calibration"].shared == (
        'The runs of trajectory with seed 0 are those of sparsegrad in "The paper\'s comparison".',
    )


def test_a_resumed_run_has_no_time(section: Section) -> None:
    """Its seconds are those since it was resumed: a share or a speed from them would be wrong, and was."""
    first, *others = section.runs
    cut = first.model_copy(update={"resumed": True, "training": first.training.model_copy(update={"seconds": 1e-3})})
    resumed = replace(section, runs=(cut, *others))
    row = next(row for row in costs(resumed).rows if row[0] == first.method)
    whole = [run for run in others if run.method == first.method]
    rates = [run.steps / run.training.seconds for run in whole]
    assert row[3] == f"{sum(rates) / len(rates):.2f}"
    assert row[4] == next(row for row in costs(replace(section, runs=tuple(others))).rows if row[0] == first.method)[4]
    assert every_run(resumed.runs).rows[0][9] == ""
    assert [picture.title for picture in scatter_plots(replace(section, runs=(cut,)))] == ["Score against peak memory"]


def test_parameters_by_part() -> None:
    """Counted from the configs; the paper's own numbers are these, rounded."""
    table = parameters()
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert list(rows) == ["bert-base", "llama-2-7b", "roberta-base", "roberta-large"]
    assert rows["bert-base"]["MLP"] == "56.7 M, 51.8 % (57)"
    assert rows["llama-2-7b"]["total, M"] == "6,738.4 (6,700)"
    assert rows["roberta-base"]["embeddings"] == "39.0 M, 31.3 % (40)"
    for model, said in PUBLISHED.items():
        parts = inspect(str(FOLDER / model)).parts
        for part, count in said.items():
            found = parts.total if part == "total" else getattr(parts, part)
            assert found == pytest.approx(count, abs=0.06e9 if count >= 1e8 and model == "llama-2-7b" else 1.1e6)


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
    assert len(reader.labels) == 2
    assert all("highest 83.0 by sparsegrad" in label for label in reader.labels)


def browser() -> str | None:
    """A Chromium that is installed, or the one that SPARSEGRAD_CHROMIUM names."""
    named = os.environ.get("SPARSEGRAD_CHROMIUM")
    return named or next((found for name in ("chromium", "chromium-browser", "google-chrome")
                          if (found := shutil.which(name))), None)  # fmt: skip


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_page_in_a_browser(runs: list[Run], section: Section, tmp_path: Path) -> None:
    """Sorted by a click, filtered by words, a run opened by a link; nothing in the console."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    file = tmp_path / "index.html"
    file.write_text(render_page(Report([section]), "t"), encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
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
        tab.wait_for_selector("details[open]")  # the page hears of the new address a moment later
        assert tab.locator("details[open]").count() == 1
        assert '"score": 0.6' in tab.locator("details[open] pre").inner_text()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # a phone's width holds it
        tab.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        chromium.close()
    assert said == []


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


def test_the_papers_costs_stand_below_ours() -> None:
    study = Path(__file__).parents[3] / "benchmarks" / "results" / "study" / "speed"
    [section] = read_sections([study])
    table = costs_by_task(section)
    last = dict(zip(table.header, table.rows[-1], strict=True))
    assert last.pop("task") == "in the paper (RoBERTa-base)"
    assert {method: cost for method, cost in last.items() if cost} == {
        "full": "4.11 / 1,345", "lora": "4.7 / 944", "literal": "0.9 / 1,210", "literal-sparse": "4.3 / 1,016",
    }  # fmt: skip
    assert [row[0] for row in table.rows[:-1]] == ["sst2", "mrpc", "rte"]
    assert "The paper's: EMNLP 2024" in table.note
