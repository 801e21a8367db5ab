"""Runs are grouped by experiment and model, and told apart by their settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import write_json
from sparsegrad_lab.study.page import render_page
from sparsegrad_lab.study.sections import Report, Section, read_sections
from sparsegrad_lab.study.statistics import compare, mean_of_tasks
from sparsegrad_lab.study.verdict import verdict


def test_models_are_apart(real: dict[str, Any], tmp_path: Path) -> None:
    """Ten points behind on one model, and the other has not run LoRA: no mean over the two."""
    common = {**real, "experiment": "comparison", "scale": "paper", "trial": False, "status": "finished"}
    for model, scores_of in {
        "bert-base-uncased": {"sparsegrad": 0.6, "lora": 0.7}, "roberta-large": {"sparsegrad": 0.85},
    }.items():  # fmt: skip
        for variant, score in scores_of.items():
            what = {"task": "glue/rte", "model": model, "variant": variant, "score": score}
            write_json(tmp_path / "s" / f"{model}-{variant}.json", {**common, **what})
    sections = read_sections([tmp_path / "s"])
    assert [section.name for section in sections] == [
        "comparison-bert-base-uncased", "comparison-roberta-base", "comparison-roberta-large",
    ]  # fmt: skip
    assert "too few runs to tell. -10.00 points over 1 pair" in verdict(sections[0])[1]
    assert verdict(sections[1])[0] == "No run has a score yet."
    assert mean_of_tasks(replace(sections[2], tasks=("rte",)), "sparsegrad") == pytest.approx(85)
    text = render_page(Report(list(sections)), "t")
    assert all(f'id="of-{section.name}"' in text for section in sections)
    assert "roberta-large</h3>" in text


def test_runs_of_one_seed_are_told_apart(folder: Path, real: dict[str, Any]) -> None:
    """By the settings in which they differ; of two with the same settings the later one counts."""
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        for more, time in (("", "2026-01-02"), ("-before", "2026-01-01")):
            what = {
                "task": "glue/rte", "method": "full", "seed": 0, "score": 10 * rate + (more != "") / 2,
                "learning_rate": rate, "environment": {**real["environment"], "time": time},
            }  # fmt: skip
            write_json(folder / f"{name}{more}" / "result.json", {**real, **what})
    (folder / "glue" / "rte" / "full-0.json").unlink()
    [section] = read_sections([folder])
    names = {"full (learning_rate 0.0001)": 0.1, "full (learning_rate 0.01)": 10.0}
    assert {run.method_name: run.value for run in section.runs if "full" in run.method_name} == pytest.approx(names)


def test_rows_of_ones_own_are_told_apart(real: dict[str, Any], tmp_path: Path) -> None:
    """A task is named by its file, and everybody's is "train"."""
    for name, method, rows in (("a", "lora", "d"), ("b", "full", "d"), ("c", "full", "d2")):
        data = {**real["config"]["data"], "train_file": f"{rows}/train.csv"}
        config = {**real["config"], "task": "files", "data": data}
        write_json(
            tmp_path / "own" / name / "result.json", {**real, "task": "train", "method": method, "config": config}
        )
    [section] = read_sections([tmp_path / "own"])
    assert section.tasks == ("train (train_file d/train.csv)", "train (train_file d2/train.csv)")
    assert compare(section.runs, "full", "lora").pairs == 1


def test_a_baseline_that_has_no_runs(folder: Path) -> None:
    with pytest.raises(ValueError, match="one of full, lora, sparsegrad; found 'lore'"):
        read_sections([folder], "lore")


def test_runs_of_another_experiment_are_named(study: Section, tmp_path: Path) -> None:
    [run] = [run for run in study.runs if run.variant == "sparsegrad"]
    again = {**json.loads(run.as_json()), "experiment": "calibration", "variant": "trajectory"}
    write_json(tmp_path / "study" / "d.json", again)
    sections = {section.name: section for section in read_sections([tmp_path / "study"])}
    assert sections["comparison"].shared == ()
    assert sections["calibration"].shared == (
        'The runs of trajectory with seed 0 are those of sparsegrad in "The paper\'s comparison".',
    )


def test_runs_that_are_scored_otherwise_are_told_apart(real: dict[str, Any], tmp_path: Path) -> None:
    for name, method, metric in (("a", "lora", "f1"), ("b", "full", "accuracy"), ("c", "sparsegrad", "accuracy")):
        write_json(tmp_path / "own" / name / "result.json", {**real, "method": method, "metric": metric})
    [section] = read_sections([tmp_path / "own"])
    assert section.tasks == ("train (metric f1)", "train (metric accuracy)")
    assert compare(section.runs, "full", "lora").pairs == 0
    assert compare(section.runs, "sparsegrad", "full").pairs == 1
