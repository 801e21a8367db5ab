"""The tables, against values computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparsegrad_lab.study.cost_tables import costs_by_task
from sparsegrad_lab.study.page import render_page
from sparsegrad_lab.study.plots import forgetting_plots
from sparsegrad_lab.study.report import markdown
from sparsegrad_lab.study.runs import Run
from sparsegrad_lab.study.sections import Report, Section, read_report
from sparsegrad_lab.study.statistics import compare
from sparsegrad_lab.study.tables import comparisons, every_run, scores, searches, tables_of
from sparsegrad_lab.study.verdict import verdict


def test_tables(runs: list[Run], section: Section) -> None:
    table = scores(section)
    assert table.header == ["task", "sparsegrad", "lora", "full"]
    by_task = {row[0].partition(",")[0]: row[1:] for row in table.rows}
    assert by_task["rte"] == ["62.0 ± 2.8 (2)", "59.0 ± 1.4 (2)", "66.0 (1)"]
    assert by_task["mrpc"][2] == "not run"
    assert by_task["mean of tasks"] == ["72.0", "70.0", "not all run"]
    assert comparisons(section).rows[0][:3] == ["sparsegrad", "4", "+2.00"]
    assert len(every_run(runs).rows) == 9
    assert verdict(section)[0] == "Mean of 2 tasks: sparsegrad 72.0, lora 70.0; without full (not on mrpc)."
    assert verdict(replace(section, baseline="prefix")) == [
        "9 runs of sparsegrad, lora, full; no comparison with prefix is possible."
    ]


def test_forgetting(folder: Path) -> None:
    """Means over the seeds that measured it: (12 + 13) / 2 after 10."""
    for seed, after in enumerate([12.0, 13.0]):
        path = folder / "glue" / "rte" / f"sparsegrad-{seed}.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        result["unrelated_perplexity"] = {"before": 10.0, "after": after}
        result["score_before"] = 0.5
        path.write_text(json.dumps(result), encoding="utf-8")
    [section] = read_report([folder]).sections
    table = tables_of(section)["forgetting"]
    assert table.rows == [
        ["rte, gain", "+12.0", "not measured", "not measured"],  # 60 and 64 points, after 50
        ["rte, unrelated perplexity", "12.50 (+25.0%)", "not measured", "not measured"],
    ]
    [plot] = forgetting_plots(section)
    assert plot.title == "Gain against forgetting, rte"
    assert plot.description.endswith("sparsegrad +12 at +25.0%.")


def test_losses_are_lower_the_better_and_apart(folder: Path) -> None:
    """Losses 1.20, 1.30 against 1.25, 1.32: ahead in both, by 0.035; no mean over losses and points."""
    file = next(folder.rglob("*.json"))
    real = json.loads(file.read_text(encoding="utf-8"))
    for method, losses in (("sparsegrad", [1.20, 1.30]), ("lora", [1.25, 1.32])):
        for seed, loss in enumerate(losses):
            result = {**real, "task": "oasst1", "method": method, "seed": seed, "score": loss, "metric": "loss"}
            (folder / f"{method}-{seed}.json").write_text(json.dumps(result), encoding="utf-8")
    [section] = read_report([folder]).sections
    found = compare([run for run in section.runs if run.unit == "loss"], "sparsegrad", "lora")
    assert (found.pairs, found.ahead, found.difference) == (2, 2, pytest.approx(-0.035))
    assert "-0.0350 in loss (lower is better) over 2 pairs of runs, ahead in 2 (95 %" in str(found)
    by_task = {row[0]: row[1:] for row in scores(section).rows}
    assert by_task["oasst1, loss"][:2] == ["1.2500 ± 0.0707 (2)", "1.2850 ± 0.0495 (2)"]
    assert by_task["mean of tasks, points"][:2] == ["72.0", "70.0"]
    assert "mean of tasks, loss" not in by_task  # there is one task with a loss
    assert [row[0] for row in comparisons(section).rows] == [
        "sparsegrad", "full", "sparsegrad, loss", "full, loss",
    ]  # fmt: skip
    assert verdict(section)[:2] == [
        "Mean of 2 tasks: sparsegrad 72.0, lora 70.0; without full (not on mrpc).",
        "oasst1 (lower is better): sparsegrad 1.2500, lora 1.2850; without full (not on oasst1).",
    ]
    assert any("+2.00 points over 4 pairs" in sentence for sentence in verdict(section))  # as without them
    assert "oasst1: lowest 1.2000 by sparsegrad" in render_page(Report([section]), "t")
    assert "rte: highest 66.0 by full" in render_page(Report([section]), "t")


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
        "Not run: sparsegrad-paper, meprop; sparsegrad on sst2, mrpc, stsb, cola; 2 of 3 planned runs of sparsegrad on "
        "rte; lora on sst2, mrpc, stsb, cola; 2 of 3 planned runs of lora on rte; full on sst2, mrpc, stsb, cola; 2 of "
        "3 planned runs of full on rte.",
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


def test_planned_runs_are_counted_by_task_and_seed(study: Section) -> None:
    """A run with seed 7 stands for none of the planned ones."""
    lora = next(run for run in study.runs if run.variant == "lora")
    more = replace(study, runs=(*study.runs, lora.model_copy(update={"seed": 7})))
    assert "2 of 3 planned runs of lora on rte" in verdict(more)[-2]


def test_the_search_shows_the_scores_that_chose(study: Section) -> None:
    """Other rows are scored than those that choose: 0.001 is the better rate there, and 0.01 was taken."""
    trials = tuple(
        run.model_copy(update={"selection_score": 0.7 if run.learning_rate == 0.01 else 0.6, "score": 0.5})
        for run in study.trials
    )
    assert searches(replace(study, trials=trials)).rows[0][2] == "0.001: 60.0, 0.01: 70.0"


def test_means_without_a_common_seed_say_so(section: Section) -> None:
    apart = tuple(run.model_copy(update={"seed": run.seed + 10 * (run.method == "lora")}) for run in section.runs)
    assert "The means below the tasks are over the seeds that all methods of the row have run" in scores(section).note
    assert "over all seeds, since no seed has run with all methods" in scores(replace(section, runs=apart)).note


def test_methods_with_other_seeds_are_compared_over_the_common_ones(folder: Path) -> None:
    """A method with one easy seed would look better than one with three."""
    for task in ("mrpc", "stsb"):
        for path in (folder / "glue" / task).glob("*.json"):
            path.unlink()
    [section] = read_report([folder]).sections
    table = scores(section)
    assert ["mean over common seeds", "60.0", "58.0", "66.0"] in table.rows
    assert "The means below the tasks are over the seeds that all methods of the row have run" in table.note
    assert "not what other rows or tasks would" in comparisons(section).note
