"""Time and memory in tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparsegrad_lab.study.cost_tables import costs, costs_by_task
from sparsegrad_lab.study.plots import cost_plots, run_plots
from sparsegrad_lab.study.sections import Section, read_report
from sparsegrad_lab.study.tables import every_run


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
    assert len(run_plots(replace(section, runs=(cut,)))) == 1  # against memory alone
    [picture] = cost_plots(resumed)
    assert "training time ÷ lora's: sparsegrad +2 at 1.00" in picture.description  # from the other pairs


def test_a_method_whose_runs_were_all_resumed_leaves_the_others_their_speed(section: Section) -> None:
    cut = [run.model_copy(update={"resumed": run.method == "lora"}) for run in section.runs]
    speeds = {row[0]: row[3] for row in costs(replace(section, runs=tuple(cut))).rows}
    assert speeds["lora"] == ""
    assert float(speeds["sparsegrad"]) > 0


def test_the_papers_costs_stand_below_ours() -> None:
    study = Path(__file__).parents[3] / "benchmarks" / "results" / "study" / "speed"
    [section] = read_report([study]).sections
    table = costs_by_task(section)
    last = dict(zip(table.header, table.rows[-1], strict=True))
    assert last.pop("task") == "in the paper (RoBERTa-base)"
    assert {method: cost for method, cost in last.items() if cost} == {
        "full": "4.11 / 1,345", "lora": "4.7 / 944", "literal": "0.9 / 1,210", "literal-sparse": "4.3 / 1,016",
    }  # fmt: skip
    assert [row[0] for row in table.rows[:-1]] == ["sst2", "mrpc", "rte"]
    assert "The paper's: EMNLP 2024" in table.note
