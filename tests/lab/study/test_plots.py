"""What the plots of a report show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sparsegrad_lab.study import plots
from sparsegrad_lab.study.sections import Section


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    figures: list[Any] = []
    as_text = plots._svg

    def svg(figure: Any) -> str:
        figures.append(figure)
        return as_text(figure)

    monkeypatch.setattr(plots, "_svg", svg)
    return figures


def test_dots_are_means_over_pairs(section: Section, drawn: list[Any]) -> None:
    """Task means 3 and 1. A run of LoRA alone, ten points better, is no pair."""
    lora = next(run for run in section.runs if run.method == "lora")
    more = lora.model_copy(update={"seed": 7, "score": lora.score + 0.1})
    plots.difference_plots(replace(section, runs=(*section.runs, more)))
    dots = drawn[0].axes[0].lines[0]
    assert sorted(dots.get_xdata()) == pytest.approx([1, 3])


def test_learning_curves_are_means_over_the_evaluations_that_all_runs_have(section: Section, drawn: list[Any]) -> None:
    task = section.tasks[0]
    [lora, *_] = section.runs_of(task, "lora")
    scores: dict[int, dict[int, float | None]] = {0: {10: 0.5, 20: 0.6, 30: 0.9}, 1: {10: 0.7, 20: 0.8}, 2: {20: None}}

    def run(seed: int) -> Any:
        evaluations = [{"step": step, lora.metric: value} for step, value in scores[seed].items()]
        return lora.model_copy(update={"seed": seed, "evaluations": evaluations})

    [plot] = plots.curve_plots(replace(section, tasks=(task,), runs=(run(0), run(1))))
    [line] = drawn[0].axes[0].lines
    assert [*line.get_xdata()] == [10, 20]
    assert [*line.get_ydata()] == pytest.approx([60, 70])
    assert "lora 60.0 at step 10, 70.0 at step 20" in plot.description
    assert plots.curve_plots(replace(section, tasks=(task,), runs=(run(2),))) == []


def test_a_method_whose_name_begins_with_an_underscore_has_a_point_and_a_name(
    section: Section, drawn: list[Any]
) -> None:
    """matplotlib leaves such labels out of its legends."""
    runs = tuple(
        run.model_copy(update={"variant": "_mine"}) if run.method == "sparsegrad" else run for run in section.runs
    )
    mine = replace(section, runs=runs, methods={"_mine": "", "lora": "", "full": ""})
    plots.cost_plots(mine)
    plots.run_plots(mine)
    assert len(drawn) == 5
    assert all("_mine" in [text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn)
